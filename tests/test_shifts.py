from __future__ import annotations

import math

import pytest
import torch

from rfa_llm.shifts import (
    ignorant_shift,
    local_shift,
    mean_shift,
    negate_shift,
    random_directions,
    random_shift,
    smoothed_shift,
)

GENERATOR = torch.Generator().manual_seed(0)
H0, OTHER = (torch.randn(5, 6, generator=GENERATOR) for _ in range(2))
VECTOR, STYLE = torch.randn(6, generator=GENERATOR), torch.randn(7, 6, generator=GENERATOR)


def norm(token: int) -> float:
    return math.sqrt(sum(x * x for x in H0[token].tolist()))


@pytest.mark.parametrize(
    ("shift", "element"),
    [
        (mean_shift(H0, VECTOR), lambda t, i: VECTOR[i].item() - H0[t, i].item()),
        (random_shift(H0, VECTOR, 0.7), lambda t, i: 0.7 * norm(t) * VECTOR[i].item()),
        (negate_shift(H0, 0.7), lambda t, i: -0.7 * H0[t, i].item()),
        (ignorant_shift(H0, OTHER, None), lambda t, i: OTHER[t, i].item() - H0[t, i].item()),
        (
            ignorant_shift(H0, OTHER, STYLE),
            lambda t, i: (
                OTHER[t, i].item()
                - H0[t, i].item()
                + STYLE[6, i].item()
                + sum(OTHER[t, j].item() * STYLE[j, i].item() for j in range(6))
            ),
        ),
        (local_shift(H0, OTHER), lambda t, i: OTHER[t, i].item() - H0[t, i].item()),
        (smoothed_shift(H0, OTHER), lambda t, i: OTHER[t, i].item() - H0[t, i].item()),
    ],
    ids=["mean", "random", "negate", "ignorant", "ignorant-style", "local", "smoothed"],
)
def test_shifts_element_by_element(shift, element):
    expected = torch.tensor([[element(t, i) for i in range(6)] for t in range(5)])
    torch.testing.assert_close(shift, expected)


def test_random_directions_are_unit_vectors_of_their_seed():
    directions = random_directions(3, 64, seed=7)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3))
    assert (directions @ directions.T).fill_diagonal_(0).abs().max() < 0.5  # none is another one
    torch.manual_seed(1)
    assert torch.equal(random_directions(3, 64, seed=7), directions)
    assert not torch.allclose(random_directions(3, 64, seed=8), directions)
