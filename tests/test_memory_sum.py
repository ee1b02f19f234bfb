"""The memory sum of benchmarks/memory.py: counted a second time on real models and by hand."""

import json

import gpu
import memory
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from rfa_llm.blocks import find_blocks, lora_placement
from rfa_llm.residuals import block_features

CPU = torch.device("cpu")
LAYERS, ROWS, TOKENS, RANK = 6, 2, 128, 8


def small_config() -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": LAYERS, "vocab_size": 256}
    return LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1)


def saved_bytes(model: torch.nn.Module, mixed_precision: str) -> int:
    """Bytes that a forward keeps for the backward pass besides parameters and buffers, each storage once."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = tensor  # kept alive, so that no other storage gets its address
        return tensor

    inputs = {"input_ids": torch.randint(2, 250, (ROWS, TOKENS)), "attention_mask": torch.ones(ROWS, TOKENS)}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = block_features(model, find_blocks(model.get_base_model())[-1:], **inputs)
    assert features[0].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    return get_peft_model(model, LoraConfig(r=RANK, **lora_placement(model, LAYERS - 1))).train()


# Known from the models' cards; LoRA of rank 32 by hand: 32 (in + out) for the seven layers, times the blocks.
@pytest.mark.parametrize(
    ("shape", "total", "adapter"),
    [
        ("smollm2-135m", 134_515_008, 32 * (2 * 1152 + 2 * 768 + 3 * 2112) * 30),
        ("llama-3.2-1b", 1_235_814_400, 32 * (2 * 4096 + 2 * 2560 + 3 * 10240) * 16),
        ("llama-3.1-8b", 8_030_261_248, 32 * (2 * 8192 + 2 * 5120 + 3 * 18432) * 32),
    ],
)
def test_parameters_of_known_models(shape, total, adapter):
    config = memory.shape_config(shape)
    count = memory.count_parameters(config)
    assert count["total"] == total
    assert count["adapter"] == adapter
    assert count["root"] + config.num_hidden_layers * count["block"] == total
    # In a block, only the two norms are not linear layers.
    assert count["linear"] == config.num_hidden_layers * (count["block"] - 2 * config.hidden_size)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
def test_activations_are_what_autograd_keeps(quantization, mixed_precision):
    config = small_config()
    model = with_lora(gpu.build_model(config, quantization, CPU))
    kept = saved_bytes(model, mixed_precision)
    if mixed_precision == "bf16":
        kept -= 2 * memory.count_parameters(config, RANK)["adapter"]  # autocast's copy, counted with the adapter
    per_token = memory.kept_bytes(config, RANK, adapter_bytes=2 if mixed_precision == "bf16" else 4)
    # The rest is the rotary embedding's sines, which all rows and blocks share.
    assert kept == pytest.approx(LAYERS * ROWS * TOKENS * per_token, rel=0.003)


def test_checkpointing_keeps_each_blocks_input():
    config = small_config()
    model = with_lora(gpu.build_model(config, "none", CPU))
    model.get_base_model().activation_checkpointing_enable()
    model.get_base_model().enable_input_require_grads()
    h, tokens = config.hidden_size, ROWS * TOKENS
    # Behind the blocks the last norm keeps its input in float32, and its inverse norm.
    assert saved_bytes(model, "no") == tokens * (LAYERS * 2 * h + 4 * h + 4)

    count = memory.count_parameters(config, RANK)
    kept = memory.kept_bytes(config, RANK, adapter_bytes=2)
    sums = memory.memory_sum(config, count, "none", ROWS // 2, TOKENS, True, RANK)
    assert sums["activations"] == tokens * (LAYERS * 2 * h + kept)


def test_nf4_bits_are_those_of_bitsandbytes():
    # 2^22 weights fill every level of the double quantization.
    config = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=1, vocab_size=64, pad_token_id=0)
    weight = gpu.build_model(config, "nf4", CPU).model.layers[0].mlp.up_proj.weight
    state = weight.quant_state
    stored = weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert 8 * stored / (1024 * 4096) == memory.NF4_BITS


def test_sum_of_a_tiny_model_by_hand():
    config = small_config()
    # A block: q and o 64 x 64, k and v 32 x 64, three of 160 x 64, two norms. LoRA of rank 8 on all seven.
    linear, norms, adapter = 2 * 4096 + 2 * 2048 + 3 * 10240, 128, 8 * (2 * 128 + 2 * 96 + 3 * 224)
    count = memory.count_parameters(config, RANK)
    assert count == {
        "linear": 6 * linear,
        "block": linear + norms,
        "root": 2 * 256 * 64 + 64,
        "total": 6 * (linear + norms) + 2 * 256 * 64 + 64,
        "adapter": 6 * adapter,
    }
    bf16 = memory.memory_sum(config, count, "none", 3, 10, False, RANK)
    # Blocks 2, 3, 4 and 5 are aligned; 60 tokens, 30 of them the forget rows'.
    assert bf16["base"] == 2 * count["total"]
    assert bf16["adapter"] == (4 + 4 + 4 + 2) * 6 * adapter
    assert bf16["optimizer"] == 8 * 6 * adapter
    assert bf16["features"] == 4 * 64 * (12 * 60 + 4 * 30)
    assert bf16["workspace"] == 6 * 160 * 60

    nf4 = memory.memory_sum(config, count, "nf4", 3, 10, False, RANK)
    assert nf4["base"] == pytest.approx(6 * linear * 4.127 / 8 + 2 * (count["total"] - 6 * linear), rel=1e-4)
    assert nf4["workspace"] == bf16["workspace"] + 2 * 64 * 160
    assert nf4["activations"] == bf16["activations"]


def test_sum_on_several_gpus_by_hand():
    count = {"adapter": 10, "root": 1000, "block": 100}
    parts = {"base": 6000.0, "adapter": 140.0, "optimizer": 80.0, "activations": 500.0}
    assert memory.per_gpu(count, parts, "ddp", 4) == 6720 + 40
    assert memory.per_gpu(count, parts, "zero2", 4) == 6720 - 0.75 * (80 + 40)
    assert memory.per_gpu(count, parts, "fsdp2", 4) == (6000 + 140 + 80) / 4 + 500 + 2 * (1000 + 2 * 100)
    assert memory.per_gpu(count, parts, "zero3", 4) == memory.per_gpu(count, parts, "fsdp2", 4)


def test_committed_result_is_what_the_functions_say():
    result = json.loads((memory.RESULTS / "memory.json").read_text())
    assert (memory.RESULTS / "memory.md").read_text() == memory.report(result)
    page = (memory.RESULTS.parent.parent / "docs" / "multi-gpu.md").read_text()
    assert all(line in page for line in memory.report(result).splitlines() if line.startswith("|"))
    entry = next(e for e in result["sums"] if e["shape"] == "llama-3.2-1b" and e["quantization"] == "nf4")
    config = memory.shape_config("llama-3.2-1b")
    count = memory.count_parameters(config)
    parts = memory.memory_sum(config, count, "nf4", result["rows"], result["tokens"], entry["gradient_checkpointing"])
    assert entry["parts"] == parts
    assert entry["per_gpu"]["ddp"]["2"] == memory.per_gpu(count, parts, "ddp", 2)
