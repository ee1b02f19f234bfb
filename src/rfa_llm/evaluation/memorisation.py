"""How much of an answer a model still holds: memorisation, and membership inference, as functions of numbers.

They follow OpenUnlearning (Dorna et al., 2025, arXiv 2506.12618) where the papers leave a choice. What concerns single
tokens leaves out the end-of-sequence token that closes an answer; an answer's loss, a mean over its tokens in nats,
includes it (`rfa_llm.evaluation.scores`).

Five scores tell members of the training set from others, and every one is lower for members: the loss itself (Yeom
et al., 2018, arXiv 1709.01604), the loss minus that of a reference model on the same answer, `zlib_score` (both
Carlini et al., 2021, arXiv 2012.07805), `min_k` and `min_k_plus_plus`. `membership_auc` sums up any of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import scipy

# The least deviation to divide by: OpenUnlearning keeps the variance at 1e-6 or above.
LEAST_DEVIATION = 1e-3


def exact_memorisation(matches: Sequence[bool]) -> float:
    """The share of an answer's tokens that are the model's first choice (Tirumala et al., 2022, arXiv 2205.10770).

    Args:
        matches: bool of shape (n,), for each of the answer's tokens without the closing end-of-sequence token: is it
            the arg-max of the model's next-token distribution, given the true tokens before it?

    Returns:
        the share, in [0, 1].

    Raises:
        ValueError: there are no tokens.
    """
    return float(np.mean(_matches(matches)))


def extraction_strength(matches: Sequence[bool]) -> float:
    """1 - k / n, k the shortest prefix after which the model's first choice is right to the end.

    Carlini et al., 2021 (arXiv 2012.07805), as OpenUnlearning measures it: k is at most n - 1, so that an answer whose
    last token is wrong scores 1 / n, as does one whose last token alone is right.

    Args:
        matches: as in `exact_memorisation`, the closing end-of-sequence token left out.

    Returns:
        the strength, in [1 / n, 1]; 1 where every token matches, and on any answer of one token, right or wrong.

    Raises:
        ValueError: there are no tokens.
    """
    matches = _matches(matches)
    misses = np.flatnonzero(~matches)
    prefix = min(int(misses[-1]) + 1, matches.size - 1) if misses.size else 0
    return 1 - prefix / matches.size


def _matches(matches: Sequence[bool]) -> np.ndarray:
    matches = np.asarray(matches, dtype=bool)
    if matches.size == 0:
        raise ValueError("matches is empty; give one for each token of the answer.")
    return matches


def min_k(token_log_probs: Sequence[float], share: float = 0.4) -> float:
    """Min-K%: the mean of an answer's lowest log-probabilities, negated (Shi et al., 2024, arXiv 2310.16789).

    Args:
        token_log_probs: log-probabilities in nats of the answer's n tokens, the closing end-of-sequence token left
            out.
        share: how many are averaged, rounded as in OpenUnlearning: int(share * n), and at least one.

    Returns:
        the score, at least 0; lower for members.

    Raises:
        ValueError: there are no tokens, one is NaN, or `share` is not in (0, 1].
    """
    return _lowest("token_log_probs", np.asarray(token_log_probs, dtype=np.float64), share)


def min_k_plus_plus(
    token_log_probs: Sequence[float], means: Sequence[float], deviations: Sequence[float], share: float = 0.4
) -> float:
    """Min-K%++: `min_k` of standardised log-probabilities (Zhang et al., 2024, arXiv 2404.02936).

    Args:
        token_log_probs: as in `min_k`, shape (n,).
        means: at each position the mean of log p(z) over z drawn from the model's next-token distribution p.
        deviations: its standard deviation there. One below 1e-3, as of a distribution that is sure or uniform, is
            taken for 1e-3 (OpenUnlearning bounds the variance by 1e-6).
        share: as in `min_k`.

    Returns:
        the score, of either sign; lower for members.

    Raises:
        ValueError: the three differ in length, there are no tokens, a value is NaN, or `share` is not in (0, 1].
    """
    log_probs, means, deviations = (
        np.asarray(values, dtype=np.float64) for values in (token_log_probs, means, deviations)
    )
    if not log_probs.shape == means.shape == deviations.shape:
        raise ValueError(
            f"token_log_probs, means and deviations have shapes {log_probs.shape}, {means.shape} and "
            f"{deviations.shape}; give one of each for every token."
        )
    standardised = (log_probs - means) / np.maximum(deviations, LEAST_DEVIATION)
    return _lowest("standardised token_log_probs", standardised, share)


def _lowest(name: str, values: np.ndarray, share: float) -> float:
    if values.size == 0:
        raise ValueError(f"{name} is empty; give one for each token of the answer.")
    # Sorting puts NaN last, where the mean would not see it.
    if np.isnan(values).any():
        raise ValueError(f"{name} holds NaN; check the model's weights, or its adapter's.")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; give a share of the tokens above 0 and up to 1, such as 0.4.")
    return float(-np.mean(np.sort(values)[: max(1, int(values.size * share))]))


def zlib_score(loss: float, text: str) -> float:
    """The loss over the length of the zlib-compressed answer (Carlini et al., 2021, arXiv 2012.07805).

    Args:
        loss: the answer's mean loss per token in nats, as in OpenUnlearning (not the sum over its tokens).
        text: the answer, without special tokens.

    Returns:
        nats per token and per byte of `zlib.compress` on the text's UTF-8; lower for members.
    """
    return float(loss) / len(zlib.compress(text.encode("utf-8")))


def membership_auc(forget_scores: Sequence[float], holdout_scores: Sequence[float]) -> float:
    """P(forget < holdout) + P(forget = holdout) / 2: the area under the ROC curve of a membership score.

    By `scipy.stats.mannwhitneyu`, whose U is that probability times the number of pairs.

    Args:
        forget_scores: the scores of the forget set, lower for members.
        holdout_scores: those of rows of the same kind that the model never saw.

    Returns:
        the AUC, 1 where every forget row looks more like a member than every holdout row, 1/2 where the two cannot be
        told apart.

    Raises:
        ValueError: one of the two is empty or holds NaN.
    """
    forget = np.asarray(forget_scores, dtype=np.float64)
    holdout = np.asarray(holdout_scores, dtype=np.float64)
    for name, scores in (("forget_scores", forget), ("holdout_scores", holdout)):
        if scores.size == 0:
            raise ValueError(f"{name} is empty; the AUC compares two sets of at least one row each.")
        if np.isnan(scores).any():
            raise ValueError(f"{name} holds NaN; check the model's weights, or its adapter's.")
    # U alone is wanted; the asymptotic p-value is the cheap one.
    pairs_won = scipy.stats.mannwhitneyu(holdout, forget, method="asymptotic").statistic
    return float(pairs_won / (forget.size * holdout.size))


def privleak(auc: float, retain_auc: float) -> float:
    """PrivLeak: 100 ((1 - AUC) - (1 - AUC_retain)) / (1 - AUC_retain) (MUSE, Shi et al., 2024, arXiv 2407.06460).

    MUSE's AUC is 1 where forget rows look *unlike* members, hence the complements. OpenUnlearning adds 1e-10 to the
    denominator; nothing is added here.

    Args:
        auc: the unlearned model's `membership_auc` on `min_k`.
        retain_auc: that of a model trained on the retain set alone.

    Returns:
        per cent; 0 where the two models leak alike, negative where the unlearned one still knows the forget set,
        positive where it has unlearned beyond the retrained one.

    Raises:
        ValueError: `retain_auc` is 1.
    """
    if retain_auc == 1:
        raise ValueError(
            "retain_auc is 1, which leaves nothing to divide by; check that the retain model never saw the forget set."
        )
    return float(100 * ((1 - auc) - (1 - retain_auc)) / (1 - retain_auc))
