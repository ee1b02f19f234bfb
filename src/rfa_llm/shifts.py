"""Where a forget row's features should go: the shifts `S_b`, one small pure function each.

Every function takes the reference features `h⁰_b` of the tokens that count in one block, `[n, hidden]`, and returns
the shift `S_b` of the same shape; the unlearned feature is driven to `h⁰_b + S_b`. A shift of your own is any
callable `(reference, block) -> shift`, with `block` the block's index, given as `RFATrainer(..., shift=my_shift)`:

    def halve(reference, block):
        return -0.5 * reference

The paper (arXiv 2411.08443) leaves the shift open in its abstract; where a shift has a source of its own, its
docstring names it.
"""

from __future__ import annotations

import torch

SHIFTS = ("local", "smoothed", "ignorant", "mean", "random", "negate")


def mean_shift(reference: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """`S = μ_b − h⁰`: to the retained set's mean feature at the block, `mean` `[hidden]`."""
    return mean - reference


def random_shift(reference: torch.Tensor, direction: torch.Tensor, scale: float) -> torch.Tensor:
    """`S = c·‖h⁰‖·u_b`: along a fixed random unit direction `[hidden]`, scaled to the feature's norm.

    The idea of a fixed random target direction is RMU's (Li et al., "The WMDP Benchmark", arXiv 2403.03218).
    """
    return scale * reference.norm(dim=-1, keepdim=True) * direction


def negate_shift(reference: torch.Tensor, scale: float) -> torch.Tensor:
    """`S = −c·h⁰`: against the feature itself; `c = 1` drives it to zero."""
    return -scale * reference


def ignorant_shift(reference: torch.Tensor, teacher: torch.Tensor, style: torch.Tensor | None) -> torch.Tensor:
    """`S = h^T − h⁰ + s_b(h^T)`: to the features `[n, hidden]` of a teacher that never saw the forget set.

    `style` `[hidden + 1, hidden]` float32 is the affine map `s_b` (`rfa_llm.reference.fit_style`), the difference in
    the manner of answering that fine-tuning made everywhere; with it the shift takes away knowledge alone. `None`
    leaves it out.
    """
    shift = teacher - reference
    if style is None:
        return shift
    with torch.autocast(teacher.device.type, enabled=False):
        return shift + torch.addmm(style[-1], teacher.float(), style[:-1])


def local_shift(reference: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`S = h⁰_local(w) − h⁰`: to the model's own features with attention narrowed to the last `w` tokens and the
    attention sinks, `local` `[n, hidden]`: what it would think if it could not see whom the question is about."""
    return local - reference


def smoothed_shift(reference: torch.Tensor, smoothed: torch.Tensor) -> torch.Tensor:
    """`S = h⁰_smooth(τ) − h⁰`: to the model's own features with every attention distribution flattened by a
    temperature, `smoothed` `[n, hidden]` (the forget-teacher of Attention Smoothing Unlearning, arXiv 2603.01285,
    taken at the feature level)."""
    return smoothed - reference


def random_directions(count: int, hidden: int, seed: int) -> torch.Tensor:
    """`count` unit directions `[count, hidden]` float32, the same for the same seed on every machine's CPU."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(count, hidden, generator=generator)
    return directions / directions.norm(dim=-1, keepdim=True)
