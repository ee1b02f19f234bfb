"""Whether a model still writes well, as functions of numbers and texts.

Distinct-n follows Li et al. (2016, arXiv 1510.03055) and repetition the seq-rep-n of Welleck et al. (2020, arXiv
1908.04319). Ours are these choices: words are what white space separates, case and punctuation kept, where both papers
count tokens; distinct-n divides by the number of n-grams, where Li et al. divide by the number of tokens; and a text
too short for an n-gram repeats nothing, just as texts that are all too short hold nothing distinct.
Perplexity has the usual definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def distinct_n(texts: Sequence[str], n: int) -> float:
    """The share of distinct word n-grams among all n-grams of the texts together.

    It falls with the amount of text: compare models on answers to the same questions.

    Args:
        texts: generated texts.
        n: words in an n-gram.

    Returns:
        the share, in [0, 1]; 0 where no text has n words, as when a model answers with nothing.

    Raises:
        ValueError: there are no texts, or `n` is below 1.
    """
    if len(texts) == 0:
        raise ValueError("texts is empty; give at least one text.")
    ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def repetition(text: str, n: int = 4) -> float:
    """The share of a text's word n-grams that occurred earlier in it: 1 - distinct / all.

    Args:
        text: a generated text; the mean over texts is Welleck et al.'s number.
        n: words in an n-gram.

    Returns:
        the share, in [0, 1); 0 for a text shorter than n words.

    Raises:
        ValueError: `n` is below 1.
    """
    ngrams = _ngrams(text, n)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least one word.")
    words = text.split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def perplexity(losses: Sequence[float], token_counts: Sequence[int]) -> float:
    """exp(sum(loss * n) / sum(n)): the perplexity of a set of answers, every token weighing the same.

    Args:
        losses: each answer's mean loss per token, in nats.
        token_counts: how many tokens each of these is the mean of.

    Returns:
        the perplexity, at least 1; infinite where it is beyond float64.

    Raises:
        ValueError: there are no losses, the two differ in length, or a count is below 1.
    """
    losses = np.asarray(losses, dtype=np.float64)
    counts = np.asarray(token_counts, dtype=np.float64)
    if losses.size == 0:
        raise ValueError("losses is empty; give at least one.")
    if losses.shape != counts.shape:
        raise ValueError(
            f"losses has shape {losses.shape} and token_counts {counts.shape}; give one count for each loss."
        )
    if counts.min() < 1:
        raise ValueError(f"token_counts holds {counts.min():g}; a loss is the mean over at least one token.")
    with np.errstate(over="ignore"):
        return float(np.exp(np.average(losses, weights=counts)))
