from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch

from rfa_llm.evaluation.memorisation import (
    exact_memorisation,
    extraction_strength,
    membership_auc,
    min_k,
    min_k_plus_plus,
    privleak,
    zlib_score,
)


@pytest.mark.parametrize(
    ("matches", "exact", "strength"),
    [
        ([1, 1, 1, 1], 1, 1),
        ([0, 0, 0, 0], 0, 1 / 4),
        ([0, 1, 1, 1], 3 / 4, 3 / 4),
        # A prefix of three tokens, whatever matched within it.
        ([1, 1, 0, 1], 3 / 4, 1 / 4),
        ([0, 1, 0, 1, 1], 3 / 5, 2 / 5),
        # The last token is wrong: all but one token do not help.
        ([1, 1, 1, 0], 3 / 4, 1 / 4),
        ([1], 1, 1),
        # With one token there is no shorter prefix than none: k = n - 1 = 0.
        ([0], 0, 1),
    ],
)
def test_memorisation_by_hand(matches, exact, strength):
    assert exact_memorisation(matches) == exact
    assert extraction_strength(np.array(matches, dtype=bool)) == pytest.approx(strength)


def test_extraction_strength_is_the_shortest_prefix_that_works():
    generator = np.random.default_rng(0)
    for _ in range(200):
        matches = generator.random(generator.integers(1, 9)) < 0.7
        n = len(matches)
        prefixes = [k for k in range(n) if all(matches[k:])]
        assert extraction_strength(matches) == pytest.approx(1 - (min(prefixes) if prefixes else n - 1) / n)


def test_min_k_by_hand():
    # int(0.4 * 5) = 2 and int(0.4 * 4) = 1, the lowest of them; unsorted.
    assert min_k([-1.0, -8.0, -2.0, -4.0, -0.5]) == pytest.approx(6)
    assert min_k([-1.0, -8.0, -2.0, -4.0]) == pytest.approx(8)
    # Never fewer than one.
    assert min_k([-1.0, -3.0]) == pytest.approx(3)
    assert min_k([-3.0]) == pytest.approx(3)
    assert min_k([-1.0, -2.0, -6.0], share=1.0) == pytest.approx(3)
    assert min_k([-2.0, -2.0, -2.0, -2.0, -2.0]) == pytest.approx(2)


def test_min_k_plus_plus_by_hand():
    # Standardised: 0, -2, 1, -1, 3. The lowest log-probability is not the lowest of these.
    log_probs = [-9.0, -3.0, -1.0, -5.0, -0.5]
    means = [-9.0, -1.0, -2.0, -3.0, -2.0]
    deviations = [1.0, 1.0, 1.0, 2.0, 0.5]
    assert min_k_plus_plus(log_probs, means, deviations) == pytest.approx(1.5)
    assert min_k_plus_plus(log_probs, means, deviations, share=0.2) == pytest.approx(2)
    assert min_k_plus_plus([-1.0], [-2.0], [0.5]) == pytest.approx(-2)


def test_min_k_plus_plus_bounds_the_deviation():
    # A sure model: log-probability and mean are both 0.
    assert min_k_plus_plus([0.0], [0.0], [0.0]) == 0
    assert min_k_plus_plus([-0.5], [0.0], [0.0]) == pytest.approx(500)
    assert min_k_plus_plus([-0.5], [0.0], [0.002]) == pytest.approx(250)


def test_min_k_plus_plus_from_a_model_of_three_tokens():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [3.0, -2.0, 0.0]], dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    means = (log_p.exp() * log_p).sum(-1)
    deviations = ((log_p.exp() * (log_p - means[:, None]) ** 2).sum(-1)).sqrt()
    scores = [
        min_k_plus_plus(log_p[range(3), tokens].numpy(), means.numpy(), deviations.numpy())
        for tokens in np.ndindex(3, 3, 3)
    ]
    # The score sees the lowest of three; the likeliest tokens look most like a member.
    assert np.argmin(scores) == np.ravel_multi_index((0, 1, 0), (3, 3, 3))
    # Tokens drawn from the model have standardised log-probabilities of mean 0 and variance 1.
    standardised = (log_p - means[:, None]) / deviations[:, None]
    assert (log_p.exp() * standardised).sum(-1).numpy() == pytest.approx(0)
    assert max(scores) == pytest.approx(-standardised.min().item())


def test_zlib_score():
    text = "naïve " * 40
    assert zlib_score(3.0, text) == 3.0 / len(zlib.compress(text.encode()))
    # Of two answers with one loss, the repetitive one compresses well: its loss counts for more.
    assert zlib_score(1.0, "ab" * 20) > zlib_score(1.0, "The quick brown fox jumps over a lazy dog")


def test_membership_auc_by_hand():
    assert membership_auc([1.0, 2.0], [3.0, 4.0, 5.0]) == 1
    assert membership_auc([3.0, 4.0], [1.0, 2.0]) == 0
    assert membership_auc([1.0, 4.0], [2.0, 3.0]) == 0.5
    # Pairs (1, 2) won, (2, 2) drawn: 1.5 of 2.
    assert membership_auc([1.0, 2.0], [2.0]) == 0.75
    assert membership_auc([1.0], [1.0]) == 0.5
    assert membership_auc([7.0] * 4, [7.0] * 3) == 0.5
    assert membership_auc([0.0, 1.0], [math.inf, math.inf]) == 1


def test_membership_auc_against_every_pair():
    generator = np.random.default_rng(1)
    for forget_size, holdout_size in ((1, 7), (5, 5), (40, 30)):
        # Few values, so that many pairs tie.
        forget = generator.integers(0, 6, forget_size).astype(float)
        holdout = generator.integers(1, 8, holdout_size).astype(float)
        pairs = [(f < h) + 0.5 * (f == h) for f in forget for h in holdout]
        assert membership_auc(forget, holdout) == pytest.approx(sum(pairs) / len(pairs))
        assert membership_auc(holdout, forget) == pytest.approx(1 - sum(pairs) / len(pairs))


def test_privleak():
    assert privleak(0.5, 0.5) == 0
    # The forget set stands out: 0.1 against 0.4 of the complement.
    assert privleak(0.9, 0.6) == pytest.approx(-75)
    assert privleak(0.2, 0.6) == pytest.approx(100)
    assert privleak(1.0, 0.5) == pytest.approx(-100)
    with pytest.raises(ValueError, match="retain_auc is 1"):
        privleak(0.5, 1.0)


def test_empty_input_is_refused():
    for function in (exact_memorisation, extraction_strength):
        with pytest.raises(ValueError, match="matches is empty"):
            function([])
    with pytest.raises(ValueError, match="token_log_probs is empty"):
        min_k([])
    with pytest.raises(ValueError, match="token_log_probs is empty"):
        min_k_plus_plus([], [], [])
    with pytest.raises(ValueError, match="forget_scores is empty"):
        membership_auc([], [1.0])
    with pytest.raises(ValueError, match="holdout_scores is empty"):
        membership_auc([1.0], [])


def test_bad_input_is_refused():
    # Neither the sort of min_k nor a rank would show a NaN.
    with pytest.raises(ValueError, match="token_log_probs holds NaN"):
        min_k([-1.0, -2.0, math.nan])
    with pytest.raises(ValueError, match="token_log_probs holds NaN"):
        min_k_plus_plus([-1.0, -2.0], [-1.0, -1.0], [1.0, math.nan])
    with pytest.raises(ValueError, match="holdout_scores holds NaN"):
        membership_auc([1.0], [math.nan, 2.0])
    # One mean would otherwise be broadcast to every token.
    with pytest.raises(ValueError, match=r"shapes \(2,\), \(1,\) and \(2,\)"):
        min_k_plus_plus([-1.0, -2.0], [-1.0], [1.0, 1.0])
    for share in (0, 40):
        with pytest.raises(ValueError, match=f"share is {share}"):
            min_k([-1.0], share=share)
