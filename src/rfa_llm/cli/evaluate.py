"""`rfa-llm evaluate`: TOFU's metrics of a model, with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from rfa_llm.adapters import base_revision, on_its_base, read_adapter
from rfa_llm.blocks import read_config
from rfa_llm.cli.settings import DTYPES, read_settings
from rfa_llm.data.formats import load_rows
from rfa_llm.data.tofu import load_question_sets
from rfa_llm.evaluation import evaluate_tofu, summary, write_log
from rfa_llm.evaluation.suite import check_questions, check_sizes


@dataclass
class EvaluateArguments:
    """What to score, and on which questions."""

    model_name_or_path: str = field(default=None, metadata={"help": "The model: an id or a path. Required."})
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the model. Default: the adapter's, where it names this model."},
    )
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "An adapter to put on it."})
    output_file: str = field(default="TOFU_EVAL.json", metadata={"help": "Where the log goes, as JSON."})
    retain_log: str | None = field(
        default=None,
        metadata={"help": "Log of a model trained on the retain set alone; without it there is no forget quality."},
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with TOFU as JSON Lines; by default locuslab/TOFU from the Hub."}
    )
    facts_dir: str | None = field(
        default=None, metadata={"help": "Folder of real authors and world facts, where it is not data_dir."}
    )
    forget_config: str = field(
        default="forget10_perturbed",
        metadata={
            "help": "The forget set's questions, with paraphrased and wrong answers: a configuration of TOFU, or the "
            "name of a .jsonl file in data_dir."
        },
    )
    retain_config: str = field(default="retain_perturbed", metadata={"help": "The retain set's, likewise."})
    holdout_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Questions and answers of the forget set's kind that the model never saw, for the membership "
            "attacks: a .jsonl, .json, .csv or .parquet file, or a Hub id."
        },
    )
    holdout_config: str | None = field(default=None, metadata={"help": "Configuration of its Hub dataset."})
    gradient_norm: bool = field(
        default=False, metadata={"help": "Run the gradient-norm attack too, with a backward pass for each row."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the model.", "choices": DTYPES},
    )
    batch_size: int = field(default=16, metadata={"help": "Sequences at a time."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest greedy answer, in tokens."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})


def summary_table(logs: dict[str, dict]) -> str:
    """The aggregate numbers of several logs side by side, one column each, as text."""
    table = pd.DataFrame({name: summary(log) for name, log in logs.items()})
    return table.to_string(float_format="%.4g", na_rep="-")


def score(args: EvaluateArguments) -> dict:
    """Score the model and write the log to `args.output_file`.

    Raises:
        ValueError: A setting, a set or a log is not what `evaluate_tofu` takes, before the model is loaded; or the
            adapter does not fit the model.
    """
    if args.model_name_or_path is None:
        raise ValueError("model_name_or_path: no model is given; pass an id or a path.")
    if Path(args.output_file).exists():
        raise ValueError(f"output_file: {args.output_file!r} is there already; give another name, or delete it.")
    check_sizes(args.batch_size, args.max_new_tokens)
    source = {} if args.model_revision is None else {"revision": args.model_revision}
    if args.adapter_name_or_path is not None:
        adapter = read_adapter(args.adapter_name_or_path)
        source = base_revision(adapter.revision, adapter.base_model_name_or_path, args.model_name_or_path) | source
    sets = load_question_sets(args.data_dir, args.facts_dir, args.forget_config, args.retain_config)
    if args.holdout_dataset is not None:
        sets["holdout"] = load_rows(args.holdout_dataset, "holdout_dataset", args.holdout_config)
    retain_log = check_questions(sets, args.retain_log, args.gradient_norm)
    read_config(args.model_name_or_path, "model_name_or_path", "a causal language model", **source)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype, **source)
    if args.adapter_name_or_path is not None:
        model = on_its_base(model, args.adapter_name_or_path)
    model.to(PartialState(cpu=args.use_cpu).device)
    log = evaluate_tofu(
        model,
        AutoTokenizer.from_pretrained(args.model_name_or_path, **source),
        sets,
        batch_size=args.batch_size,
        retain_log=retain_log,
        max_new_tokens=args.max_new_tokens,
        gradient_norm=args.gradient_norm,
    )
    write_log(log, args.output_file)
    return log


def evaluate(args: EvaluateArguments) -> dict:
    """Score the model, write the log to `args.output_file`, print the summary."""
    log = score(args)
    print(f"\n{summary_table({args.adapter_name_or_path or args.model_name_or_path: log})}")
    print(f"\nLog written to {args.output_file}.")
    return log


def main(argv: list[str]) -> None:
    (args,) = read_settings((EvaluateArguments,), "evaluate", argv)
    evaluate(args)
