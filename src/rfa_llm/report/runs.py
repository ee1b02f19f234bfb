"""What is known of a run, read from its folder and from the logs of its evaluations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import isclose
from pathlib import Path

import numpy as np
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from rfa_llm.evaluation import read_log, summary
from rfa_llm.evaluation.log import forget_truth_ratios
from rfa_llm.evaluation.metrics import forget_quality
from rfa_llm.receipt import RECEIPT_NAME, read_receipt

# The models whose logs a report holds side by side, and the option that names each log.
LOGS = {"target": "before_log", "unlearned": "log", "retain-only": "retain_log"}


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: its folder's, without the path, which would tell of the machine.
        receipt: from `rfa_llm.receipt.read_receipt`.
        history: the Trainer's `log_history`; empty where it was not saved.
        logs: evaluation logs, by the names of `LOGS`; each may be missing.
        truth_ratios: of each log, the forget set's raw truth ratios, float64 of shape (questions,).
    """

    name: str
    receipt: dict
    history: list[dict]
    logs: dict[str, dict]
    truth_ratios: dict[str, np.ndarray]


def read_run(
    folder: str | os.PathLike,
    log: str | os.PathLike | None = None,
    before_log: str | os.PathLike | None = None,
    retain_log: str | os.PathLike | None = None,
) -> Run:
    """Read a run from the folder that `rfa-llm unlearn` or `rfa-llm demo` wrote.

    Args:
        folder: its folder. A demo's holds the logs of its evaluations.
        log, before_log, retain_log: logs of `rfa-llm evaluate` with the adapter, without it, and of a model that never
            saw the forget set; they take the place of a demo's.

    Raises:
        ValueError: the folder is of no run, there is no such log, or files do not belong together; one sentence says
            which.
    """
    folder = Path(folder)
    is_demo = not (folder / RECEIPT_NAME).is_file()
    adapter = folder / "adapter" if is_demo else folder
    if not (adapter / RECEIPT_NAME).is_file():
        raise ValueError(
            f"runs: {str(folder)!r} holds no {RECEIPT_NAME}, and no adapter folder with one; give the folder that "
            "`rfa-llm unlearn` or `rfa-llm demo` wrote."
        )
    receipt = read_receipt(adapter)
    if receipt["method"] != "rfa":
        raise ValueError(
            f"runs: {str(folder)!r} is of the method {receipt['method']!r}, which has no residuals; give folders of "
            "RFA's runs."
        )
    given = {"target": before_log, "unlearned": log, "retain-only": retain_log}
    paths = {}
    for name in LOGS:
        own = folder / f"{name}.json"
        if given[name] is not None:
            paths[name] = Path(given[name])
        elif is_demo and own.is_file():
            paths[name] = own
    logs = {name: read_log(path, LOGS[name]) for name, path in paths.items()}
    truth_ratios = {name: forget_truth_ratios(log, f"{LOGS[name]}: {paths[name]}") for name, log in logs.items()}
    _check(paths, logs, truth_ratios)
    name = folder.absolute().name
    return Run(name, receipt, _history(adapter / TRAINER_STATE_NAME, receipt), logs, truth_ratios)


def _history(path: Path, receipt: dict) -> list[dict]:
    if not path.is_file():
        return []
    try:
        state = TrainerState.load_from_json(str(path))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"runs: {path} is no state of a Trainer ({error}); give the file as it was written."
        ) from error
    if state.global_step != receipt["settings"]["steps"]:
        raise ValueError(
            f"runs: {path} is of {state.global_step} steps, and the receipt beside it of "
            f"{receipt['settings']['steps']}; give a folder as one run left it."
        )
    return state.log_history


def _check(paths: dict[str, Path], logs: dict[str, dict], truth_ratios: dict[str, np.ndarray]) -> None:
    """That the logs are of one forget set, and were scored against this retain-only model."""
    for name, ratios in truth_ratios.items():
        first = next(iter(truth_ratios))
        if len(ratios) != len(truth_ratios[first]):
            raise ValueError(
                f"{LOGS[name]}: {paths[name]} has {len(ratios)} forget questions, but {paths[first]} has "
                f"{len(truth_ratios[first])}; give logs of one forget set."
            )
    questions = {
        name: [row["question"] for row in answers(log)] for name, log in logs.items() if name != "retain-only"
    }
    if questions.get("target") and questions.get("unlearned") and questions["target"] != questions["unlearned"]:
        raise ValueError(
            f"before_log: the forget questions of {paths['target']} are not those of {paths['unlearned']}; give logs "
            "of one forget set."
        )
    for name, log in logs.items():
        said = summary(log).get("forget_quality")
        if name != "retain-only" and "retain-only" in logs and said is not None:
            found = forget_quality(truth_ratios[name], truth_ratios["retain-only"])
            if not isclose(said, found, rel_tol=1e-3, abs_tol=1e-12):
                raise ValueError(
                    f"retain_log: against {paths['retain-only']} the forget quality in {paths[name]} would be "
                    f"{found:.4g}, but it says {said:.4g}; give the log that it was scored against."
                )


def scores(run: Run, name: str) -> dict[str, float]:
    """The summary of a log, with the forget quality where there is a retain-only log to hold it against."""
    values = summary(run.logs[name])
    if name != "retain-only" and "retain-only" in run.logs:
        values["forget_quality"] = forget_quality(run.truth_ratios[name], run.truth_ratios["retain-only"])
    return values


def answers(log: dict) -> list[dict]:
    """Each forget question of a log with the true answer, the model's, and its ROUGE-L recall; none where the log has
    no text."""
    rows = log.get("forget_Q_A_ROUGE", {}).get("value_by_index", {})
    names = {"input": "question", "ground_truth": "true", "generation": "answer", "rougeL_recall": "rouge"}
    return [
        {name: rows[index][of_log] for of_log, name in names.items()}
        for index in sorted(rows, key=int)
        if names.keys() <= rows[index].keys()
    ]


def logged_steps(run: Run) -> list[dict]:
    """The entries of the history that hold losses; each is the mean over the steps since the one before."""
    return [entry for entry in run.history if "loss_forget" in entry and "loss_retain" in entry]


def residuals(run: Run, of_set: str) -> tuple[list[int], np.ndarray]:
    """Relative residuals along the training.

    Args:
        run: with logged steps.
        of_set: "forget" or "retain".

    Returns:
        the aligned blocks, and `‖R_b‖ / ‖h⁰_b‖` as float64 of shape (blocks, logged steps); no blocks where the run
        measured none.
    """
    entries = logged_steps(run)
    prefix = f"residual_{of_set}/block_"
    blocks = sorted(int(name.removeprefix(prefix)) for name in entries[0] if name.startswith(prefix))
    return blocks, np.array([[entry[f"{prefix}{block}"] for entry in entries] for block in blocks])
