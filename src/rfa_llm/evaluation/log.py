"""The log of an evaluation, in the format of OpenUnlearning's TOFU_EVAL.json.

    {metric: {"agg_value": float, "value_by_index": {"0": {...}, "1": {...}, ...}}}

so that its published logs of retain-only models can be read here, and ours there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from rfa_llm.evaluation.metrics import truth_ratio
from rfa_llm.files import written_whole

# The second is the spelling of OpenUnlearning's older logs.
FORGET_TRUTH_RATIO_KEYS = ("forget_truth_ratio", "forget_Truth_Ratio")


def write_log(log: dict, path: str | os.PathLike) -> None:
    """Write a log, or another object, as JSON, whole or not at all: a crash leaves the file that was there.

    Args:
        log: as `rfa_llm.evaluation.suite.evaluate_tofu` returns it.
        path: the file; its folder is made where missing.

    Raises:
        TypeError: a value is not JSON (a tensor, a numpy number).
    """
    path = Path(path)
    text = json.dumps(log, indent=4)
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def read_log(path: str | os.PathLike, field: str = "log") -> dict:
    """Read a log, ours or one of OpenUnlearning's.

    Args:
        path: the JSON file.
        field: the setting it came from, such as "retain_log", named in errors.

    Returns:
        dict: {metric: {"agg_value": ..., ...}}.

    Raises:
        ValueError: there is no such file, or it is not JSON, or not of the log's format.
    """
    if not Path(path).is_file():
        raise ValueError(f"{field}: {str(path)!r} is no file; give a log of `rfa-llm evaluate` or a TOFU_EVAL.json.")
    try:
        log = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{field}: {path} is not JSON ({error}); give a log written by write_log or a TOFU_EVAL.json."
        ) from error
    if not isinstance(log, dict) or not log:
        raise ValueError(
            f"{field}: {path} is no evaluation log: it should hold an object of metrics, as TOFU_EVAL.json does."
        )
    for metric, value in log.items():
        if not isinstance(value, dict) or "agg_value" not in value:
            raise ValueError(
                f"{field}: {path} is no evaluation log: its entry {metric!r} has no 'agg_value'; "
                "give the full log (TOFU_EVAL.json), not the summary."
            )
        rows = value.get("value_by_index", {})
        numbered = isinstance(rows, dict) and all(row.isdecimal() and isinstance(rows[row], dict) for row in rows)
        if not numbered or not isinstance(value["agg_value"], (int, float, type(None))):
            raise ValueError(
                f"{field}: {path} is no evaluation log: the 'agg_value' of its entry {metric!r} is no number, or its "
                "'value_by_index' no object of numbered rows; give the log as it was written."
            )
    return log


def forget_truth_ratios(log: dict, name: str = "the log") -> np.ndarray:
    """The raw truth ratios on the forget set.

    Args:
        log: as `read_log` returns it. The ratios are read from `forget_truth_ratio` (field `score`); where the log has
            none, they are computed from the losses in `forget_Q_A_PARA_Prob` and `forget_Q_A_PERT_Prob` (field
            `avg_loss`).
        name: what an error calls the log.

    Returns:
        float64 array of shape (questions,), in the order of the forget set.

    Raises:
        ValueError: it has neither, or not for each question, or one is not a number.
    """
    key = next((key for key in FORGET_TRUTH_RATIO_KEYS if key in log), None)
    if key is not None:
        ratios = np.array(_column(log, key, "score", name), dtype=np.float64)
    elif "forget_Q_A_PARA_Prob" in log and "forget_Q_A_PERT_Prob" in log:
        ratios = truth_ratio(
            _column(log, "forget_Q_A_PARA_Prob", "avg_loss", name),
            _column(log, "forget_Q_A_PERT_Prob", "avg_loss", name),
        )
    else:
        raise ValueError(
            f"{name} has no truth ratios of the forget set, neither 'forget_truth_ratio' nor 'forget_Q_A_PARA_Prob' "
            f"with 'forget_Q_A_PERT_Prob' (found {sorted(log)}); give the full log of a model trained on the retain "
            "set alone."
        )
    if np.isnan(ratios).any():
        raise ValueError(f"{name} has a truth ratio that is not a number; evaluate the model again.")
    return ratios


def read_answers(log: dict) -> list[str]:
    """The forget set's answers, row by row; none where the log does not keep them."""
    rows = log.get("forget_Q_A_ROUGE", {}).get("value_by_index", {})
    texts = [rows[index].get("ground_truth") for index in sorted(rows, key=int)]
    return texts if all(isinstance(text, str) for text in texts) else []


def read_attack_scores(log: dict, attack: str, rows: str) -> np.ndarray:
    """The scores of a membership attack, row by row, from the log of a retain-only model.

    Args:
        log: the log, which has the attack.
        attack: such as `mia_loss`.
        rows: "forget" or "holdout".

    Returns:
        float64 array of shape (rows,).

    Raises:
        ValueError: it has no scores of single rows.
    """
    return np.array(_column(log[attack], rows, "score", f"the retain log's {attack}"), dtype=np.float64)


def _column(log: dict, metric: str, field: str, name: str) -> list:
    """One field of a metric, question by question; JSON's keys are text, so "10" must not come before "2"."""
    rows = log.get(metric, {}).get("value_by_index", {})
    if not rows or any(field not in row for row in rows.values()):
        raise ValueError(f"{name} has no '{field}' for each question in '{metric}'; give the full log, not a summary.")
    return [rows[index][field] for index in sorted(rows, key=int)]
