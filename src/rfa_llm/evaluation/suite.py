"""The TOFU evaluation: four sets of questions, a log of every score, the aggregate numbers for a table.

Maini et al., 2024, "TOFU: A Task of Fictitious Unlearning for LLMs", section 2.2; metric names as in OpenUnlearning,
but for the fluency ones, which it does not have.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rfa_llm.adapters import adapter_off
from rfa_llm.data.formats import check_tokenizer
from rfa_llm.evaluation import fluency, memorisation, metrics
from rfa_llm.evaluation.log import forget_truth_ratios, read_answers, read_attack_scores, read_log
from rfa_llm.evaluation.scores import (
    AnswerScore,
    answer_gradient_norms,
    answer_scores,
    greedy_answers,
)

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
    "extraction_strength": "extraction_strength",
    "exact_memorisation": "exact_memorization",
    "mia_loss": "mia_loss",
    "mia_zlib": "mia_zlib",
    "mia_min_k": "mia_min_k",
    "mia_min_k_plus_plus": "mia_min_k_plus_plus",
    "mia_reference": "mia_reference",
    "mia_gradient_norm": "mia_gradnorm",
    "privleak": "privleak",
    "distinct_2": "forget_Q_A_distinct_2",
    "repetition_4": "forget_Q_A_repetition_4",
    "perplexity": "forget_Q_A_perplexity",
}

# The share of a retain log's answers that may differ from the forget set's.
MOST_OTHERS = 0.05

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
    gradient_norm: bool = False,
) -> dict[str, dict]:
    """Score a model on TOFU's four question sets.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        sets: "forget", "retain", "real_authors" and "world_facts", each with the columns `question`, `answer` and
            `perturbed_answer` (a list of wrong answers); the first two also with `paraphrased_answer`. With a fifth,
            "holdout" (`question` and `answer`), rows of the forget set's kind that the model never saw, the log has
            the membership attacks too.
        batch_size: answers scored at a time, at least 1; four times as many are generated.
        retain_log: the log, or its path, of a model trained on the retain set alone, made on the same forget set.
        max_new_tokens: the longest greedy answer, in tokens, at least 1.
        gradient_norm: whether to run the gradient-norm attack, which takes a backward pass for each row.

    Returns:
        dict: {metric: {"agg_value": float, "value_by_index": {"0": {...}, ...}}}, numbers as Python floats. Without a
        `retain_log` there is no `forget_quality`; without "holdout", in it or in the sets, no `privleak` and no
        reference attack.

    Raises:
        ValueError: a set or a column is missing, also the holdout set where `gradient_norm` needs it, a set or its
            wrong answers are empty, holdout rows are in the forget or the retain set, `retain_log` is of another
            forget set or other holdout rows, a number is below 1, or the tokenizer has no end token.
    """
    check_sizes(batch_size, max_new_tokens)
    check_tokenizer(tokenizer)
    retain_log = check_questions(sets, retain_log, gradient_norm)
    sets = _without_format(sets)
    questions = {name: list(sets[name]) for name in SETS}
    log = _rouge(model, tokenizer, questions, batch_size, max_new_tokens)
    for name, rows in questions.items():
        attacked = name == "forget" and "holdout" in sets
        scores, of_set = probabilities(model, tokenizer, rows, name, batch_size, moments=attacked)
        log |= of_set
        if name == "forget":
            log |= _memorisation(scores)
            log |= _fluency(model, tokenizer, log["forget_Q_A_ROUGE"], batch_size)
            if attacked:
                holdout = list(sets["holdout"])
                log |= _membership(model, tokenizer, rows, scores, holdout, batch_size, gradient_norm, retain_log)
    if retain_log is not None:
        ratios = [row["score"] for row in log["forget_truth_ratio"]["value_by_index"].values()]
        retain_ratios = forget_truth_ratios(retain_log, "retain_log")
        log["forget_quality"] = {"agg_value": metrics.forget_quality(ratios, retain_ratios)}
    log["model_utility"] = {"agg_value": metrics.model_utility([log[key]["agg_value"] for key in UTILITY_METRICS])}
    return log


def summary(log: Mapping[str, dict]) -> dict[str, float]:
    """The aggregate numbers of a log in one flat row.

    Args:
        log: as `evaluate_tofu` or `rfa_llm.evaluation.log.read_log` returns it.

    Returns:
        `{set}_prob`, `{set}_rouge` and `{set}_truth_ratio` for each of the four sets (normalised probability on real
        authors and world facts), `model_utility`, and what else of `SUMMARY` the log has. A metric without a value is
        left out: OpenUnlearning writes `null` for a forget quality that it had no retain log for.
    """
    values = {column: log[metric]["agg_value"] for column, metric in SUMMARY.items() if metric in log}
    return {column: value for column, value in values.items() if value is not None}


def check_sizes(batch_size: int, max_new_tokens: int) -> None:
    """Check two settings of `evaluate_tofu`.

    Raises:
        ValueError: one is no whole number, or below 1.
    """
    if any(not isinstance(size, int) or size < 1 for size in (batch_size, max_new_tokens)):
        raise ValueError(
            f"batch_size, max_new_tokens: {batch_size} and {max_new_tokens} must both be whole numbers of 1 or more."
        )


def check_questions(
    sets: Mapping[str, Dataset], retain_log: str | os.PathLike | dict | None, gradient_norm: bool = False
) -> dict | None:
    """Check what `evaluate_tofu` is to be given, before hours of anything else.

    Args:
        sets, retain_log, gradient_norm: as in `evaluate_tofu`.

    Returns:
        The retain log, read.

    Raises:
        ValueError: as `evaluate_tofu`.
    """
    sets = _without_format(sets)
    checked = {name: has_paraphrases for name, (_, has_paraphrases) in SETS.items()}
    if "holdout" in sets:
        checked["holdout"] = False
    elif gradient_norm:
        raise ValueError("gradient_norm: it is an attack against a holdout set, but none is given; give it too.")
    for name, has_paraphrases in checked.items():
        if name not in sets:
            raise ValueError(f"the question set {name!r} is missing (found {sorted(sets)}); give all of {list(SETS)}.")
        texts = ["question", "answer", *(["paraphrased_answer"] if has_paraphrases else [])]
        columns = texts if name == "holdout" else [*texts, "perturbed_answer"]
        missing = [column for column in columns if column not in sets[name].column_names]
        if missing:
            raise ValueError(
                f"the question set {name!r} lacks the columns {missing} (found {sets[name].column_names}); "
                "give the perturbed split, such as forget10_perturbed."
            )
        if len(sets[name]) == 0:
            raise ValueError(f"the question set {name!r} is empty; give at least one question.")
        for column in texts:
            for index, text in enumerate(sets[name][column]):
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(
                        f"row {index} of the question set {name!r} has {column}={text!r}; give text or drop the row."
                    )
        for index, wrong in enumerate(sets[name]["perturbed_answer"] if name != "holdout" else []):
            if not isinstance(wrong, list) or not wrong:
                raise ValueError(
                    f"row {index} of the question set {name!r} has perturbed_answer={wrong!r}; "
                    "give a list of wrong answers, at least one."
                )
            empty = [text for text in wrong if not isinstance(text, str) or not text.strip()]
            if empty:
                raise ValueError(
                    f"row {index} of the question set {name!r} has {empty[0]!r} in perturbed_answer; give text there, "
                    "or drop it."
                )
    if "holdout" in sets:
        _check_holdout(sets)
    if retain_log is None:
        return None
    retain_log = retain_log if isinstance(retain_log, dict) else read_log(retain_log, "retain_log")
    count = len(forget_truth_ratios(retain_log, "retain_log"))
    if count != len(sets["forget"]):
        raise ValueError(
            f"retain_log has {count} truth ratios but the forget set has {len(sets['forget'])} questions; give the "
            "log of a retain-only model on the same forget set."
        )
    # Token by token decoded answers may differ in their spaces, or in a character that a tokenizer does not know.
    texts = read_answers(retain_log)
    others = sum(
        "".join(text.split()) != "".join(answer.split())
        for text, answer in zip(texts, sets["forget"]["answer"], strict=False)
    )
    if others > MOST_OTHERS * count:
        raise ValueError(
            f"retain_log is of another forget set: {others} of its {count} answers are others; give the log of a "
            "retain-only model on the same forget set."
        )
    if "holdout" in sets:
        _check_attacks(retain_log, sets)
    return retain_log


def _without_format(sets: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """With one, such as "numpy", lists would be arrays."""
    return {name: rows.with_format(None) for name, rows in sets.items()}


def _check_holdout(sets: Mapping[str, Dataset]) -> None:
    """Check that no holdout row is one that the model may have seen, which would make the attacks look defeated."""
    rows = list(zip(sets["holdout"]["question"], sets["holdout"]["answer"], strict=True))
    for name in ("forget", "retain"):
        seen = set(zip(sets[name]["question"], sets[name]["answer"], strict=True))
        both = [index for index, row in enumerate(rows) if row in seen]
        if both:
            raise ValueError(
                f"{len(both)} rows of the question set 'holdout' are in {name!r} too, the first of them row {both[0]} "
                "(counted from 0); give rows that the model never saw."
            )


def _check_attacks(retain_log: dict, sets: Mapping[str, Dataset]) -> None:
    """Check that the retain log's attacks, where it has them, can be compared with."""
    if "mia_loss" in retain_log:
        for half in ("forget", "holdout"):
            found, count = len(read_attack_scores(retain_log, "mia_loss", half)), len(sets[half])
            if found != count:
                raise ValueError(
                    f"retain_log has {found} {half} rows under mia_loss, but there are {count}; give the log of a "
                    "retain-only model on the same sets."
                )
    for attack in ("mia_loss", "mia_min_k"):
        # Logs of others have no digest.
        found = retain_log.get(attack, {}).get("holdout_digest")
        if found is not None and found != _holdout_digest(_pairs(sets["holdout"])):
            raise ValueError(
                f"retain_log has {attack} against other holdout rows; give the log of a retain-only model with the "
                "same holdout_dataset."
            )
    auc = retain_log.get("mia_min_k", {"agg_value": 0.5})["agg_value"]
    if auc is None or not 0 <= auc < 1:
        raise ValueError(
            f"retain_log has an AUC of {auc} under mia_min_k, to which PrivLeak has no ratio; give the log of a model "
            "that never saw the forget set, or take the metric out of it."
        )


def probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    name: str,
    batch_size: int = 16,
    moments: bool = False,
) -> tuple[list[AnswerScore], dict[str, dict]]:
    """Probabilities and truth ratios of one question set, from one pass over all its answers.

    Args:
        model, tokenizer, batch_size: as in `evaluate_tofu`.
        rows: the set's rows.
        name: which set of `SETS` they are of.
        moments: whether the true answers' scores are to have theirs.

    Returns:
        the true answers' scores, and the set's part of the log.
    """
    prefix, has_paraphrases = SETS[name]
    wrong_counts = [len(row["perturbed_answer"]) for row in rows]
    pairs = [(row["question"], row["answer"]) for row in rows]
    if has_paraphrases:
        pairs += [(row["question"], row["paraphrased_answer"]) for row in rows]
    pairs += [(row["question"], wrong) for row in rows for wrong in row["perturbed_answer"]]

    scores = answer_scores(
        model,
        tokenizer,
        [{"question": question, "answer": answer} for question, answer in pairs],
        batch_size=batch_size,
        moments=len(rows) if moments else 0,
        desc=f"{name}: losses",
    )
    all_losses = [score.loss for score in scores]
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
    return scores[: len(rows)], log


def _rouge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: dict[str, list[dict]],
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, dict]:
    """ROUGE of each set's greedy answers, all of them from one pass; the log keeps the texts beside the scores."""
    generations = iter(
        greedy_answers(
            model,
            tokenizer,
            _pairs([row for rows in questions.values() for row in rows]),
            # A step of generation sees one token a row.
            batch_size=4 * batch_size,
            max_new_tokens=max_new_tokens,
            desc="greedy answers",
        )
    )
    log = {}
    for name, rows in questions.items():
        texts = [next(generations) for _ in rows]
        scores = metrics.rouge(texts, [row["answer"] for row in rows])
        by_row = [
            {**score, "input": row["question"], "ground_truth": row["answer"], "generation": text}
            for score, row, text in zip(scores, rows, texts, strict=True)
        ]
        mean = float(np.mean([score["rougeL_recall"] for score in scores]))
        log[f"{SETS[name][0]}_Q_A_ROUGE"] = _metric(mean, by_row)
    return log


def _pairs(rows: Iterable[dict]) -> list[dict]:
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def _holdout_digest(pairs: list[dict]) -> str:
    """A name for the rows that attacks are held against, so that no others are compared with."""
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def _memorisation(scores: list[AnswerScore]) -> dict[str, dict]:
    """How much of the forget set's answers greedy decoding would give back, closing tokens left out."""
    log = {}
    for metric, function in (
        ("extraction_strength", memorisation.extraction_strength),
        ("exact_memorization", memorisation.exact_memorisation),
    ):
        values = [function(score.matches[:-1]) for score in scores]
        log[metric] = _metric(float(np.mean(values)), [{"score": value} for value in values])
    return log


def _fluency(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rouge: dict, batch_size: int
) -> dict[str, dict]:
    """How well the greedy answers to the forget questions are written; perplexity under the model itself, its adapter
    off, which is the target's where the adapter is what unlearning has trained. The closing token counts, also of an
    answer that was cut before it."""
    rows = [{"question": row["input"], "answer": row["generation"]} for row in rouge["value_by_index"].values()]
    texts = [row["answer"] for row in rows]
    repeated = [fluency.repetition(text, 4) for text in texts]
    log = {
        "forget_Q_A_distinct_2": {"agg_value": fluency.distinct_n(texts, 2)},
        "forget_Q_A_repetition_4": _metric(float(np.mean(repeated)), [{"score": value} for value in repeated]),
    }
    answered = [row for row in rows if row["answer"]]
    if answered:
        with adapter_off(model) if isinstance(model, PeftModel) else nullcontext():
            scores = answer_scores(model, tokenizer, answered, batch_size=batch_size, desc="forget: perplexity")
        counts = [len(score.token_losses) for score in scores]
        log["forget_Q_A_perplexity"] = {"agg_value": fluency.perplexity([score.loss for score in scores], counts)}
    return log


def _membership(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget_rows: list[dict],
    forget_scores: list[AnswerScore],
    holdout_rows: list[dict],
    batch_size: int,
    gradient_norm: bool,
    retain_log: dict | None,
) -> dict[str, dict]:
    """The membership attacks: do forget rows look more like training data than holdout rows?"""
    forget_rows, holdout_rows = _pairs(forget_rows), _pairs(holdout_rows)
    holdout_scores = answer_scores(
        model, tokenizer, holdout_rows, batch_size=batch_size, moments=len(holdout_rows), desc="holdout: losses"
    )
    halves = {"forget": (forget_rows, forget_scores), "holdout": (holdout_rows, holdout_scores)}
    attacks = {"mia_loss": {}, "mia_zlib": {}, "mia_min_k": {}, "mia_min_k_plus_plus": {}}
    for half, (rows, scores) in halves.items():
        attacks["mia_loss"][half] = [score.loss for score in scores]
        attacks["mia_zlib"][half] = [
            memorisation.zlib_score(score.loss, row["answer"]) for score, row in zip(scores, rows, strict=True)
        ]
        attacks["mia_min_k"][half] = [memorisation.min_k(-score.token_losses[:-1]) for score in scores]
        attacks["mia_min_k_plus_plus"][half] = [
            memorisation.min_k_plus_plus(-score.token_losses[:-1], score.means[:-1], score.deviations[:-1])
            for score in scores
        ]
    if gradient_norm:
        attacks["mia_gradnorm"] = {
            half: answer_gradient_norms(model, tokenizer, rows) for half, (rows, _) in halves.items()
        }
    if retain_log is not None and "mia_loss" in retain_log:
        attacks["mia_reference"] = {}
        for half in halves:
            reference = read_attack_scores(retain_log, "mia_loss", half)
            attacks["mia_reference"][half] = (np.array(attacks["mia_loss"][half]) - reference).tolist()
    log = {
        attack: {
            "agg_value": memorisation.membership_auc(values["forget"], values["holdout"]),
            "holdout_digest": _holdout_digest(holdout_rows),
            **{
                half: _metric(float(np.mean(values[half])), [{"score": value} for value in values[half]])
                for half in halves
            },
        }
        for attack, values in attacks.items()
    }
    if retain_log is not None and "mia_min_k" in retain_log:
        retain_auc = retain_log["mia_min_k"]["agg_value"]
        log["privleak"] = {"agg_value": memorisation.privleak(log["mia_min_k"]["agg_value"], retain_auc)}
    return log


def _probability_metric(losses: list[float]) -> dict:
    probs = metrics.answer_probability(losses)
    rows = [{"prob": prob, "avg_loss": loss} for prob, loss in zip(probs.tolist(), losses, strict=True)]
    return _metric(float(probs.mean()), rows)


def _metric(agg_value: float, rows: list[dict]) -> dict:
    return {"agg_value": agg_value, "value_by_index": {str(index): row for index, row in enumerate(rows)}}
