from __future__ import annotations

import json

import pytest
import torch
from accelerate import dispatch_model
from conftest import perturb, tiny_llama, tiny_rows, tiny_tokenizer
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
    TrainerCallback,
)
from transformers.pytorch_utils import Conv1D

from rfa_llm import RFAConfig, RFATrainer
from rfa_llm.blocks import find_blocks
from rfa_llm.data.formats import encode
from rfa_llm.evaluation import answer_losses, greedy_answers
from rfa_llm.reference import (
    check_attention,
    local_features,
    reference_features,
    smoothed_attention_on,
    smoothed_features,
)
from rfa_llm.residuals import block_features, capture, readout

ROOT = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
BASE = {**ROOT, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.2}
GQA = {**BASE, "intermediate_size": 48, "num_key_value_heads": 2}
# Where the blocks are, the config class and its values. Rates of dropout that default to 0 are raised.
ARCHITECTURES = {
    "llama": ("model.layers", LlamaConfig, {**GQA, "attention_dropout": 0.1}),
    "mistral": ("model.layers", MistralConfig, {**GQA, "sliding_window": 4, "attention_dropout": 0.1}),
    "qwen2": ("model.layers", Qwen2Config, {**GQA, "attention_dropout": 0.1}),
    "qwen3": ("model.layers", Qwen3Config, {**GQA, "head_dim": 8, "attention_dropout": 0.1}),
    "gemma2": (
        "model.layers",
        Gemma2Config,
        {**GQA, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 1.0, "attention_dropout": 0.1},
    ),
    "gemma3": (
        "model.layers",
        Gemma3TextConfig,
        {**GQA, "head_dim": 8, "sliding_window": 4, "attention_dropout": 0.1},
    ),
    "phi3": ("model.layers", Phi3Config, {**GQA, "sliding_window": 4, "resid_pdrop": 0.1, "attention_dropout": 0.1}),
    "gpt2": ("transformer.h", GPT2Config, {**BASE, "n_positions": 64}),
    "gpt_neox": (
        "gpt_neox.layers",
        GPTNeoXConfig,
        {**BASE, "intermediate_size": 48, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    ),
    "opt": (
        "model.decoder.layers",
        OPTConfig,
        {**BASE, "init_std": 0.2, "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5},
    ),
    "bloom": ("transformer.h", BloomConfig, {**BASE, "attention_dropout": 0.1, "hidden_dropout": 0.1}),
    # Reads its rates from the configuration in each forward.
    "falcon": (
        "transformer.h",
        FalconConfig,
        {**BASE, "attention_dropout": 0.1, "hidden_dropout": 0.1, "new_decoder_architecture": True},
    ),
    # Blocks that are not alike.
    "lfm2": ("model.layers", Lfm2Config, {**GQA, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    # Attention with learnt sinks, and experts.
    "gpt_oss": (
        "model.layers",
        GptOssConfig,
        {**GQA, "head_dim": 8, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
# Those whose attention takes a mask and a scale of ours; two of them come without sdpa.
WITHOUT_SDPA = ("gemma2", "gpt_oss")
NARROWABLE = [name for name in ARCHITECTURES if name not in ("bloom", "falcon", "lfm2")]
narrowable = pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, "eager") for name in NARROWABLE] + [(name, "sdpa") for name in NARROWABLE if name not in WITHOUT_SDPA],
)


def tiny_model(name, num_hidden_layers=4, **config):
    _, config_class, values = ARCHITECTURES[name]
    torch.manual_seed(0)
    values = {**values, "num_hidden_layers": num_hidden_layers, **config}
    return AutoModelForCausalLM.from_config(config_class(**values))


def tokens(rows=2, length=12):
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def linear_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


@every_architecture
def test_lora_goes_on_every_linear_layer_up_to_the_last_aligned_block(name, make_trainer):
    model = tiny_model(name)
    path = ARCHITECTURES[name][0]
    assert find_blocks(model) is model.get_submodule(path)
    below = tuple(f"{path}.{block}." for block in range(3))
    expected = {layer for layer in linear_layers(model) if layer.startswith(below)}
    base = make_trainer({"blocks": [1, 2]}, model=model).model.get_base_model()
    assert {layer for layer, module in base.named_modules() if isinstance(module, LoraLayer)} == expected


def test_layers_that_are_named_stay_the_ones(make_trainer):
    model = make_trainer(
        {"blocks": [1, 3]}, peft_config=LoraConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 3])
    ).model
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert {name.split(".layers.")[1][0] for name in adapted} == {"1", "3"} and len(adapted) == 14


def test_a_router_gets_no_lora_and_no_jitter(make_trainer):
    class TopRouter(nn.Linear):
        """As Llama 4's and PhiMoE's: more than one output."""

    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.router = TopRouter(32, 4)
        block.mlp.router_jitter_noise = 0.1
    model = make_trainer(model=model).model
    assert not any("router" in name and "lora" in name for name, _ in model.named_parameters())
    assert all(block.mlp.router_jitter_noise == 0.0 for block in model.get_base_model().model.layers)


def test_lora_stays_off_a_vision_tower(make_trainer):
    text = {key: value for key, value in GQA.items() if key != "initializer_range"}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, "head_dim": 8, "num_hidden_layers": 4},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    base = make_trainer(model=AutoModelForCausalLM.from_config(config)).model.get_base_model()
    adapted = [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    assert len(adapted) == 4 * 7 and all(name.startswith("model.language_model.layers.") for name in adapted)


@every_architecture
def test_the_residual_is_exactly_zero_at_first_and_not_after_the_adapter_moved(name, make_trainer):
    trainer = make_trainer({"blocks": [1, 3]}, model=tiny_model(name))
    model, blocks = trainer.model.train(), trainer._blocks()
    reference = reference_features(model, blocks, **tokens())
    assert [feature.shape for feature in reference] == [(2, 12, 32)] * 2
    assert not torch.allclose(*reference)
    for _ in range(2):  # layers that are dropped at random would not be dropped twice alike
        features = block_features(model, blocks, **tokens())
        assert all(torch.equal(a, b) for a, b in zip(features, reference, strict=True))
    perturb(model)
    features = block_features(model, blocks, **tokens())
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(features, reference, strict=True))
    again = reference_features(model, blocks, **tokens())
    assert all(torch.equal(a, b) for a, b in zip(again, reference, strict=True))


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@every_architecture
def test_checkpointing_changes_no_gradient(name, make_trainer):
    def gradients(**config):
        keep = KeepGradients()
        config = {"blocks": [1, 2], "max_steps": 1, "max_grad_norm": 0.0, **config}
        trainer = make_trainer(config, model=tiny_model(name), callbacks=[keep])
        perturb(trainer.model)
        trainer.train()
        return keep.gradients

    plain = gradients()
    assert all(gradient.any() for name, gradient in plain.items() if "lora_B" in name)
    for use_reentrant in (True, False):
        kwargs = {"use_reentrant": use_reentrant}
        checkpointed = gradients(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
        assert checkpointed.keys() == plain.keys()
        for parameter, gradient in plain.items():
            torch.testing.assert_close(checkpointed[parameter], gradient, rtol=1e-4, atol=1e-5)


@every_architecture
def test_the_forward_ends_after_the_last_aligned_block(name):
    model = tiny_model(name).eval()
    blocks = find_blocks(model)
    calls = []
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda module, args, index=index: calls.append(index))
    with capture(blocks) as whole, torch.no_grad():
        model(**tokens())
    calls.clear()
    with torch.no_grad():
        features = block_features(model, [blocks[2], blocks[0]], **tokens())
    assert calls == [0, 1, 2]
    assert torch.equal(features[0], whole[2]) and torch.equal(features[1], whole[0])
    assert len(blocks) == 4 and type(blocks) is nn.ModuleList
    with torch.no_grad():
        model(**tokens())
    assert calls == [0, 1, 2, 0, 1, 2, 3]


@every_architecture
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_last_blocks_features_are_read_out_as_the_model_does(name, use_reentrant, make_trainer):
    config = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer = make_trainer({"blocks": [1, 3], "next_token_weight": 1.0, **config}, model=tiny_model(name))
    perturb(trainer.model)
    model, blocks = trainer.model.train(), find_blocks(trainer.model.get_base_model())
    with capture(blocks) as features, torch.no_grad():
        logits = model(**tokens()).logits
    before = [len(block._forward_hooks) for block in blocks]
    last = features[-1].flatten(0, 1).requires_grad_()
    read = readout(model, blocks, last)
    torch.testing.assert_close(read, logits.flatten(0, 1), rtol=1e-5, atol=1e-5)
    read.square().sum().backward()
    assert last.grad.abs().sum(-1).all()
    assert all(block.training for block in blocks) and len(blocks) == 4
    assert [len(block._forward_hooks) for block in blocks] == before


@narrowable
def test_rows_without_padding_give_the_same_gradient(name, implementation, make_trainer):
    def gradients(**config):
        keep = KeepGradients()
        config = {"blocks": [1, 2], "max_steps": 1, "max_grad_norm": 0.0, "reference_cache": "memory", **config}
        model = tiny_model(name, attn_implementation=implementation)
        trainer = make_trainer({"shift": "local", **config}, model=model, callbacks=[keep])
        perturb(trainer.model)
        trainer.train()
        return keep.gradients

    plain = gradients()
    if name in ("opt", "gpt_oss"):
        # Both make their masks without the positions.
        with pytest.raises(ValueError, match="padding_free: (OPT|GptOss)ForCausalLM gives .* leave it out"):
            gradients(padding_free=True)
        return
    for parameter, gradient in gradients(padding_free=True).items():
        torch.testing.assert_close(gradient, plain[parameter], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bloom", "lfm2"])
def test_rows_that_would_leak_into_one_another_are_refused(name, make_trainer):
    with pytest.raises(ValueError, match="padding_free: .* so rows would see one another; leave it out"):
        make_trainer({"padding_free": True, "reference_cache": "memory"}, model=tiny_model(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_hooks_are_gone_after_a_run_and_after_an_error(name):
    model = tiny_model(name).eval()
    blocks = find_blocks(model)

    def hooks():
        return [len(block._forward_hooks) for block in blocks]

    before = hooks()
    block_features(model, list(blocks), **tokens())
    assert hooks() == before

    def fail(module, args):
        raise RuntimeError("inside the block")

    blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside the block"):
        block_features(model, blocks[:3], **tokens())
    assert hooks() == before and len(blocks) == 4


def test_a_model_with_code_of_its_own(tmp_path):
    """`trust_remote_code` reaches its configuration and its tokenizer's, which are read before the model."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    file = tmp_path / "model" / "config.json"
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "own", "auto_map": auto}))
    args = RFAConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        report_to="none",
        use_cpu=True,
        model_init_kwargs={"trust_remote_code": True},
    )
    sets = {"forget_dataset": tiny_rows(4, first=0), "retain_dataset": tiny_rows(6, first=20)}
    trainer = RFATrainer(str(tmp_path / "model"), args, **sets)
    trainer.train()
    assert type(trainer.model.get_base_model()).__name__ == "OwnForCausalLM"


def test_features_are_found_under_accelerates_dispatch_hooks(tmp_path):
    model = tiny_llama().eval()
    blocks = list(find_blocks(model))
    plain = block_features(model, blocks, **tokens())
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"model.layers.3": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert blocks[1].mlp.up_proj.weight.device.type == "meta"
    for a, b in zip(block_features(model, blocks, **tokens()), plain, strict=True):
        torch.testing.assert_close(a, b)


@narrowable
def test_local_features_see_the_window_and_the_sinks_only(name, implementation, make_trainer):
    model = tiny_model(name, num_hidden_layers=1)
    model.set_attn_implementation(implementation)
    trainer = make_trainer(model=model)
    model, blocks = trainer.model, trainer._blocks()
    position = 9
    inputs = tokens(rows=1)

    def feature():
        return local_features(model, blocks, **inputs, window=3, sinks=2)[0][0, position]

    before = feature()
    for changed in range(12):
        original = inputs["input_ids"][0, changed].item()
        inputs["input_ids"][0, changed] = 3 + (original - 2) % 54
        moved = (feature() - before).abs().max().item()
        inputs["input_ids"][0, changed] = original
        if changed in (0, 1, 7, 8, 9):
            assert moved > 1e-4, changed
        else:
            assert moved < 1e-6, changed


@narrowable
def test_a_window_over_the_whole_row_is_the_reference(name, implementation, make_trainer):
    whole = {"sliding_window": 64} if "sliding_window" in ARCHITECTURES[name][2] else {}
    model = tiny_model(name, **whole)
    model.set_attn_implementation(implementation)
    trainer = make_trainer(model=model)
    inputs = tokens()
    inputs["attention_mask"][1, 8:] = 0  # right padding
    real = inputs["attention_mask"].bool()
    reference = reference_features(trainer.model, trainer._blocks(), **inputs)
    local = local_features(trainer.model, trainer._blocks(), **inputs, window=12, sinks=0)
    for a, b in zip(local, reference, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-5, atol=1e-5)


@narrowable
def test_smoothed_attention_is_the_models_own_at_temperature_1(name, implementation, make_trainer):
    model = tiny_model(name)
    model.set_attn_implementation(implementation)
    trainer = make_trainer(model=model)
    model, blocks = trainer.model, trainer._blocks()
    inputs = tokens()
    inputs["attention_mask"][1, 8:] = 0
    real = inputs["attention_mask"].bool()
    reference = reference_features(model, blocks, **inputs)
    for a, b in zip(smoothed_features(model, blocks, **inputs, temperature=1.0), reference, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)
    for a, b in zip(smoothed_features(model, blocks, **inputs, temperature=2.0), reference, strict=True):
        assert (a - b)[real].abs().max() > 1e-2
    with pytest.raises(RuntimeError, match="while smoothed"), smoothed_attention_on(model.get_base_model(), 2.0):
        raise RuntimeError("while smoothed")
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(a, b) for a, b in zip(reference_features(model, blocks, **inputs), reference, strict=True))


@pytest.mark.parametrize("shift", ["local", "smoothed"])
def test_attention_that_takes_no_mask_of_ours_is_refused(shift, make_trainer):
    with pytest.raises(
        ValueError, match=f"'{shift}' needs attention .* BloomForCausalLM .*use shift='mean', 'random'"
    ):
        make_trainer({"shift": shift}, model=tiny_model("bloom"))
    with pytest.raises(ValueError, match=f"'{shift}' changes attention alone, but Lfm2ForCausalLM has conv layers"):
        make_trainer({"shift": shift}, model=tiny_model("lfm2"))
    values = {**GQA, "num_key_value_heads": 1, "num_hidden_layers": 4, "lru_width": 32}
    recurrent = AutoModelForCausalLM.from_config(RecurrentGemmaConfig(**values))
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM has linear_attention layers"):
        make_trainer({"shift": shift}, model=recurrent)


def test_flash_attention_is_refused_for_local():
    model = tiny_llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' cannot take; load .*'sdpa'"):
        check_attention(model, "local")
    check_attention(model, "smoothed")


@every_architecture
@torch.no_grad()
def test_scores_and_answers_equal_a_loop_without_batches_and_cache(name, tokenizer):
    model = tiny_model(name, vocab_size=len(tokenizer)).eval()
    rows = list(tiny_rows(6, first=0))
    # Questions of several lengths, some with two answers.
    rows += [{**row, "question": f"w1 {row['question']} w2"} for row in rows[:2]]
    rows += [{**rows[0], "answer": "w3 w4"}]
    losses, answers = [], []
    for row in rows:
        encoded = encode(row, tokenizer)
        ids, start = encoded["input_ids"], encoded["answer_start"]
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:])).item())
        ids = ids[:start]
        while len(ids) < start + 6:
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        answers.append(tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
    assert answer_losses(model, tokenizer, rows, batch_size=4) == pytest.approx(losses, abs=1e-5)
    assert greedy_answers(model, tokenizer, rows, batch_size=4, max_new_tokens=6) == answers
