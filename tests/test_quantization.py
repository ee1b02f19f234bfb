"""A base in 4 or 8 bits: what the flags give, that training and scoring leave its bytes alone, its reference."""

import hashlib

import pytest
import torch
from conftest import perturb, tiny_llama
from transformers import AutoModelForCausalLM
from trl import TrlParser, get_quantization_config

from rfa_llm import RFAConfig
from rfa_llm.blocks import find_blocks
from rfa_llm.cli.unlearn import UnlearnArguments, UnlearnModelConfig
from rfa_llm.evaluation import answer_losses
from rfa_llm.reference import reference_features
from rfa_llm.residuals import block_features


def parse(*words: str) -> UnlearnModelConfig:
    parser = TrlParser((UnlearnArguments, RFAConfig, UnlearnModelConfig))
    return parser.parse_args_and_config(["--output_dir", "x", *words])[2]


@pytest.fixture
def saved_wide_llama(tmp_path, tokenizer) -> str:
    """Wide enough for every kernel of bitsandbytes: scales stand for 64 weights, some kernels take 32 rows."""
    path = tmp_path / "wide"
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def load(path: str, *words: str):
    config = parse(*words)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=config.dtype, quantization_config=get_quantization_config(config)
    )


def base_hashes(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of each tensor of the base, the parts of quantized weights among them."""
    return {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): hashlib.sha256(
            tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


def test_four_bits_are_double_quantized_nf4_in_bfloat16():
    args = parse("--load_in_4bit")
    config = get_quantization_config(args)
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert args.dtype == "bfloat16"


def test_what_is_said_of_four_bits_wins_over_the_defaults():
    args = parse("--load_in_4bit", "--bnb_4bit_quant_type", "fp4", "--no_use_bnb_nested_quant", "--dtype", "float16")
    config = get_quantization_config(args)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("fp4", False)
    assert config.bnb_4bit_compute_dtype == torch.float16


def test_eight_bits_and_none():
    args = parse("--load_in_8bit")
    config = get_quantization_config(args)
    assert (config.load_in_4bit, config.load_in_8bit) == (False, True)
    assert args.dtype == "auto"
    assert get_quantization_config(parse()) is None


@pytest.mark.parametrize(("flag", "shift"), [("--load_in_4bit", "local"), ("--load_in_8bit", "mean")])
def test_training_moves_the_adapter_and_no_byte_of_the_base(flag, shift, saved_wide_llama, make_trainer):
    before = base_hashes(load(saved_wide_llama, flag))
    parts = ["absmax", "nested_absmax", "quant_state.bitsandbytes__nf4"] if flag == "--load_in_4bit" else ["SCB"]
    for part in parts:
        assert any(name.endswith(f"weight.{part}") or name.endswith(f".{part}") for name in before)

    config = parse(flag)
    trainer = make_trainer(
        {"shift": shift, "model_init_kwargs": {"dtype": config.dtype}},
        model=saved_wide_llama,
        quantization_config=get_quantization_config(config),
    )
    trainer.train()
    assert base_hashes(trainer.model) == before
    moved = [p.detach().abs().max() for name, p in trainer.model.named_parameters() if "lora_B" in name]
    # Every linear layer of the four blocks.
    assert len(moved) == 28 and min(moved) > 0


def test_four_bit_training_is_training_on_the_dequantized_base(saved_wide_llama, make_trainer):
    words = ("--load_in_4bit", "--dtype", "float32")
    quantized = make_trainer(
        {"model_init_kwargs": {"dtype": "float32"}},
        model=saved_wide_llama,
        quantization_config=get_quantization_config(parse(*words)),
    )
    dequantized = make_trainer(model=load(saved_wide_llama, *words).dequantize())
    adapters = []
    for trainer in (quantized, dequantized):
        trainer.train()
        adapters.append({name: p.detach() for name, p in trainer.model.named_parameters() if "lora_B" in name})
    for name, parameter in adapters[0].items():
        # Adam divides gradients by their size, so the smallest ones' rounding errors count.
        difference = (parameter - adapters[1][name]).norm() / parameter.norm()
        assert difference < 1e-3, f"{name}: {difference}"


def test_the_reference_is_the_quantized_base(saved_wide_llama, make_trainer):
    """Adapter-off features are those of the same base loaded alone, to the bit, and not those of the wide weights."""
    config = parse("--load_in_4bit")
    trainer = make_trainer(
        {"model_init_kwargs": {"dtype": "bfloat16"}},
        model=saved_wide_llama,
        quantization_config=get_quantization_config(config),
    )
    perturb(trainer.model)
    tokens = {"input_ids": torch.arange(3, 19).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    alone = load(saved_wide_llama, "--load_in_4bit").train()
    wide = AutoModelForCausalLM.from_pretrained(saved_wide_llama, dtype=torch.bfloat16)
    trainer.model.train()
    off = reference_features(trainer.model, trainer._blocks(), **tokens)
    with torch.no_grad():
        on = block_features(trainer.model, trainer._blocks(), **tokens)
        expected, unquantized = (
            block_features(model, [find_blocks(model)[i] for i in trainer.aligned], **tokens)
            for model in (alone, wide)
        )
    for h0, h, quantized, full in zip(off, on, expected, unquantized, strict=True):
        assert torch.equal(h0, quantized)
        assert not torch.equal(h, h0) and not torch.equal(full, h0)


def test_scoring_leaves_four_bit_weights_alone(saved_wide_llama, tokenizer, forget):
    """On CPUs with AVX512-BF16, bitsandbytes would pack them anew in evaluation mode, with coarser scales."""
    model = load(saved_wide_llama, "--load_in_4bit")
    before = base_hashes(model)
    losses = answer_losses(model, tokenizer, list(forget))
    assert base_hashes(model) == before
    assert not any(module.training for module in model.modules())
    dequantized = model.dequantize()
    assert losses == pytest.approx(answer_losses(dequantized, tokenizer, list(forget)), rel=1e-5)
