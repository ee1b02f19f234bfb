"""A saved adapter in the programs that serve and score models: transformers' pipeline, lm-eval, and vLLM's form."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_llama, tiny_rows, tiny_tokenizer
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from test_architectures import tiny_model
from transformers import AutoModelForCausalLM, pipeline

from rfa_llm import RFAConfig, RFATrainer
from rfa_llm.card import VLLM_RANKS
from rfa_llm.data.formats import PLAIN_TEMPLATE, encode
from rfa_llm.evaluation import answer_losses

FORGET = tiny_rows(6, first=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    """A folder with a base, and an adapter that was trained on it long enough to speak otherwise."""
    folder = tmp_path_factory.mktemp("served")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    args = RFAConfig(
        output_dir=str(folder / "adapter"),
        shift="negate",
        max_steps=20,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
    )
    sets = {"forget_dataset": FORGET, "retain_dataset": tiny_rows(10, first=20)}
    trainer = RFATrainer(str(folder / "base"), args, **sets)
    trainer.train()
    trainer.save_model()
    return folder


def on_base(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")


def greedy(model, question: str) -> str:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(PLAIN_TEMPLATE.format(question=question), return_tensors="pt").input_ids
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("given", ["PeftModel", "folder"])
def test_a_pipeline_says_what_the_adapter_says(given, served):
    model = on_base(served)
    expected = [greedy(model, row["question"]) for row in FORGET]
    with model.disable_adapter():
        base = [greedy(model, row["question"]) for row in FORGET]
    assert all(said for said in expected) and sum(a != b for a, b in zip(expected, base, strict=True)) >= 4

    # The tokenizer lies beside a saved adapter.
    tokenizer = {"tokenizer": tiny_tokenizer()} if given == "PeftModel" else {}
    pipe = pipeline(
        "text-generation", model=model if given == "PeftModel" else str(served / "adapter"), device="cpu", **tokenizer
    )
    prompts = [PLAIN_TEMPLATE.format(question=row["question"]) for row in FORGET]
    said = [pipe(prompt, max_new_tokens=12, do_sample=False, return_full_text=False) for prompt in prompts]
    assert [one[0]["generated_text"] for one in said] == expected


def lm_eval_likelihoods(folder: Path, model_args: str, rows: Dataset) -> list[float]:
    """Log-likelihood of each row's answer by lm-eval, on a task of our own that it reads from a YAML file."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder.mkdir()
    rows.to_json(folder / "rows.json")
    task = {
        "task": "forget_answers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}</s>",
        "target_delimiter": " ",
        "metric_list": [{"metric": "perplexity"}],
    }
    (folder / "forget_answers.yaml").write_text(yaml.safe_dump(task))
    results = simple_evaluate(
        model="hf",
        model_args=model_args,
        tasks=["forget_answers"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["forget_answers"], key=lambda sample: sample["doc_id"])
    return [float(sample["resps"][0][0][0]) for sample in samples]


def test_lm_eval_finds_the_likelihoods_that_our_own_scores_say(served, tmp_path):
    tokenizer = tiny_tokenizer()
    encoded = [encode(row, tokenizer) for row in FORGET]
    tokens = [len(row["input_ids"]) - row["answer_start"] for row in encoded]

    def ours(model) -> list[float]:
        losses = answer_losses(model, tokenizer, list(FORGET))
        return [-loss * number for loss, number in zip(losses, tokens, strict=True)]

    model = on_base(served)
    base = f"pretrained={served / 'base'},dtype=float32"
    on = lm_eval_likelihoods(tmp_path / "on", f"{base},peft={served / 'adapter'}", FORGET)
    assert on == pytest.approx(ours(model), abs=1e-4)
    off = lm_eval_likelihoods(tmp_path / "off", base, FORGET)
    with model.disable_adapter():
        assert off == pytest.approx(ours(model), abs=1e-4)
    assert all(abs(a - b) > 1e-3 for a, b in zip(on, off, strict=True))


# What vLLM's loader accepts, as docs/serving.md tells it with its sources. The layers are those that vLLM knows by
# these names, whether or not it packs some of them into one; gpt2 is checked for its form alone.
LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
VLLM_LAYERS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma2"], LLAMA_LAYERS),
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}
VLLM_CONFIG = {
    "a LoRA": lambda config: config["peft_type"] == "LORA",
    "a rank that --max-lora-rank can allow": lambda config: 0 < config["r"] <= max(VLLM_RANKS),
    "an alpha": lambda config: config["lora_alpha"] > 0,
    "target modules": lambda config: bool(config["target_modules"]),
    "no bias": lambda config: config["bias"] == "none",
    "no module saved whole": lambda config: config["modules_to_save"] is None,
    "no DoRA": lambda config: config["use_dora"] is False,
    "one rank and alpha": lambda config: not config["rank_pattern"] and not config["alpha_pattern"],
}


@pytest.mark.parametrize("architecture", VLLM_LAYERS)
def test_the_default_adapter_is_of_the_form_that_vllm_loads(architecture, make_trainer, tmp_path):
    model = make_trainer(model=tiny_model(architecture)).model
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert [condition for condition, holds in VLLM_CONFIG.items() if not holds(config)] == []

    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    base = tiny_model(architecture)
    halves = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert found, name
        assert found[1].rpartition(".")[2] in VLLM_LAYERS[architecture], name
        # The module is one of the base, so that vLLM's of the same name is found.
        base.get_submodule(found[1])
        halves.setdefault(found[1], {})[found[2]] = tensor.shape
    assert all(shape["A"][0] == shape["B"][1] == config["r"] for shape in halves.values())
    # Nothing of the adapter is left out of the file.
    assert len(halves) == sum(isinstance(module, LoraLayer) for module in model.modules())
