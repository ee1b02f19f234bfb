"""`rfa-llm merge`: the merged weights and figures by hand, what is refused, and that refusing leaves nothing."""

import math
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import perturb, tiny_llama, tiny_lora, tiny_rows
from peft import PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from rfa_llm.blocks import num_blocks, placed
from rfa_llm.cli import evaluate, unlearn
from rfa_llm.cli import merge as merge_cli
from rfa_llm.cli.main import COMMANDS
from rfa_llm.cli.merge import MergeArguments, merge
from rfa_llm.data.formats import encode
from rfa_llm.evaluation import next_token_kl, next_token_logits, read_log, summary

SCALE = 2.0  # lora_alpha / r of tiny_lora

# What `MergeArguments` and `BitsAndBytesConfig` take.
PLAIN, FOUR_BITS, EIGHT_BITS = {}, {"load_in_4bit": True}, {"load_in_8bit": True}


def save_adapter(model_path: str, folder) -> str:
    """An adapter that moves every linear layer of the model's blocks."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    model = get_peft_model(model, placed(tiny_lora(), model, num_blocks(model.config) - 1))
    perturb(model)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def saved_llama(tmp_path, tokenizer) -> str:
    path = tmp_path / "model"
    tiny_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def adapter(saved_llama, tmp_path) -> str:
    return save_adapter(saved_llama, tmp_path / "adapter")


@pytest.fixture
def arguments(adapter, tmp_path):
    """Builds `MergeArguments` that merge the tiny adapter on the CPU, with what is given in addition."""
    sample = tmp_path / "sample.jsonl"
    tiny_rows(5, first=30).to_json(sample)
    given = {"adapter_name_or_path": adapter, "output_dir": str(tmp_path / "out" / "merged")}
    return lambda **more: MergeArguments(**{**given, "sample_dataset": str(sample), "use_cpu": True, **more})


def base_weight(module: torch.nn.Module) -> torch.Tensor:
    """A layer's weight, dequantized by hand where it is quantized, as float32."""
    if isinstance(module, Linear4bit):
        return dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    if isinstance(module, Linear8bitLt):
        return module.weight.data.float() * module.weight.SCB[:, None] / 127
    return module.weight.data.float()


def load_base(path: str, bits: dict):
    """The base in float32, or quantized from that."""
    double_nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**bits, **double_nf4) if bits else None
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)


def merged_by_hand(model, adapter: str) -> dict[str, torch.Tensor]:
    """`W + scale · B A` for every adapted layer of a loaded base, by name, as float32."""
    weights = load_file(f"{adapter}/adapter_model.safetensors")
    merged = {}
    for name, module in model.named_modules():
        a = weights.get(f"base_model.model.{name}.lora_A.weight")
        if a is not None:
            merged[f"{name}.weight"] = (
                base_weight(module) + SCALE * weights[f"base_model.model.{name}.lora_B.weight"] @ a
            )
    return merged


@pytest.mark.parametrize("bits", [PLAIN, FOUR_BITS, EIGHT_BITS])
def test_merged_weights_and_logits_are_those_of_the_adapter_on_the_dequantized_base(
    bits, arguments, adapter, saved_llama
):
    args = arguments(**bits, base_dtype="float32", dtype="float32")
    figures = merge(args)

    expected = merged_by_hand(load_base(saved_llama, bits), adapter)
    assert len(expected) == 14
    saved = load_file(f"{args.output_dir}/model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=1e-5, atol=1e-6)

    by_hand = AutoModelForCausalLM.from_pretrained(saved_llama)
    by_hand.load_state_dict(expected, strict=False)
    merged = AutoModelForCausalLM.from_pretrained(args.output_dir)
    assert "quantization_config" not in merged.config.to_dict()
    ids = torch.arange(3, 23)[None]
    torch.testing.assert_close(merged(ids).logits, by_hand(ids).logits, rtol=1e-4, atol=1e-4)
    if bits == EIGHT_BITS:
        # LLM.int8() also rounds activations, which no merged model does.
        assert 0 < figures["kl_mean"] < 0.01
    else:
        assert figures["kl_largest"] < 1e-6


@pytest.mark.parametrize("bits", [PLAIN, FOUR_BITS])
def test_the_sum_is_rounded_once_to_the_asked_dtype(bits, arguments, adapter, saved_llama):
    args = arguments(**bits, base_dtype="float32", dtype="bfloat16")
    merge(args)
    saved = load_file(f"{args.output_dir}/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(args.output_dir).dtype == torch.bfloat16
    for name, weight in merged_by_hand(load_base(saved_llama, bits), adapter).items():
        # Another order of summation may tip a number that lies halfway.
        assert (saved[name] != weight.bfloat16()).float().mean() < 0.001


@pytest.mark.parametrize(("bits", "expected"), [(PLAIN, torch.float32), (FOUR_BITS, torch.bfloat16)])
def test_auto_keeps_the_dtype_of_the_base(bits, expected, arguments):
    args = arguments(**bits)
    merge(args)
    assert AutoModelForCausalLM.from_pretrained(args.output_dir).dtype == expected


def test_the_figures_compare_the_saved_model_with_the_adapter(arguments, adapter, saved_llama, tokenizer):
    args = arguments(dtype="bfloat16", sample_rows=3)
    figures = merge(args)
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_llama), adapter)
    merged = AutoModelForCausalLM.from_pretrained(args.output_dir)
    divergences = []
    for row in tiny_rows(3, first=30):
        ids = torch.tensor([encode(row, tokenizer)["input_ids"]])
        with torch.no_grad():
            p, q = (model(ids).logits[0].double().softmax(-1) for model in (with_adapter, merged))
        divergences += (p * (p / q).log()).sum(-1).tolist()
    assert figures["positions"] == len(divergences)
    assert figures["kl_mean"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert figures["kl_largest"] == pytest.approx(max(divergences), rel=1e-3)
    assert figures["kl_mean"] > 0


def test_layers_that_keep_their_weights_the_other_way_round(arguments, tmp_path, tokenizer):
    """GPT-2's Conv1D, which quantizing turns into linear layers; its square ones would pass unnoticed."""
    path = str(tmp_path / "gpt2")
    sizes = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    gpt2_adapter = save_adapter(path, tmp_path / "gpt2_adapter")
    figures = merge(arguments(adapter_name_or_path=gpt2_adapter, load_in_4bit=True, base_dtype="float32"))
    assert figures["kl_largest"] < 1e-6


def test_above_the_threshold_nothing_is_left(arguments, tmp_path):
    args = arguments(dtype="bfloat16", max_kl=1e-9)
    with pytest.raises(ValueError, match=r"^max_kl: the merged model's next token is .* above 1e-09, so it was not"):
        merge(args)
    assert list((tmp_path / "out").iterdir()) == []
    assert merge(arguments(dtype="bfloat16", max_kl=1e-9, save_anyway=True))["kl_mean"] > 1e-9
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["merged"]


def test_an_adapter_that_is_not_a_number_is_refused(arguments, saved_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_llama)
    model = get_peft_model(model, tiny_lora(target_modules=["v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="^max_kl: the merged model's next token is nan nats"):
        merge(arguments(adapter_name_or_path=str(tmp_path / "broken")))


def test_a_folder_with_something_in_it_is_left_alone(arguments, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="^output_dir: .*full' is there already; choose a new or an empty folder"):
        merge(arguments(output_dir=str(full)))
    assert [file.name for file in full.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled_with_a_whole_model(arguments, tmp_path, tokenizer):
    folder = tmp_path / "empty"
    folder.mkdir()
    merge(arguments(output_dir=str(folder)))
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.startswith("adapter") for name in names)
    assert AutoTokenizer.from_pretrained(folder)("w1 w2").input_ids == tokenizer("w1 w2").input_ids


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"adapter_name_or_path": None}, "^adapter_name_or_path: no adapter is given; pass its folder"),
        ({"adapter_name_or_path": "nowhere"}, "^adapter_name_or_path: 'nowhere' is no adapter .*pass the folder"),
        ({"output_dir": None}, "^output_dir: no folder is given"),
        ({"sample_dataset": None}, "^sample_dataset is None; give"),
        ({"sample_dataset": "nowhere.jsonl"}, "^sample_dataset is 'nowhere.jsonl', but there is no such file"),
        ({"sample_rows": 0}, "^sample_rows: 0 leaves no text"),
        ({"max_length": 0}, "^max_length: 0 leaves no text"),
        ({"max_kl": 0.0}, "^max_kl: 0.0 is not positive; .*save_anyway"),
        ({"max_kl": math.nan}, "^max_kl: nan is not positive"),
        ({"dtype": "int8"}, "^dtype: 'int8' is not known; use one of auto, bfloat16, float16, float32"),
        ({"base_dtype": "half"}, "^base_dtype: 'half' is not known; use one of auto"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "^load_in_4bit, load_in_8bit: both are set"),
    ],
)
def test_bad_input_is_named(words, sentence, arguments, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        merge(arguments(**words))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_does_not_name_its_base_is_told_so(arguments, adapter):
    config = PeftConfig.from_pretrained(adapter)
    config.base_model_name_or_path = None
    config.save_pretrained(adapter)
    with pytest.raises(ValueError, match="^model_name_or_path: the adapter .* does not name its base; pass the id"):
        merge(arguments())


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ({"hidden_size": 32}, r"does not fit .*\(size mismatch for .*\); pass the model that it was trained on"),
        ({"num_hidden_layers": 1}, r"does not fit .*\(14 weights too many, 0 too few\); pass the model that"),
        ({"num_hidden_layers": 3}, r"does not fit .*\(0 weights too many, 14 too few\); pass the model that"),
    ],
)
def test_an_adapter_of_a_base_of_another_shape(base, sentence, arguments, adapter, tmp_path, tokenizer):
    """peft itself would take what fits, and merged and unmerged would agree."""
    config = PeftConfig.from_pretrained(adapter)
    config.layers_to_transform = config.layers_pattern = None
    config.save_pretrained(adapter)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    tiny_llama(**{**sizes, **base}).save_pretrained(tmp_path / "another")
    tokenizer.save_pretrained(tmp_path / "another")
    with pytest.raises(ValueError, match=f"^model_name_or_path: the adapter {adapter!r} {sentence}"):
        merge(arguments(model_name_or_path=str(tmp_path / "another")))
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_an_adapter(arguments, adapter):
    with pytest.raises(ValueError, match=f"^model_name_or_path: {adapter!r} is an adapter itself; pass the model"):
        merge(arguments(model_name_or_path=adapter))


def test_a_base_that_has_moved(arguments, saved_llama):
    Path(saved_llama).rename(f"{saved_llama}-moved")
    with pytest.raises(
        ValueError, match=f"^model_name_or_path: no tokenizer can be loaded from .*{saved_llama}'.*path"
    ):
        merge(arguments())
    merge(arguments(model_name_or_path=f"{saved_llama}-moved"))


def test_a_link_is_no_place_for_a_model(arguments, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ValueError, match="^output_dir: '.*link' is a link or a mount point.*choose a folder below it"):
        merge(arguments(output_dir=str(tmp_path / "link")))


def test_weights_that_are_cut_short(arguments, adapter):
    weights = Path(adapter) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="^adapter_name_or_path: '.*adapter' is no adapter .*pass the folder"):
        merge(arguments())


def test_an_adapter_that_is_no_sum_of_weights(arguments, saved_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_llama)
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "prompt"
    )
    with pytest.raises(
        ValueError, match="^adapter_name_or_path: .* is of the type PROMPT_TUNING.*pass a LoRA adapter"
    ):
        merge(arguments(adapter_name_or_path=str(tmp_path / "prompt")))


def test_the_base_is_the_revision_that_the_adapter_was_trained_on(
    arguments, saved_llama, tmp_path, tokenizer, monkeypatch
):
    """A Hub cache of two revisions, of which `main` has one block more and would be refused, and of another
    repository, which has no such revision."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for model, name, commit, layers in (
        ("tiny", "main", "a" * 40, 3),
        ("tiny", "old", "b" * 40, 2),
        ("moved", "main", "b" * 40, 2),
    ):
        repo = tmp_path / "hub" / f"models--us--{model}"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / name).write_text(commit)
        tiny_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=layers).save_pretrained(
            repo / "snapshots" / commit
        )
        tokenizer.save_pretrained(repo / "snapshots" / commit)
    tiny_rows(6, first=0).to_json(tmp_path / "forget.jsonl")
    tiny_rows(6, first=20).to_json(tmp_path / "retain.jsonl")
    unlearn.main(
        ["--model_name_or_path", "us/tiny", "--model_revision", "old", "--output_dir", str(tmp_path / "unlearned")]
        + ["--forget_dataset", str(tmp_path / "forget.jsonl"), "--retain_dataset", str(tmp_path / "retain.jsonl")]
        + ["--max_steps", "2", "--use_cpu", "--report_to", "none", "--lora_r", "4", "--save_strategy", "no"]
    )
    unlearned = str(tmp_path / "unlearned")
    for name, base in (("its own", None), ("given", "us/moved")):
        args = arguments(adapter_name_or_path=unlearned, model_name_or_path=base, output_dir=str(tmp_path / name))
        merge(args)
        assert AutoModelForCausalLM.from_pretrained(args.output_dir).config.num_hidden_layers == 2
    # The base's name alone is `main`, with the adapter it is the adapter's.
    merge(arguments(adapter_name_or_path=unlearned, model_name_or_path="us/tiny", output_dir=str(tmp_path / "named")))
    questions = tiny_rows(2, first=0).map(lambda row: {"paraphrased_answer": "w1", "perturbed_answer": ["w2"]})
    for name in ("forget10", "retain", "real_authors", "world_facts"):
        questions.to_json(tmp_path / f"{name}_perturbed.jsonl")
    figures = []
    for model, more in (
        (str(tmp_path / "named"), []),
        ("us/tiny", ["--adapter_name_or_path", unlearned]),
        ("us/tiny", ["--model_revision", "main"]),
    ):
        words = ["--model_name_or_path", model, *more, "--use_cpu", "--data_dir", str(tmp_path)]
        log = tmp_path / f"log-{len(figures)}.json"
        evaluate.main([*words, "--max_new_tokens", "2", "--output_file", str(log)])
        figures.append(summary(read_log(log))["forget_truth_ratio"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5) and figures[0] != pytest.approx(figures[2], rel=1e-3)


def test_the_command_prints_the_figures(arguments, adapter, capsys):
    args = arguments()
    assert "merge" in COMMANDS
    merge_cli.main(
        ["--adapter_name_or_path", adapter, "--output_dir", args.output_dir, "--use_cpu"]
        + ["--sample_dataset", args.sample_dataset, "--dtype", "bfloat16"]
    )
    printed = capsys.readouterr().out
    assert "KL(adapter ‖ merged)" in printed and "mean" in printed and "largest" in printed
    assert args.output_dir in printed


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log(), torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)]
    # Logits are free up to a constant, and KL has a direction.
    assert next_token_kl(p + 3, q).tolist() == pytest.approx(expected, rel=1e-6)
    backwards = [0.25 * math.log(0.5) + 0.75 * math.log(1.5), math.inf]
    assert next_token_kl(q, p).tolist() == pytest.approx(backwards, rel=1e-6)


def test_kl_of_a_model_with_itself_and_with_a_broken_one():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert next_token_kl(logits, logits).abs().max() < 1e-15
    assert next_token_kl(logits, torch.full_like(logits, math.nan)).isnan().all()
    with pytest.raises(ValueError, match=r"^logits, other_logits: \[4, 7\] and \[3, 7\] differ"):
        next_token_kl(logits, logits[:3])


def test_next_token_logits_are_the_models_own():
    model = tiny_llama(attention_dropout=0.5).train()
    sequences = [[3, 4, 5], [6, 7, 8, 9, 10]]
    logits = list(next_token_logits(model, sequences))
    assert model.training
    model.eval()
    for ids, got in zip(sequences, logits, strict=True):
        torch.testing.assert_close(got, model(torch.tensor([ids])).logits[0])
