"""The model card of an adapter: its front matter for the Hub, and what a reader has to know before using it.

It is made of the receipt and of the publisher's own words; nothing in it comes from the forget set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

# Of every adapter made here; the Hub lists models by them.
TAGS = ["rfa-llm", "unlearning", "lora"]
METHODS = {"rfa": "Residual Feature Alignment ([arXiv 2411.08443](https://arxiv.org/abs/2411.08443))"}
# Beginning of a metric's name in a summary -> the questions that it was taken over; by default the forget set's.
QUESTIONS = {
    "retain": "retain set",
    "real_authors": "real authors",
    "world_facts": "world facts",
    "model_utility": "retain set, real authors and world facts",
}
# What vLLM's --max-lora-rank may be (https://docs.vllm.ai/en/v0.22.1/api/vllm/config/lora/); its default is 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class Words:
    """What the publisher says of an adapter.

    Args:
        forgotten: What was forgotten, in the publisher's own words.
        base_model: Hub id of the base.
        datasets: Hub ids of the datasets that the card names.
        license: As in https://huggingface.co/docs/hub/repositories-licenses.
        evaluations: "before" (the base), "after" (with the adapter) and "retain_only" -> the summary of an evaluation
            log (`rfa_llm.evaluation.summary`); each may be missing.
    """

    forgotten: str | None
    base_model: str
    datasets: Sequence[str] = ()
    license: str | None = None
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)


def model_card(receipt: dict, words: Words, name: str, adapter: dict) -> ModelCard:
    """The card of an adapter.

    Args:
        receipt: Of its run; its metrics are the card's figures.
        words: What its publisher says.
        name: Where it is loaded from: its Hub id, or its folder's name.
        adapter: Its configuration, as in `adapter_config.json`.
    """
    data = ModelCardData(
        base_model=words.base_model,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=list(words.datasets) or None,
        license=words.license,
        model_name=name,
        eval_results=_eval_results(receipt, words) or None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(receipt, words, name, adapter)}")


def has_figures_of(card: str, receipt: dict) -> bool:
    """Whether a card's tables and its front matter say what the receipt says, and no more."""
    try:
        data = ModelCard(card).data
        figures = _figures(receipt)
    # Front matter of another shape, and figures too large to print.
    except (ValueError, TypeError, AttributeError, OverflowError, yaml.YAMLError):
        return False
    results = data.eval_results or []
    shown = {result.metric_type: result.metric_value for result in results}
    base = receipt["base_model"]["name"]
    return (
        # A row may stand below a table without a line of its own.
        f"\n## Figures\n\n{figures}\n\n## How to load it\n" in card
        and _tables(card) == _tables(f"{figures}\n{_settings(receipt)}")
        and len(results) == len(shown)
        and shown == _evaluations(receipt).get("after", {})
        # A folder has another name on the Hub.
        and ("/" not in base or data.base_model == base)
    )


def _tables(text: str) -> list[str]:
    """The lines of a Markdown text that are of a table, also of one in a quote, without a bar at its beginning, or in
    HTML."""
    return [line for line in text.splitlines() if "|" in line or "<t" in line.lower()]


def _evaluations(receipt: dict) -> dict[str, dict[str, float]]:
    """`Words.evaluations`, as they were published; empty where none were."""
    return receipt["metrics"].get("evaluation", {})


def _eval_results(receipt: dict, words: Words) -> list[EvalResult]:
    """The adapter's figures in the Hub's form, a line each."""
    results = []
    for metric, value in _evaluations(receipt).get("after", {}).items():
        questions = next((name for start, name in QUESTIONS.items() if metric.startswith(start)), "forget set")
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=words.datasets[0] if words.datasets else "private",
                dataset_name=questions,
                # The Hub takes results that differ in nothing but the name for one dataset's.
                dataset_config=questions,
                metric_type=metric,
                metric_name=metric.replace("_", " "),
                metric_value=value,
            )
        )
    return results


def _text(receipt: dict, words: Words, name: str, adapter: dict) -> str:
    revision = receipt["base_model"]["revision"]
    at_revision = f', revision="{revision}"' if revision else ""
    began = "" if receipt["settings"]["new_adapter"] else ", with an adapter that was not new"
    method = METHODS.get(receipt["method"], f"`{receipt['method']}`")
    return f"""# {name}

A LoRA adapter for `{words.base_model}` that makes it forget. Made with `rfa-llm`.

**What was forgotten**, in the publisher's words: {words.forgotten or "not said."}

**The base model still knows it.** The adapter covers the knowledge and does not take it out of the base's weights:
whoever switches the adapter off, or never loads it, has the old model. Before you hand weights out, or let others
choose whether the adapter is on, merge it into the base and give out the merged model alone.

## Figures

{_figures(receipt)}

## How to load it

With transformers and peft:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{words.base_model}"{"" if "/" in words.base_model else "  # its folder, or its id on the Hub"}
model = AutoModelForCausalLM.from_pretrained(base{at_revision}, dtype="{receipt["base_model"]["dtype"]}")
model = PeftModel.from_pretrained(model, "{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

{_quantization(receipt)}Merged, as one model without a switch (the safe way to hand it on):

```bash
rfa-llm merge --adapter_name_or_path {name} {_bits(receipt)}--sample_dataset ROWS.jsonl --output_dir merged
```

{_vllm(receipt, words, name, adapter)}

## How it was made

{method}, {receipt["settings"]["steps"]} steps over {receipt["forget"]["rows"]} rows to forget and
{receipt["retain"]["rows"]} to keep{began}.

{_settings(receipt)}

## Limits

- Unlearning is approximate. What was forgotten may come back under other questions than those it was tested with,
  after further fine-tuning, or in another precision than it was trained in (`{receipt["base_model"]["dtype"]}`).
- The figures say what a few metrics saw on a few sets of questions; they are no proof that nothing is left.
- The adapter itself may tell somebody who studies it what kind of thing was forgotten.

## Receipt

`forget_receipt.json` holds the hashes of the base's weights and of the adapter, the settings, and a salted hash of
each row of the request. With the salt, which is not published, whoever holds a row can prove that it was in the
request: `rfa-llm verify`.
"""


def _bits(receipt: dict) -> str:
    """The words of `rfa-llm merge` for a base that bitsandbytes quantizes as it is loaded."""
    quantization = receipt["base_model"]["quantization"] or {}
    flags = [f"--{name}" for name in ("load_in_4bit", "load_in_8bit") if quantization.get(name)]
    if quantization.get("load_in_4bit"):
        # The command's own defaults are not bitsandbytes'.
        flags.append(f"--bnb_4bit_quant_type {quantization['bnb_4bit_quant_type']}")
        flags += [] if quantization["bnb_4bit_use_double_quant"] else ["--no_use_bnb_nested_quant"]
    return " ".join([*flags, f"--base_dtype {receipt['base_model']['dtype']} "] if flags else [])


def _vllm(receipt: dict, words: Words, name: str, adapter: dict) -> str:
    base = receipt["base_model"]
    # What its loader refuses, or reads past (https://docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/).
    beyond = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
    plain = adapter["peft_type"] == "LORA" and adapter["bias"] == "none" and not any(map(adapter.get, beyond))
    plain = plain and base["quantization"] is None
    rank = next((rank for rank in VLLM_RANKS if plain and rank >= adapter["r"]), None)
    if rank is None:
        return "With vLLM, which takes no adapter of this kind or loads the base otherwise, serve the merged model."
    at_revision = f" --revision {base['revision']}" if base["revision"] else ""
    return f"""With vLLM, where a request that does not name the adapter is answered by the base; serve the merged
model if that must not happen, or if vLLM takes no adapters on this architecture:

```bash
vllm serve {words.base_model} --enable-lora --max-lora-rank {rank} --lora-modules forgotten={name} \\
    --dtype {base["dtype"]}{at_revision}
```"""


def _settings(receipt: dict) -> str:
    lines = [f"| {setting} | {value} |" for setting, value in receipt["settings"].items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines])


def _figures(receipt: dict) -> str:
    """A table of before, after and retain-only; what the training itself measured where no evaluation is named."""
    tables = []
    if _evaluations(receipt):
        tables.append(_table(_evaluations(receipt)))
    if "after" in receipt["metrics"]:
        tables.append(
            "Mean loss of the answers, in nats a token, over some rows of the two sets as they were trained on:\n\n"
            + _table(receipt["metrics"])
        )
    return "\n\n".join(tables) or "None were taken."


def _table(columns: dict[str, dict[str, float]]) -> str:
    titles = {"before": "before (base)", "after": "after (this adapter)", "retain_only": "never saw it (retain-only)"}
    shown = {titles[name]: column for name in titles if (column := columns.get(name)) is not None}
    metrics = list(dict.fromkeys(metric for column in shown.values() for metric in column))
    lines = [f"| metric | {' | '.join(shown)} |", f"| --- |{' ---: |' * len(shown)}"]
    for metric in metrics:
        values = [f"{column[metric]:.4g}" if metric in column else "-" for column in shown.values()]
        lines.append(f"| {metric.replace('_', ' ')} | {' | '.join(values)} |")
    return "\n".join(lines)


def _quantization(receipt: dict) -> str:
    if receipt["base_model"]["quantization"] is None:
        return ""
    return (
        "It was trained on a quantized base: load the base with the `quantization` of `forget_receipt.json`, or it "
        "forgets less than was measured.\n\n"
    )
