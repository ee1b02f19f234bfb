from __future__ import annotations

import math

import pytest

from rfa_llm.evaluation.fluency import distinct_n, perplexity, repetition


def test_distinct_n_counts_over_all_texts():
    texts = ["the cat saw the dog", "the cat ran"]
    # Of 8 words: the, cat, saw, dog, ran.
    assert distinct_n(texts, 1) == pytest.approx(5 / 8)
    # "the cat" in both; no bigram runs from one text into the next.
    assert distinct_n(texts, 2) == pytest.approx(5 / 6)
    assert distinct_n(texts, 4) == 1
    assert distinct_n(["a a a a"], 2) == pytest.approx(1 / 3)


def test_distinct_n_of_texts_that_are_too_short():
    assert distinct_n(["one two", "one two three", ""], 3) == 1
    assert distinct_n(["", "one"], 2) == 0


def test_repetition_by_hand():
    # Four-grams abcd, bcda, cdab, dabc, abcd: one of five occurred before.
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a b c d e f g h") == 0
    assert repetition("no no no no no no") == pytest.approx(2 / 3)
    assert repetition("a b a c a", n=1) == pytest.approx(2 / 5)


def test_repetition_of_short_texts():
    assert repetition("") == 0
    assert repetition("a a a") == 0
    assert repetition("a a a a") == 0
    assert repetition("a", n=1) == 0


def test_words_are_split_at_any_white_space():
    assert repetition("a b\n\na  b\ta b", n=2) == pytest.approx(3 / 5)
    # Case and punctuation tell words apart.
    assert distinct_n(["The the the."], 1) == 1


def test_perplexity_weighs_tokens_alike():
    # Three tokens of probability 1/2 and one of 1/16: (1/8 * 1/16) ** (-1/4).
    assert perplexity([math.log(2), math.log(16)], [3, 1]) == pytest.approx(2 ** (7 / 4))
    assert perplexity([math.log(5)], [7]) == pytest.approx(5)
    assert perplexity([0.0, 0.0], [1, 2]) == 1
    assert perplexity([1000.0], [1]) == math.inf


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="texts is empty"):
        distinct_n([], 2)
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n(["a b"], 0)
    with pytest.raises(ValueError, match="n is 0"):
        repetition("a b", n=0)
    with pytest.raises(ValueError, match="losses is empty"):
        perplexity([], [])
    with pytest.raises(ValueError, match=r"shape \(2,\) and token_counts \(1,\)"):
        perplexity([1.0, 2.0], [3])
    with pytest.raises(ValueError, match="token_counts holds 0"):
        perplexity([1.0, 2.0], [3, 0])
