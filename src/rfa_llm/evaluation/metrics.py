"""TOFU's metrics as functions of numbers (Maini et al., 2024, "TOFU: A Task of Fictitious Unlearning for LLMs").

The losses they take are mean cross-entropies over an answer's tokens, in nats (`rfa_llm.evaluation.scores`).

OpenUnlearning adds 1e-10 to the denominators of the normalised probability, of the truth ratio and of 1 / TR; nothing
is added here. The two agree to 1e-6 (relative) while exp(-loss) of the answer stays above 1e-4, which is to say for
losses below 9; beyond 20 or so, as in a model that unlearning has broken, its truth ratios sink towards 0 and ours
do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Its modules load as they are used; scipy.stats takes longer than all of this package.
import scipy


def answer_probability(losses: Sequence[float]) -> np.ndarray:
    """The probability of each answer, normalised for its length: exp(-loss) (TOFU, section 2.2).

    Args:
        losses: the losses of n answers.

    Returns:
        float64 array of shape (n,), in [0, 1].
    """
    return np.exp(-np.asarray(losses, dtype=np.float64))


def normalised_probability(losses: Sequence[float], wrong_losses: Sequence[Sequence[float]]) -> np.ndarray:
    """The probability of each answer among its alternatives, p / (p + sum of the wrong answers' p).

    TOFU's probability on real authors and world facts.

    Args:
        losses: the losses of n true answers.
        wrong_losses: for each of them the losses of its wrong answers.

    Returns:
        float64 array of shape (n,), in [0, 1].

    Raises:
        ValueError: the two differ in length.
    """
    # p / (p + sum p_k) = 1 / (1 + sum exp(l - l_k)): stays a number where every p underflows.
    with np.errstate(over="ignore"):
        return np.array(
            [
                1 / (1 + np.exp(loss - np.asarray(wrong, dtype=np.float64)).sum())
                for loss, wrong in zip(losses, wrong_losses, strict=True)
            ]
        )


def truth_ratio(paraphrased_losses: Sequence[float], wrong_losses: Sequence[Sequence[float]]) -> np.ndarray:
    """The raw truth ratio of each question: exp(-mean_k l(wrong_k)) / exp(-l(paraphrased)).

    The wrong answers enter by their geometric mean, as in the code of TOFU and of OpenUnlearning (equation 1 of the
    paper writes an arithmetic one).

    Args:
        paraphrased_losses: the losses of n paraphrased true answers.
        wrong_losses: for each of them the losses of its wrong answers.

    Returns:
        float64 array of shape (n,), at least 0.

    Raises:
        ValueError: the two differ in length.
    """
    exponents = [loss - np.mean(wrong) for loss, wrong in zip(paraphrased_losses, wrong_losses, strict=True)]
    with np.errstate(over="ignore"):
        return np.exp(np.array(exponents, dtype=np.float64))


def forget_truth_ratio_score(ratios: Sequence[float]) -> float:
    """mean(min(TR, 1 / TR)) over raw truth ratios: 1 where true and wrong answers are equally likely (forget set)."""
    ratios = np.asarray(ratios, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return float(np.mean(np.minimum(ratios, 1 / ratios)))


def kept_truth_ratio_score(ratios: Sequence[float]) -> float:
    """mean(max(0, 1 - TR)) over raw truth ratios: 1 where only the true answer is likely (every set but forget)."""
    return float(np.mean(np.maximum(0, 1 - np.asarray(ratios, dtype=np.float64))))


def rouge(predictions: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """ROUGE with stemming, by the `rouge_score` package; TOFU reports `rougeL_recall`.

    Args:
        predictions: n generated answers.
        references: the n true answers.

    Returns:
        for each pair `rouge1_recall`, `rougeL_f1` and `rougeL_recall`, in [0, 1].

    Raises:
        ValueError: the two differ in length.
    """
    # Here, because it brings nltk and, where that is installed, scikit-learn: a second for whoever only trains.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    pairs = []
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score(target=reference, prediction=prediction)
        pairs.append(
            {
                "rouge1_recall": scores["rouge1"].recall,
                "rougeL_f1": scores["rougeL"].fmeasure,
                "rougeL_recall": scores["rougeL"].recall,
            }
        )
    return pairs


def model_utility(values: Sequence[float]) -> float:
    """The harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real authors and world facts.

    Args:
        values: the nine numbers, each at least 0.

    Returns:
        their harmonic mean (`scipy.stats.hmean`), 0 where one of them is 0.

    Raises:
        ValueError: there are not nine numbers, or one is negative.
    """
    if len(values) != 9:
        raise ValueError(
            f"model_utility got {len(values)} values; give nine: probability, ROUGE and truth ratio "
            "on each of retain, real authors and world facts."
        )
    if min(values) < 0:
        raise ValueError(f"model_utility got {min(values)}; a score is at least 0.")
    return float(scipy.stats.hmean(np.asarray(values, dtype=np.float64)))


def forget_test(unlearned_ratios: Sequence[float], retain_ratios: Sequence[float]):
    """The two-sample Kolmogorov-Smirnov test between truth ratios whose p-value is the forget quality.

    Its result is that of `scipy.stats.ks_2samp`: `pvalue`, `statistic` and `statistic_location`, a truth ratio.

    Args:
        unlearned_ratios: the unlearned model's raw truth ratios on the forget set.
        retain_ratios: those of a model trained on the retain set alone, on the same questions.

    Raises:
        ValueError: one of the two is empty.
    """
    if not len(unlearned_ratios) or not len(retain_ratios):
        raise ValueError("forget_quality got no truth ratios of one model; give those of both.")
    return scipy.stats.ks_2samp(unlearned_ratios, retain_ratios)


def forget_quality(unlearned_ratios: Sequence[float], retain_ratios: Sequence[float]) -> float:
    """The p-value of `forget_test`, in [0, 1]: near 0 where the two models are told apart, and any number alike where
    they are not, so it is no distance."""
    return float(forget_test(unlearned_ratios, retain_ratios).pvalue)
