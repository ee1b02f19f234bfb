from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama, tiny_lora
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from rfa_llm import directions, residuals
from rfa_llm.blocks import find_blocks, lora_placement
from rfa_llm.data.formats import prepare
from rfa_llm.directions import aim_adapter, contrastive_directions, find_directions, second_moments
from rfa_llm.reference import batches, reference_features


def adapted(**lora):
    model = tiny_llama()
    return get_peft_model(model, tiny_lora(**{**lora_placement(model, 3), **lora}))


def adapted_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.fixture
def sets(tokenizer, forget, retain):
    return prepare(forget, tokenizer, "forget_dataset", None), prepare(retain, tokenizer, "retain_dataset", None)


def test_directions_of_diagonal_moments_are_axes_by_their_ratio():
    forget = torch.diag(torch.tensor([1.0, 8.0, 9.0, 2.0]))
    retain = torch.diag(torch.tensor([1.0, 1.0, 9.0, 1.0]))
    # Ratios 1, 8, 1 and 2; the ridge of 0.03 does not change their order.
    found = contrastive_directions(forget, retain, 2).abs() * 3**0.5
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, 0, 1], [0, 1, 0, 0]]), atol=1e-6, rtol=0)


def test_no_other_direction_has_a_larger_ratio():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=generator), torch.randn(40, 6, generator=generator)
    forget, retain = x.T @ x / 40, y.T @ y / 40
    regular = retain + 0.01 * retain.diagonal().mean() * torch.eye(6)
    best = contrastive_directions(forget, retain, 1)[0]
    others = torch.randn(5000, 6, generator=generator)
    ratios = torch.einsum("ni,ij,nj->n", others, forget, others) / torch.einsum("ni,ij,nj->n", others, regular, others)
    assert ratios.max() <= (best @ forget @ best) / (best @ regular @ best) * (1 + 1e-5)
    assert best.norm().item() == pytest.approx(3**-0.5)


@pytest.mark.parametrize("which", ["answer", "all"])
def test_moments_are_the_means_over_the_tokens_that_count(which, sets):
    model = adapted()
    layers = adapted_layers(model)
    moments = second_moments(model, layers, batches(sets[1], which, 0, 3, "rows"))

    inputs = {name: [] for name in layers}
    for row in sets[1]:
        first = row["answer_start"] - 1 if which == "answer" else 0
        handles = [
            layer.register_forward_pre_hook(
                lambda module, args, name=name, first=first: inputs[name].append(args[0][0, first:])
            )
            for name, layer in layers.items()
        ]
        with torch.no_grad(), model.disable_adapter():
            model(torch.tensor([row["input_ids"]]))
        for handle in handles:
            handle.remove()
    for name in layers:
        x = torch.cat(inputs[name])
        torch.testing.assert_close(moments[name], x.T @ x / len(x), atol=1e-4, rtol=1e-4)
    block = "base_model.model.model.layers.1"
    assert moments[f"{block}.self_attn.q_proj"] is moments[f"{block}.self_attn.v_proj"]
    assert moments[f"{block}.mlp.gate_proj"] is moments[f"{block}.mlp.up_proj"]
    assert moments[f"{block}.self_attn.q_proj"] is not moments[f"{block}.self_attn.o_proj"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_taking_the_layers_in_groups_changes_nothing(sets, monkeypatch):
    model = adapted()
    whole = find_directions(model, *sets, ("answer", "all"), 0)
    assert set(whole) == set(adapted_layers(model))
    monkeypatch.setattr(directions, "MOMENT_BYTES", 2 * 4 * 32**2 * 5)
    parts = find_directions(model, *sets, ("answer", "all"), 0)
    for name, values in whole.items():
        torch.testing.assert_close(parts[name].abs(), values.abs(), atol=1e-4, rtol=1e-3)


def test_an_aimed_adapter_moves_forget_rows_more_and_retain_rows_less(sets):
    """Whatever B has learnt: the ratio of the two sets' residuals, over the same random B."""

    def ratio(model):
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
        blocks = [find_blocks(model.get_base_model())[3]]
        means = []
        for rows, which in zip(sets, ("answer", "all"), strict=True):
            (batch,) = batches(rows, which, 0, 16, "rows")
            tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
            (h0,) = residuals.select(reference_features(model, blocks, **tokens), batch["token_mask"])
            with torch.no_grad():
                (h,) = residuals.select(residuals.block_features(model, blocks, **tokens), batch["token_mask"])
            means.append(residuals.squared_ratio(h - h0, h0).mean())
        return means[0] / means[1]

    plain, aimed = adapted(), adapted()
    aim_adapter(aimed, find_directions(aimed, *sets, ("answer", "all"), 0))
    assert ratio(aimed) > 2 * ratio(plain)


@pytest.mark.parametrize("given_as", ["path", "loaded"])
def test_the_trainer_finds_the_directions_and_keeps_them(given_as, make_trainer, saved_llama, sets, tmp_path):
    expected = find_directions(adapted(), *sets, ("answer", "all"), 0)
    model = saved_llama if given_as == "path" else tiny_llama()
    trainer = make_trainer({"blocks": [1, 3]}, model=model, peft_config=tiny_lora())
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, values in expected.items():
        torch.testing.assert_close(saved[f"{name}.lora_A.weight"], values)
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_A" in name)


def test_random_leaves_the_draw_of_peft_and_trains_it(make_trainer):
    trainer = make_trainer({"input_directions": "random"})
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_A" in name)


def test_a_rank_above_the_inputs_is_refused(make_trainer):
    with pytest.raises(ValueError, match="^peft_config: the rank 33 is above the 32 inputs of .*q_proj"):
        make_trainer(peft_config=tiny_lora(r=33))
    make_trainer({"input_directions": "random"}, peft_config=tiny_lora(r=33))


def test_a_layer_that_is_not_given_every_token_is_refused(sets):
    model = adapted()
    router = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    router.register_forward_pre_hook(lambda module, args: (args[0][:, ::2],), prepend=True)
    router.register_forward_hook(lambda module, args, output: output.repeat_interleave(2, 1)[:, : output.shape[1]])
    with pytest.raises((ValueError, RuntimeError), match="input_directions: .*down_proj is not given every token"):
        find_directions(model, *sets, ("answer", "all"), 0)
    assert len(router._forward_pre_hooks) == 1
