"""The TOFU evaluation: four sets of questions, a log of every score, the aggregate numbers for a table.

Maini et al., 2024, "TOFU: A Task of Fictitious Unlearning for LLMs", section 2.2; metric names as in OpenUnlearning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rfa_llm.evaluation import metrics
from rfa_llm.evaluation.log import read_retain_truth_ratios
from rfa_llm.evaluation.scores import answer_losses, greedy_answers

# The four question sets, the prefix of their metrics in the log, and whether TOFU has paraphrases of their answers.
SETS = {
    "forget": ("forget", True),
    "retain": ("retain", True),
    "real_authors": ("ra", False),
    "world_facts": ("wf", False),
}

# Column of a summary -> metric in the log.
SUMMARY = {
    "forget_prob": "forget_Q_A_Prob",
    "forget_rouge": "forget_Q_A_ROUGE",
    "forget_truth_ratio": "forget_truth_ratio",
    "forget_quality": "forget_quality",
    "retain_prob": "retain_Q_A_Prob",
    "retain_rouge": "retain_Q_A_ROUGE",
    "retain_truth_ratio": "retain_Truth_Ratio",
    "real_authors_prob": "ra_Q_A_Prob_normalised",
    "real_authors_rouge": "ra_Q_A_ROUGE",
    "real_authors_truth_ratio": "ra_Truth_Ratio",
    "world_facts_prob": "wf_Q_A_Prob_normalised",
    "world_facts_rouge": "wf_Q_A_ROUGE",
    "world_facts_truth_ratio": "wf_Truth_Ratio",
    "model_utility": "model_utility",
}

UTILITY_METRICS = [
    SUMMARY[f"{name}_{score}"]
    for name in ("retain", "real_authors", "world_facts")
    for score in ("prob", "rouge", "truth_ratio")
]


def evaluate_tofu(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Dataset],
    batch_size: int = 16,
    retain_log: str | os.PathLike | dict | None = None,
    max_new_tokens: int = 200,
) -> dict[str, dict]:
    """Score a model on TOFU's four question sets.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        sets: "forget", "retain", "real_authors" and "world_facts", each with the columns `question`, `answer` and
            `perturbed_answer` (a list of wrong answers); the first two also with `paraphrased_answer`.
        batch_size: sequences scored, or prompts answered, at a time.
        retain_log: the log, or its path, of a model trained on the retain set alone, made on the same forget set.
        max_new_tokens: the longest greedy answer, in tokens.

    Returns:
        {metric: {"agg_value": float, "value_by_index": {"0": {...}, ...}}}, every number a Python float. Without a
        `retain_log` there is no `forget_quality`.

    Raises:
        ValueError: a set or a column is missing, a set or its wrong answers are empty, or `retain_log` is of another
            forget set.
    """
    _check(sets)
    if retain_log is not None:
        retain_ratios = read_retain_truth_ratios(retain_log)
        if len(retain_ratios) != len(sets["forget"]):
            raise ValueError(
                f"retain_log has {len(retain_ratios)} truth ratios but the forget set has {len(sets['forget'])} "
                "questions; give the log of a retain-only model on the same forget set."
            )
    log = {}
    for name in SETS:
        rows = list(sets[name])
        log |= _probabilities(model, tokenizer, rows, name, batch_size)
        log |= _rouge(model, tokenizer, rows, name, batch_size, max_new_tokens)
    if retain_log is not None:
        ratios = [row["score"] for row in log["forget_truth_ratio"]["value_by_index"].values()]
        log["forget_quality"] = {"agg_value": metrics.forget_quality(ratios, retain_ratios)}
    log["model_utility"] = {"agg_value": metrics.model_utility([log[key]["agg_value"] for key in UTILITY_METRICS])}
    return log


def summary(log: Mapping[str, dict]) -> dict[str, float]:
    """The aggregate numbers of a log in one flat row.

    Args:
        log: as `evaluate_tofu` or `rfa_llm.evaluation.log.read_log` returns it.

    Returns:
        `{set}_prob`, `{set}_rouge` and `{set}_truth_ratio` for each of the four sets (normalised probability on real
        authors and world facts), `model_utility`, and `forget_quality` where the log has it.
    """
    return {column: log[metric]["agg_value"] for column, metric in SUMMARY.items() if metric in log}


def _check(sets: Mapping[str, Dataset]) -> None:
    for name, (_, has_paraphrases) in SETS.items():
        if name not in sets:
            raise ValueError(f"the question set {name!r} is missing (found {sorted(sets)}); give all of {list(SETS)}.")
        columns = ["question", "answer", *(["paraphrased_answer"] if has_paraphrases else []), "perturbed_answer"]
        missing = [column for column in columns if column not in sets[name].column_names]
        if missing:
            raise ValueError(
                f"the question set {name!r} lacks the columns {missing} (found {sets[name].column_names}); "
                "give the perturbed split, such as forget10_perturbed."
            )
        if len(sets[name]) == 0:
            raise ValueError(f"the question set {name!r} is empty; give at least one question.")
        for column in columns[:-1]:
            for index, text in enumerate(sets[name][column]):
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(
                        f"row {index} of the question set {name!r} has {column}={text!r}; give text or drop the row."
                    )
        for index, wrong in enumerate(sets[name]["perturbed_answer"]):
            if not isinstance(wrong, list) or not wrong:
                raise ValueError(
                    f"row {index} of the question set {name!r} has perturbed_answer={wrong!r}; "
                    "give a list of wrong answers, at least one."
                )


def _probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], name: str, batch_size: int
) -> dict[str, dict]:
    """Probabilities and truth ratios of one set, from one scoring pass over all its answers."""
    prefix, has_paraphrases = SETS[name]
    wrong_counts = [len(row["perturbed_answer"]) for row in rows]
    pairs = [(row["question"], row["answer"]) for row in rows]
    if has_paraphrases:
        pairs += [(row["question"], row["paraphrased_answer"]) for row in rows]
    pairs += [(row["question"], wrong) for row in rows for wrong in row["perturbed_answer"]]

    all_losses = answer_losses(
        model,
        tokenizer,
        [{"question": question, "answer": answer} for question, answer in pairs],
        batch_size=batch_size,
        desc=f"{name}: losses",
    )
    true_losses = all_losses[: len(rows)]
    # On real authors and world facts the answer itself stands for the paraphrase.
    paraphrased_losses = all_losses[len(rows) : 2 * len(rows)] if has_paraphrases else true_losses
    wrong_ends = np.cumsum(wrong_counts) + len(pairs) - sum(wrong_counts)
    wrong_losses = [all_losses[end - count : end] for count, end in zip(wrong_counts, wrong_ends, strict=True)]

    log = {f"{prefix}_Q_A_Prob": _probability_metric(true_losses)}
    if has_paraphrases:
        log[f"{prefix}_Q_A_PARA_Prob"] = _probability_metric(paraphrased_losses)
    wrong_probs = [metrics.answer_probability(losses).tolist() for losses in wrong_losses]
    log[f"{prefix}_Q_A_PERT_Prob"] = _metric(
        float(np.mean([np.mean(probs) for probs in wrong_probs])),
        [{"prob": probs, "avg_loss": losses} for probs, losses in zip(wrong_probs, wrong_losses, strict=True)],
    )
    if not has_paraphrases:
        probs = metrics.normalised_probability(true_losses, wrong_losses)
        log[f"{prefix}_Q_A_Prob_normalised"] = _metric(float(probs.mean()), [{"prob": p} for p in probs.tolist()])
    ratios = metrics.truth_ratio(paraphrased_losses, wrong_losses)
    ratio_rows = [{"score": ratio} for ratio in ratios.tolist()]
    if name == "forget":
        log["forget_truth_ratio"] = _metric(metrics.forget_truth_ratio_score(ratios), ratio_rows)
    else:
        log[f"{prefix}_Truth_Ratio"] = _metric(metrics.kept_truth_ratio_score(ratios), ratio_rows)
    return log


def _rouge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    name: str,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, dict]:
    """ROUGE of one set's greedy answers; the log keeps the texts beside the scores."""
    pairs = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    generations = greedy_answers(
        model, tokenizer, pairs, batch_size=batch_size, max_new_tokens=max_new_tokens, desc=f"{name}: answers"
    )
    scores = metrics.rouge(generations, [row["answer"] for row in rows])
    by_row = [
        {**score, "input": row["question"], "ground_truth": row["answer"], "generation": generation}
        for score, row, generation in zip(scores, rows, generations, strict=True)
    ]
    return {f"{SETS[name][0]}_Q_A_ROUGE": _metric(float(np.mean([s["rougeL_recall"] for s in scores])), by_row)}


def _probability_metric(losses: list[float]) -> dict:
    probs = metrics.answer_probability(losses)
    rows = [{"prob": prob, "avg_loss": loss} for prob, loss in zip(probs.tolist(), losses, strict=True)]
    return _metric(float(probs.mean()), rows)


def _metric(agg_value: float, rows: list[dict]) -> dict:
    return {"agg_value": agg_value, "value_by_index": {str(index): row for index, row in enumerate(rows)}}
