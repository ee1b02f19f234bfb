"""`rfa-llm benchmark`: RFA and its rivals on the same model, sets and budget; resumes, and repeats nothing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import get_peft_config

from rfa_llm.benchmark import (
    Run,
    at_best_learning_rate,
    check_can_draw,
    check_numbers,
    check_reference,
    check_rows,
    check_settings,
    draw,
    holdout_halves,
    identity,
    read_result,
    rows_digest,
    run_name,
    score_model,
    sees_holdout,
    table,
    train_and_score,
)
from rfa_llm.blocks import num_blocks, read_config, resolve_blocks
from rfa_llm.calibration import NothingToForgetError
from rfa_llm.checkpoints import digest
from rfa_llm.cli.demo import DemoArguments, make_models
from rfa_llm.cli.finetune import FinetuneConfig, FinetuneModelConfig, finetune
from rfa_llm.cli.settings import read_settings
from rfa_llm.data.formats import load_rows
from rfa_llm.data.tofu import load_question_sets, load_tofu
from rfa_llm.evaluation import write_log
from rfa_llm.evaluation.scores import BrokenModelError
from rfa_llm.evaluation.suite import check_sizes

# What the result files of a method are called; with a star in the name's place, those of all.
RESULT = "{name}_lr*_seed*.json"
# The settings that name one.
MODELS = ("target_model", "retain_model", "base_model")
# Beside a model that was fine-tuned here, what it was fine-tuned on.
TRAINED_ON = "trained_on.json"


@dataclass
class BenchmarkArguments:
    """What is compared on what. Methods are given in a YAML file (`--config`)."""

    output_dir: str = field(
        default="benchmark-run", metadata={"help": "Folder of models, checkpoints, logs and adapters."}
    )
    results_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the results: a JSON file a run, the table, the picture. Default: in output_dir."},
    )
    methods: dict | None = field(
        default=None,
        metadata={
            "help": "Name -> settings: `trainer` (rfa or a rival), optionally `learning_rates` of its own and `lora` "
            "(fields of LoraConfig), and fields of RFAConfig or RivalConfig. Required."
        },
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3],
        metadata={"help": "Learning rates; every method tries each of them, on the first seed."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds; the best learning rate runs on the others of these too."},
    )
    only: list[str] | None = field(default=None, metadata={"help": "Methods to run now; by default all."})
    max_steps: int = field(default=60, metadata={"help": "Steps of each run."})
    points: int = field(default=5, metadata={"help": "Times that each run is scored; a divisor of max_steps."})
    training: dict | None = field(
        default=None, metadata={"help": "Settings of every run, such as per_device_train_batch_size."}
    )
    demo_models: bool = field(
        default=False, metadata={"help": "Make up the authors and train the models as `rfa-llm demo` does."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with TOFU, or sets like it, as JSON Lines."})
    facts_dir: str | None = field(
        default=None, metadata={"help": "Folder of real authors and world facts, where it is not data_dir."}
    )
    forget_config: str = field(default="forget", metadata={"help": "The forget set of data_dir."})
    retain_config: str = field(default="retain", metadata={"help": "The retain set."})
    full_config: str = field(default="full", metadata={"help": "Both of them, for the target."})
    forget_perturbed_config: str = field(
        default="forget_perturbed", metadata={"help": "The forget set's questions with paraphrases and wrong answers."}
    )
    retain_perturbed_config: str = field(default="retain_perturbed", metadata={"help": "The retain set's, likewise."})
    holdout_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Questions and answers that no model saw; what is in the forget or the retain set is left out. "
            "Of what is left, as many as the forget set has are for the membership attacks, and as many for stop_at."
        },
    )
    target_model: str | None = field(
        default=None, metadata={"help": "Model that has to forget. Default: models/target in output_dir."}
    )
    retain_model: str | None = field(
        default=None, metadata={"help": "Its retain-only twin. Default: models/retain in output_dir."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "What target and retain-only are fine-tuned from where they are missing."}
    )
    finetuning: dict | None = field(
        default=None, metadata={"help": "Settings of that fine-tuning, fields of `rfa-llm finetune`'s recipe."}
    )
    batch_size: int = field(default=16, metadata={"help": "Answers scored at a time."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest greedy answer, in tokens."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})

    def __post_init__(self):
        if not self.methods:
            raise ValueError("methods: none is given; name them with their settings in the file of --config.")
        for field_name in ("methods", "training", "finetuning"):
            value = getattr(self, field_name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{field_name}: {value!r} is no mapping; give names with their values.")
        for name, settings in self.methods.items():
            if not isinstance(name, str) or not re.fullmatch(r"[^\W_][\w.-]{0,49}", name):
                raise ValueError(
                    f"methods: {name!r} becomes part of file names; give text (in quotes, where YAML sees another "
                    "thing) of at most 50 letters, digits, '_', '-' and '.', with a letter or digit first."
                )
            if name in ("target", "retain-only"):
                raise ValueError(f"methods: {name!r} is the name of a row of the table already; give it another.")
            if not isinstance(settings, dict) or not isinstance(settings.get("trainer"), str):
                raise ValueError(f"methods: {name!r} is {settings!r}; give it a `trainer`, rfa or a rival's name.")
            rates = settings.get("learning_rates", self.learning_rates)
            if not isinstance(rates, list) or not rates:
                raise ValueError(f"methods: {name!r} has learning_rates: {rates!r}; give a list, such as [2.0e-4].")
            whole = self.settings_of(name)
            lora = whole.get("lora", {})
            if not isinstance(lora, dict):
                raise ValueError(f"methods: {name!r} has lora: {lora!r}; give fields of LoraConfig with their values.")
            if sees_holdout(whole) and self.holdout_dataset is None:
                raise ValueError(
                    f"holdout_dataset: none is given, and {name!r} has stop_at={whole['stop_at']!r} and "
                    f"{'holdout' if whole.get('holdout') else 'no teacher'}; give rows that no model saw."
                )
        unknown = [name for name in self.only or () if name not in self.methods]
        if unknown:
            raise ValueError(f"only: {unknown} are not among the methods {list(self.methods)}; name some of those.")
        are_whole = isinstance(self.points, int) and isinstance(self.max_steps, int)
        if not are_whole or self.points < 1 or self.max_steps < 1 or self.max_steps % self.points:
            raise ValueError(
                f"points: {self.points} does not divide max_steps={self.max_steps}; give whole numbers that do."
            )
        if not self.learning_rates or not self.seeds:
            raise ValueError("learning_rates, seeds: both need at least one number.")
        for seed in self.seeds:
            # YAML reads `yes` as a bool, which is an int.
            if type(seed) is not int or not 0 <= seed < 2**32:
                raise ValueError(f"seeds: {seed!r} is no seed; give whole numbers from 0 to {2**32 - 1}.")
        for rate in [
            *self.learning_rates,
            *(r for one in self.methods.values() for r in one.get("learning_rates", [])),
        ]:
            if not isinstance(rate, float):
                raise ValueError(
                    f"learning_rates: {rate!r} is no number with a dot, which YAML needs to see one; write 2.0e-4."
                )
            if not 0 < rate < math.inf:
                raise ValueError(f"learning_rates: {rate!r} is no finite number above 0; give rates that are.")
        check_sizes(self.batch_size, self.max_new_tokens)
        for name in ("output_dir", "results_dir", "data_dir", "facts_dir", "holdout_dataset", *MODELS):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "output_dir"):
                raise ValueError(f"{name}: {value!r} is no text; give a path.")
        makes = (*MODELS, "finetuning", "data_dir", "facts_dir")
        unread = [name for name in makes if getattr(self, name) is not None]
        if self.demo_models and unread:
            raise ValueError(
                f"demo_models: it makes up models and data and would not read {', '.join(unread)}; leave out either."
            )
        if not self.demo_models and self.data_dir is None:
            raise ValueError("data_dir: no data is given; give the folder with TOFU's files, or set demo_models.")

    def settings_of(self, method: str) -> dict[str, object]:
        """A method's settings, with those of every run where it has none of its own, without its learning rates."""
        own = {name: value for name, value in self.methods[method].items() if name != "learning_rates"}
        return {"use_cpu": self.use_cpu, **(self.training or {}), **own}


def finetune_recipe(args: BenchmarkArguments, output_dir: str) -> FinetuneConfig:
    """The recipe that target and retain-only model are fine-tuned by.

    Raises:
        ValueError: `finetuning` has a setting that is none, or a value that it does not take.
    """
    given = args.finetuning or {}
    check_numbers(given, "finetuning: it has")
    try:
        return FinetuneConfig(output_dir=output_dir, **{"report_to": "none", "use_cpu": args.use_cpu, **given})
    except (TypeError, ValueError) as error:
        raise ValueError(f"finetuning: {error}; give settings of `rfa-llm finetune`, but for output_dir.") from error


def check_writable(folder: Path, setting: str) -> None:
    """Check that a folder can be written to, or made, without making it.

    Raises:
        ValueError: It cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{setting}: {folder} cannot be written to; give another folder.")


def make_missing_models(args: BenchmarkArguments, folder: Path, results: Path) -> tuple[str, str]:
    """Paths of the target and its retain-only twin, fine-tuned from the base where they are missing.

    A retain-only model whose result is in `results` is not needed any more, and not made.

    Raises:
        ValueError: One is missing and there is no base, or one that is there was fine-tuned otherwise.
    """
    if args.demo_models:
        models = folder / "models"
        if not models.exists():
            making = _emptied(models)
            make_models(DemoArguments(use_cpu=args.use_cpu), making)
            making.rename(models)
        return str(models / "target"), str(models / "retain")
    paths, is_scored = [], (results / "retain-only.json").exists()
    for given, name, rows in (
        (args.target_model, "target", args.full_config),
        (args.retain_model, "retain", args.retain_config),
    ):
        if given is not None:
            if not (name == "retain" and is_scored):
                read_config(given, f"{name}_model", "a causal language model")
            paths.append(str(Path(given)))
            continue
        path = folder / "models" / name
        if name == "retain" and not path.exists() and is_scored:
            paths.append(str(path))
            continue
        dataset = load_tofu(rows, args.data_dir)
        trained_on = {
            "rows": digest(json.dumps(dataset[:])),
            "base_model": args.base_model,
            "finetuning": args.finetuning or {},
        }
        if path.exists():
            note = path / TRAINED_ON
            if not note.exists() or read_result(note) != trained_on:
                raise ValueError(
                    f"output_dir: {path} was not fine-tuned from base_model={args.base_model!r} with "
                    f"finetuning={args.finetuning} on the rows that {rows} has; choose another folder."
                )
        else:
            if args.base_model is None:
                raise ValueError(
                    f"base_model: {path} is missing and there is nothing to fine-tune it from; give base_model, or "
                    "target_model and retain_model."
                )
            print(f"\nFine-tuning {args.base_model} on {rows} ({path})", flush=True)
            set_seed(0)
            model = AutoModelForCausalLM.from_pretrained(args.base_model, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(args.base_model)
            making = _emptied(path)
            recipe = finetune_recipe(args, str(making))
            finetune(model, tokenizer, dataset, recipe, get_peft_config(FinetuneModelConfig()))
            write_log(trained_on, making / TRAINED_ON)
            making.rename(path)
        paths.append(str(path))
    return tuple(paths)


def _emptied(path: Path) -> Path:
    """Where a model is made that is to be at `path`: one whose making is cut short has another name."""
    making = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(making, ignore_errors=True)
    return making


def planned(
    args: BenchmarkArguments,
    name: str,
    learning_rate: float,
    seed: int,
    rows: str,
    scored: dict[str, object],
    stop_rows: str | None = None,
) -> Run:
    """One run of a method; `rows`, `scored` and `stop_rows` as `Run` has them, where the method sees holdout rows."""
    settings = args.settings_of(name)
    seen = stop_rows if sees_holdout(settings) else None
    return Run(name, settings, learning_rate, seed, args.max_steps, args.points, rows, scored, seen)


def check_methods(args: BenchmarkArguments) -> None:
    """Check each method's settings by making its config.

    Raises:
        ValueError, TypeError: A setting is none of that method's trainer, or has a value that it does not take.
    """
    for name in args.methods:
        identity(planned(args, name, args.learning_rates[0], args.seeds[0], rows="", scored={}))


def check_with_models(run: Run, target: str) -> None:
    """Check those of a run's settings that hang on models: the teacher and the blocks.

    Raises:
        ValueError: There is no such teacher, or no such block in the target.
    """
    teacher, blocks = run.settings.get("teacher"), run.settings.get("blocks")
    if teacher is not None:
        read_config(teacher, f"methods: {run.method!r} has teacher", "the checkpoint from before the fine-tuning")
    if blocks is not None:
        resolve_blocks(blocks, num_blocks(read_config(target, "target_model", "a causal language model")))


def benchmark(args: BenchmarkArguments) -> str:
    """Run what is missing, write the table and the picture, and return the table.

    Raises:
        ValueError: A setting, a set, a model or a result that is there is not what it should be; before any training
            where that can be. Or some runs came to losses that are not finite, or had nothing to forget by their
            `stop_at`; the table has the others.
    """
    # What is wrong ends it now and not after hours.
    check_can_draw()
    check_methods(args)
    finetune_recipe(args, args.output_dir)
    folder = Path(args.output_dir)
    results = Path(args.results_dir or folder / "results")
    check_writable(folder, "output_dir")
    check_writable(results, "results_dir")

    # The first to ask decides on the device, for scoring as for training.
    PartialState(cpu=args.use_cpu)
    if args.demo_models:
        # As in the demo: matrices this small are not worth sharing.
        torch.set_num_threads(1)
    # The demo's data is made with its models; data that is given is read before hours of training.
    made = make_missing_models(args, folder, results) if args.demo_models else None
    data_dir = str(folder / "models" / "data") if args.demo_models else args.data_dir
    sets = load_question_sets(data_dir, args.facts_dir, args.forget_perturbed_config, args.retain_perturbed_config)
    forget, retain = load_tofu(args.forget_config, data_dir), load_tofu(args.retain_config, data_dir)
    check_rows(forget, retain, sets)
    holdout, scored, stop_rows = None, {"max_new_tokens": args.max_new_tokens, "holdout": None}, None
    if args.holdout_dataset is not None:
        sets["holdout"], holdout = holdout_halves(load_rows(args.holdout_dataset, "holdout_dataset"), forget, retain)
        scored["holdout"], stop_rows = (digest(json.dumps(half[:])) for half in (sets["holdout"], holdout))
        if not len(holdout) and any(sees_holdout(args.settings_of(name)) for name in args.methods):
            raise ValueError(
                "holdout_dataset: the rows that are drawn for the membership attacks have all its questions, and none "
                "is left for stop_at; give more questions that no model saw."
            )
    if args.demo_models:
        retain = concatenate_datasets([retain, load_tofu("facts", data_dir)])
    target, retain_only = made or make_missing_models(args, folder, results)
    rows = rows_digest(forget, retain, sets)
    prepared = partial(planned, args, rows=rows, scored=scored, stop_rows=stop_rows)
    scoring = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}

    def whole(name: str, model: str) -> dict:
        log_file = folder / "logs" / f"{name}.json"
        file, is_enough = results / f"{name}.json", name == "retain-only"
        return score_model(name, model, sets, rows, scored, file, log_file, scoring, may_be_missing=is_enough)

    target_file = results / "target.json"
    # Of other recipes too: their runs would be held against this target's utility later.
    orphans = sorted(file.name for file in results.glob(RESULT.format(name="*")))
    if orphans and not target_file.exists():
        raise ValueError(
            f"results: {results} has {orphans[0]}, but no {target_file.name} that would say which target it is of; "
            "delete the runs too, or choose another results_dir."
        )
    first_runs = {
        name: [prepared(name, rate, args.seeds[0]) for rate in settings.get("learning_rates", args.learning_rates)]
        for name, settings in args.methods.items()
        if not args.only or name in args.only
    }
    for one in (one for of_method in first_runs.values() for one in of_method):
        if not (results / f"{run_name(one)}.json").exists():
            check_with_models(one, target)
    retain_result = whole("retain-only", retain_only)
    compared_with = dict(retain_result["compared_with"])
    # On few rows the forgotten ones may all look like members by chance; PrivLeak has no ratio to that.
    if compared_with.get("mia_min_k", {"agg_value": 0.0})["agg_value"] == 1:
        del compared_with["mia_min_k"]
    scoring["retain_log"] = compared_with
    models = {"target": whole("target", target), "retain-only": retain_result}
    check_reference(models["target"], retain_result, target_file)
    models["retain-only"]["points"][0]["summary"].setdefault("forget_quality", 1.0)
    utility = models["target"]["points"][0]["summary"]["model_utility"]
    if utility == 0:
        raise ValueError(
            f"target_model: {target!r} has a model utility of 0, so nothing compares with it (one of its scores is "
            f"0, see {results / 'target.json'}); give a better model, or sets that it knows."
        )

    broken = {}

    def run(one: Run) -> None:
        file = results / f"{run_name(one)}.json"
        print(f"\n{run_name(one)}{' (done)' if file.exists() else ''}", flush=True)
        to = folder / "runs" / run_name(one)
        try:
            train_and_score(one, target, forget, retain, holdout, sets, file, to, scoring)
        except (FloatingPointError, BrokenModelError, NothingToForgetError) as error:
            # The other rates and methods are worth having.
            print(f"{run_name(one)} has no result: {error}", flush=True)
            broken[run_name(one)] = error

    def chosen(name: str) -> list[dict]:
        """A method's results, of other times too, at the learning rate that is best on the seed that has most."""
        done = []
        for file in sorted(results.glob(RESULT.format(name=name))):
            found = read_result(file)
            if "run" not in found:
                raise ValueError(f"results: {file} is no result of a run; delete it.")
            of = found["run"]
            # The name of a method may begin with another's.
            if of["method"] != name:
                continue
            asked = prepared(name, of["learning_rate"], of["seed"])
            # A copy would count as one more seed.
            if file.stem != run_name(asked):
                raise ValueError(
                    f"results: {file} is not where the result of {run_name(asked)} would be; delete it, or give it "
                    "that name."
                )
            check_settings(asked, found, file)
            check_reference(found, retain_result, file)
            done.append(found)
        done.sort(key=lambda one: one["run"]["seed"])
        return at_best_learning_rate(done, utility) if done else []

    # Results that do not belong here end it now, too.
    for name in args.methods:
        chosen(name)
    for name, of_method in first_runs.items():
        for one in of_method:
            run(one)
        done = chosen(name)
        for seed in args.seeds[1:] if done else []:
            run(prepared(name, done[0]["run"]["learning_rate"], seed))
    methods = {name: results_of for name in args.methods if (results_of := chosen(name))}

    text = table(models, methods)
    (results / "table.md").write_text(text, encoding="utf-8")
    draw(models, methods, results / "picture.svg")
    print(f"\n{text}\nResults, table.md and picture.svg are in {results}.")
    if broken:
        reasons = ", ".join(f"{name} ({str(error).rstrip('.')})" for name, error in broken.items())
        raise ValueError(
            f"methods: there is no result of {reasons}; the table has the other runs. Give lower learning rates or "
            "other settings."
        )
    return text


def main(argv: list[str]) -> None:
    (args,) = read_settings((BenchmarkArguments,), "benchmark", argv)
    benchmark(args)
