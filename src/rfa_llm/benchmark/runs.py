"""One run of the comparison: a method trained from the target, and scored at several steps on the way."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rfa_llm.benchmark.environment import environment
from rfa_llm.checkpoints import KEPT, ORDER, digest, newest_whole_checkpoint, own_settings
from rfa_llm.config import RFAConfig
from rfa_llm.evaluation import evaluate_tofu, forget_truth_ratios, summary, write_log
from rfa_llm.evaluation.metrics import forget_quality
from rfa_llm.evaluation.suite import probabilities
from rfa_llm.progress import bar_alone
from rfa_llm.rivals import RIVALS, RivalConfig
from rfa_llm.trainer import RFATrainer
from rfa_llm.unlearning_trainer import DEFAULT_LORA, UnlearningTrainer, check_peft_config

# What `evaluate_tofu` reads in a retain-only model's log: numbers alone, none of the text.
COMPARED_WITH = ("forget_truth_ratio", "mia_loss", "mia_min_k")
# Inherited settings that say how many rows a step sees.
STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
# A model's truth ratios on so many questions tell it from another: their logarithms are 0.01 apart in the mean where
# dtype or machine differ, and 0.15 or more between SmolLM2's target and its retain-only model on rows that both know.
LOOK_QUESTIONS, SAME_MODEL = 16, 0.05
# What a run sets by itself.
OWN = {"save_strategy": "steps", "save_total_limit": 1, "overwrite_output_dir": True, "report_to": "none"}


@dataclass(frozen=True)
class Run:
    """What distinguishes one run from another.

    Args:
        method: its name in the table.
        settings: `trainer`, "rfa" or a name of `rfa_llm.rivals.RIVALS`, fields of `RFAConfig` or `RivalConfig`, and
            `lora`, a dict of `LoraConfig`'s fields where the adapter is not the default one; for RFA with a teacher
            also `holdout`, whether `stop_at` is to see holdout rows.
        learning_rate: peak learning rate.
        seed: of the adapter's first weights, the order of rows, and the pairs.
        max_steps: steps of training.
        points: how many times it is scored, at equal distances; a divisor of `max_steps`.
        rows: what it is trained on and asked, from `rows_digest`.
        scored: what else its scores hang on: `max_new_tokens` and `holdout`, a digest of the rows that the membership
            attacks are held against.
        stop_rows: a digest of the holdout rows that `stop_at` sees, for a run where it sees any (`sees_holdout`).
    """

    method: str
    settings: Mapping[str, object]
    learning_rate: float
    seed: int
    max_steps: int
    points: int
    rows: str
    scored: Mapping[str, object]
    stop_rows: str | None = None


def sees_holdout(settings: Mapping[str, object]) -> bool:
    """Whether a method with these settings trains with holdout rows: `stop_at` without a teacher, or by `holdout`."""
    stops = settings.get("stop_at") is not None
    return stops and (settings.get("teacher") is None or bool(settings.get("holdout", False)))


def rows_digest(forget: Dataset, retain: Dataset, sets: Mapping[str, Dataset]) -> str:
    """A name for the rows that are trained on and asked, so that a result on others does not pass for one on these.

    Args:
        forget, retain: the sets to train on.
        sets: the questions, as `evaluate_tofu` takes them; a holdout set, which is drawn, is left aside.
    """
    asked = {name: rows[:] for name, rows in sorted(sets.items()) if name != "holdout"}
    return digest(json.dumps([forget[:], retain[:], asked]))


def run_name(run: Run) -> str:
    """The stem of a run's result file."""
    return f"{run.method}_lr{run.learning_rate:g}_seed{run.seed}"


def read_result(file: Path) -> dict:
    """What is in a JSON file of the comparison.

    Raises:
        ValueError: It was cut short, or is another file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"results: {file} is no whole JSON file ({error}); delete it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"results: {file} is none that a benchmark wrote; delete it.")
    return content


def point(log: Mapping[str, dict], step: int) -> dict:
    """What a result file keeps of a log: the aggregate numbers and the forget set's truth ratios, none of the text."""
    ratios = [row["score"] for row in log["forget_truth_ratio"]["value_by_index"].values()]
    return {"step": step, "summary": summary(log), "forget_truth_ratios": ratios}


def score_model(
    name: str,
    model: str,
    sets: Mapping[str, Dataset],
    rows: str,
    scored: Mapping[str, object],
    result: Path,
    log_file: Path,
    scoring: Mapping[str, object],
    may_be_missing: bool = False,
) -> dict:
    """Score a whole model, target or retain-only, unless its result is there.

    Args:
        name: in the table.
        model: folder or Hub id of the model. Where the result is there it is looked at, for whether the result is of
            that model.
        sets: as `evaluate_tofu` takes them.
        rows, scored: as a `Run` has them.
        result: where the result goes, without any text.
        log_file: where the log goes, with the questions and answers.
        scoring: more arguments of `evaluate_tofu`.
        may_be_missing: whether a result alone is enough where `model` is no folder that is there.

    Returns:
        what is in the result file: as a run's, and under "compared_with" what of the log `evaluate_tofu` takes as
        `retain_log`, so that a retain-only model is needed once.

    Raises:
        ValueError: The result is of another model or other rows, or was scored otherwise, or is of a version that did
            not keep all of that.
    """
    if result.exists():
        content = read_result(result)
        if "compared_with" not in content:
            raise ValueError(
                f"results: {result} does not hold what runs are compared with, for it is of an earlier version; "
                "delete it to score the model again."
            )
        if content.get("rows") != rows:
            raise ValueError(
                f"results: {result} is of other forget, retain or question rows than these; give each of them a "
                "results_dir of its own."
            )
        if content.get("scored") != scored:
            raise ValueError(
                f"results: {result} was scored with {content.get('scored')}, not with {scored}; delete it, or choose "
                "another results_dir."
            )
        if not may_be_missing or Path(model).is_dir():
            _check_model(model, sets["forget"], content, result)
        return content
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(PartialState().device)
    log = evaluate_tofu(loaded, AutoTokenizer.from_pretrained(model), sets, **scoring)
    write_log(log, log_file)
    content = {
        "method": name,
        "rows": rows,
        "scored": dict(scored),
        "points": [point(log, 0)],
        "compared_with": {metric: log[metric] for metric in COMPARED_WITH if metric in log},
        "dtype": str(loaded.dtype).removeprefix("torch."),
        **environment(),
    }
    write_log(content, result)
    return content


def _check_model(model: str, questions: Dataset, content: Mapping, result: Path) -> None:
    """Check that a model has the truth ratios that its result says."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(PartialState().device)
    asked = list(questions.select(range(min(LOOK_QUESTIONS, len(questions)))))
    _, log = probabilities(loaded, AutoTokenizer.from_pretrained(model), asked, "forget")
    there = content["points"][0]["forget_truth_ratios"][: len(asked)]
    # A ratio that overflowed says as much as a large one.
    logs = np.log(np.clip([forget_truth_ratios(log), there], 1e-9, 1e9))
    apart = np.abs(logs[0] - logs[1]).mean()
    if apart > SAME_MODEL:
        raise ValueError(
            f"results: {result} is of another model than {model} (the logarithms of the first truth ratios are "
            f"{apart:.2g} apart in the mean); choose another results_dir, or delete the results."
        )


def check_reference(content: Mapping, retain_result: Mapping, result: Path) -> None:
    """Check that a run's result was compared with this retain-only model.

    Args:
        content: what lies in the run's file.
        retain_result: what `score_model` returned of the retain-only model.
        result: the run's file.

    Raises:
        ValueError: Its forget quality is not that of its truth ratios and the retain-only model's.
    """
    retain_ratios = forget_truth_ratios(retain_result["compared_with"])
    for one in content["points"]:
        quality = forget_quality(one["forget_truth_ratios"], retain_ratios)
        if not math.isclose(quality, one["summary"]["forget_quality"], rel_tol=1e-6):
            raise ValueError(
                f"results: {result} was compared with another retain-only model than the one whose result lies beside "
                "it; delete the one that is wrong, or choose another results_dir."
            )


def identity(run: Run) -> dict[str, dict]:
    """What a result file says of its run: "run", as it was asked for, and "in_full", the method's settings, those of
    the optimizer and the adapter's as they came out, so that a default that changes later does not pass for the old
    one."""
    args, lora = _arguments(run, "")
    values = args.to_dict()
    in_full = {name: values[name] for name in (*own_settings(args), *KEPT, *ORDER, *STEP)}
    lora = DEFAULT_LORA if lora is None else lora
    adapter = _lora_config(lora, run.method)
    in_full["lora"] = {"r": adapter.r, "lora_alpha": adapter.lora_alpha, "lora_dropout": adapter.lora_dropout, **lora}
    settings = {name: value for name, value in run.settings.items() if (name, value) != ("holdout", False)}
    asked = {**vars(run), "settings": settings, "scored": dict(run.scored)}
    if run.stop_rows is None:
        del asked["stop_rows"]
    # As it is read again.
    return json.loads(json.dumps({"run": asked, "in_full": in_full}))


def check_settings(run: Run, content: Mapping, result: Path) -> None:
    """Check that a result is that of a run.

    Args:
        run: what is asked for.
        content: what lies in the file.
        result: the file.

    Raises:
        ValueError: It is of other settings.
    """
    for asked, found in zip(_parts(identity(run)), _parts(content), strict=True):
        other = sorted(key for key in {*found, *asked} if found.get(key) != asked.get(key))
        if other:
            there, here = ({key: one.get(key) for key in other} for one in (found, asked))
            raise ValueError(
                f"results: {result} is of the settings {there}, not {here}; delete it, or choose another folder."
            )


def _parts(content: Mapping) -> tuple[dict, dict]:
    """The two parts of an identity, without settings in the first that the second has: whether a setting was given or
    is the default makes no other run."""
    in_full = content.get("in_full", {})
    run = content.get("run", {})
    settings = {name: value for name, value in run.get("settings", {}).items() if name not in in_full}
    return {**run, "settings": settings}, in_full


def train_and_score(
    run: Run,
    model: str,
    forget: Dataset,
    retain: Dataset,
    holdout: Dataset | None,
    sets: Mapping[str, Dataset],
    result: Path,
    folder: Path,
    scoring: Mapping[str, object],
) -> dict:
    """Train one run and score it at its points, unless its result is there; go on where an interruption left it.

    Args:
        run: what to train.
        model: path of the target.
        forget, retain: the sets to train on.
        holdout: rows that the target never saw, for a run with `stop_at`; with a teacher only where its settings have
            `holdout`.
        sets: the questions, as `evaluate_tofu` takes them.
        result: where the result goes.
        folder: where checkpoints and points lie until the result is written; the last adapter stays there.
        scoring: more arguments of `evaluate_tofu`.

    Returns:
        what is in the result file.

    Raises:
        ValueError: a result of other settings is there, or what an interrupted run of others has left.
    """
    if result.exists():
        content = read_result(result)
        check_settings(run, content, result)
        _tidy(folder)
        return content
    # What an interrupted run has left is this one's only if it says so.
    begun = folder / "run.json"
    if begun.exists():
        check_settings(run, read_result(begun), folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        write_log(identity(run), begun)
    trainer = make_trainer(run, model, forget, retain, holdout, str(folder))
    points = _Points(folder / "points", trainer.processing_class, sets, scoring)
    trainer.add_callback(points)
    bar_alone(trainer)
    trainer.train(resume_from_checkpoint=newest_whole_checkpoint(str(folder)))
    trainer.save_model()
    measured = [read_result(file) for file in (folder / "points").glob("*.json")]
    content = {
        "method": run.method,
        **identity(run),
        "points": sorted(measured, key=lambda one: one["step"]),
        "history": trainer.state.log_history,
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        **environment(),
    }
    write_log(content, result)
    _tidy(folder)
    return content


def _tidy(folder: Path) -> None:
    """Remove what a run whose result is written has no more use for; a kill may have left some of it."""
    for done in (*folder.glob("checkpoint-*"), *folder.glob("points")):
        shutil.rmtree(done)


def make_trainer(
    run: Run, model: str, forget: Dataset, retain: Dataset, holdout: Dataset | None, output_dir: str
) -> UnlearningTrainer:
    """The trainer of a run, RFA's or a rival's.

    Raises:
        ValueError: there is no such trainer or setting.
    """
    args, lora = _arguments(run, output_dir)
    given = {"forget_dataset": forget, "retain_dataset": retain}
    if lora is not None:
        given["peft_config"] = _lora_config(lora, run.method)
    if isinstance(args, RFAConfig):
        needs_holdout = sees_holdout(run.settings)
        if needs_holdout and holdout is None:
            raise ValueError(f"holdout: {run.method!r} is to see holdout rows, and none are given; give some.")
        return RFATrainer(model, args, **given, **({"holdout_dataset": holdout} if needs_holdout else {}))
    return RIVALS[args.method](model, args, **given)


def _arguments(run: Run, output_dir: str) -> tuple[RFAConfig | RivalConfig, dict | None]:
    """The arguments of the run's trainer, and the fields of its `LoraConfig`, where it has one of its own."""
    settings = dict(run.settings)
    name = settings.pop("trainer")
    lora = settings.pop("lora", None)
    if name == "rfa" and settings.pop("holdout", False) and settings.get("stop_at") is None:
        raise ValueError(f"methods: {run.method!r} has holdout, but no stop_at, which alone needs it; leave it out.")
    common = {
        "output_dir": output_dir,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "max_steps": run.max_steps,
        "save_steps": run.max_steps // run.points,
        **OWN,
    }
    if name != "rfa":
        if name not in RIVALS:
            raise ValueError(
                f"methods: {run.method!r} has the trainer {name!r}, which is not known; use 'rfa' or one of "
                f"{', '.join(RIVALS)}."
            )
        common["method"] = name
    config = RFAConfig if name == "rfa" else RivalConfig
    known = {field.name for field in fields(config)}
    for setting in settings:
        if setting in common:
            raise ValueError(
                f"methods: {run.method!r} has {setting!r}, which the comparison sets by itself; leave it out."
            )
        if setting not in known:
            near = get_close_matches(setting, known)
            raise ValueError(
                f"methods: {run.method!r} has {setting!r}, which is no field of {config.__name__}; "
                f"{f'did you mean {near[0]!r}?' if near else 'docs/api.md has its fields.'}"
            )
    check_numbers(settings, f"methods: {run.method!r} has")
    return config(**common, **settings), lora


def _lora_config(lora: Mapping[str, object], method: str) -> LoraConfig:
    """The adapter's config from its fields.

    Raises:
        ValueError: They are none of `LoraConfig`, or no adapter that can be trained here.
    """
    check_numbers(lora, f"methods: {method!r} has lora with")
    try:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", **lora})
        check_peft_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"methods: {method!r} has lora: {dict(lora)} ({error}); give fields of LoraConfig with their values."
        ) from error
    return config


def check_numbers(settings: Mapping[str, object], where: str) -> None:
    """Check that no number of a recipe was read as text.

    Args:
        settings: Name -> value.
        where: What has them, for the message.

    Raises:
        ValueError: One was.
    """
    for setting, value in settings.items():
        if isinstance(value, str) and _is_number(value):
            raise ValueError(
                f"{where} {setting!r} as the text {value!r}; YAML sees a number where there is a dot, such as 2.0e-4."
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Points(TrainerCallback):
    """Scores the model at each checkpoint, and keeps each point in a file of its own."""

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        sets: Mapping[str, Dataset],
        scoring: Mapping[str, object],
    ):
        self.folder, self.tokenizer, self.sets, self.scoring = folder, tokenizer, sets, scoring

    def _measure(self, model: PreTrainedModel, step: int) -> None:
        file = self.folder / f"{step}.json"
        if not file.exists():
            log = evaluate_tofu(model, self.tokenizer, self.sets, **self.scoring)
            write_log(point(log, step), file)

    def on_train_begin(self, args, state, control, model, **kwargs):
        # A kill may have come between the checkpoint and its point.
        if state.global_step:
            self._measure(model, state.global_step)

    def on_save(self, args, state, control, model, **kwargs):
        self._measure(model, state.global_step)
