from __future__ import annotations

import copy

import pytest
import torch
from conftest import perturb, tiny_llama, tiny_lora
from peft import get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer

from rfa_llm.adapters import adapter_off, base_revision, computing_in_model_dtype, read_adapter, scale_adapter
from rfa_llm.evaluation.scores import next_token_logits

CPU = torch.device("cpu")
IDS = torch.arange(3, 19).view(2, 8)


def adapted(dtype):
    model = get_peft_model(tiny_llama().to(dtype), tiny_lora(target_modules="all-linear"))
    perturb(model)
    return model


def branch_dtypes(model):
    found = set()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_B["default"].register_forward_hook(lambda module, args, output: found.add(output.dtype))
    return found


def test_the_adapter_of_a_bfloat16_model_computes_in_bfloat16_and_learns_in_float32():
    model = adapted(torch.bfloat16)
    exact = copy.deepcopy(model).float()(IDS).logits
    dtypes = branch_dtypes(model)
    with computing_in_model_dtype(model, CPU):
        logits = model(IDS).logits
    logits.float().logsumexp(-1).sum().backward()
    assert dtypes == {torch.bfloat16} and logits.dtype == torch.bfloat16
    assert (logits - exact).norm() < 0.02 * exact.norm()
    weights = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in weights)
    # Outside, peft is as it was.
    dtypes.clear()
    model(IDS)
    assert dtypes == {torch.float32}


def test_models_of_another_dtype_or_without_an_adapter_are_left_alone():
    model = adapted(torch.float32)
    expected = model(IDS).logits
    with computing_in_model_dtype(model, CPU):
        assert torch.equal(model(IDS).logits, expected)
    plain = tiny_llama()
    with computing_in_model_dtype(plain, CPU):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
        {"target_modules": ["embed_tokens", "up_proj"]},
    ],
    ids=["linear", "dora", "bias", "embedding"],
)
def test_scaled_weights_compute_what_a_scaled_adapter_does(more):
    model = get_peft_model(tiny_llama(), tiny_lora(**more))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    before = model(IDS).logits
    with rescale_adapter_scale(model, 1.5):
        expected = model(IDS).logits
    scale_adapter(model, 1.5)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert (expected - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_bfloat16_run_under_checkpointing_is_near_one_without(use_reentrant, make_trainer, tmp_path):
    losses = []
    for checkpointing in (False, True):
        config = {"shift": "local", "output_dir": str(tmp_path / str(checkpointing)), "max_steps": 4}
        if checkpointing:
            config["gradient_checkpointing"] = True
            config["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
        trainer = make_trainer(config, model=tiny_llama().bfloat16())
        dtypes = branch_dtypes(trainer.model)
        trainer.train()
        assert dtypes == {torch.bfloat16}
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss_forget" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_scoring_leaves_no_autocast_behind():
    model = adapted(torch.bfloat16)
    ids = IDS.tolist()
    for _ in zip(next_token_logits(model, ids), next_token_logits(model, ids), strict=True):
        assert not torch.is_autocast_enabled("cpu")
    next(next_token_logits(model, ids))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("config", ['{"peft_type": "FOO"}', "[]", "{"])
def test_a_configuration_that_peft_cannot_read_is_no_adapter(config, tmp_path):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError, match="^adapter_name_or_path: .* is no adapter .*; pass the folder"):
        read_adapter(str(tmp_path))


def test_what_was_frozen_stays_frozen_when_something_fails_with_the_adapter_off():
    model = adapted(torch.float32)
    next(parameter for parameter in model.parameters() if parameter.requires_grad).requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt), adapter_off(model):
        raise KeyboardInterrupt
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize(("given", "expected"), [(None, "v2"), ("me/base", "v2"), ("me/another", None)])
def test_an_adapters_revision_is_of_the_base_that_it_names(given, expected):
    assert base_revision("v2", "me/base", given) == ({"revision": expected} if expected else {})
    assert base_revision(None, "me/base", given) == {}
