from __future__ import annotations

import pytest
import torch
from torch import nn

from rfa_llm.residuals import capture, forget_loss, retain_loss, squared_ratio


def features(blocks=2, n=5, hidden=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, hidden, generator=generator) for _ in range(blocks)]


def naive_loss(residuals, shifts, references) -> float:
    blocks = []
    for residual, shift, reference in zip(residuals, shifts, references, strict=True):
        ratios = []
        for token in range(len(reference)):
            difference = [r - s for r, s in zip(residual[token].tolist(), shift[token].tolist(), strict=True)]
            ratios.append(sum(x * x for x in difference) / sum(x * x for x in reference[token].tolist()))
        blocks.append(sum(ratios) / len(ratios))
    return sum(blocks) / len(blocks)


def test_losses_by_hand():
    residual = [torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])]
    reference = [torch.tensor([[5.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])]
    shift = [torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])]
    # Block 1: (25/25 + 1/2) / 2; block 2: (1/4 + 0) / 2.
    assert retain_loss(residual, reference, 2).item() == pytest.approx((0.75 + 0.125) / 2)
    # Block 1: (16/25 + 2/2) / 2; block 2: (1/4 + 9) / 2.
    assert forget_loss(residual, shift, reference, 2).item() == pytest.approx((0.82 + 4.625) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_the_naive_sums(dtype):
    residual, shift, reference = ([f.to(dtype) for f in features(seed=seed)] for seed in range(3))
    zero = [torch.zeros_like(f) for f in residual]
    for loss, expected in (
        (retain_loss(residual, reference, 5), naive_loss(residual, zero, reference)),
        (forget_loss(residual, shift, reference, 5), naive_loss(residual, shift, reference)),
    ):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    ratio = squared_ratio(residual[0], reference[0])
    assert ratio.dtype == torch.float32 and ratio.shape == (5,)


def test_unequal_micro_batches_with_the_global_count_add_up_to_the_joint_batch():
    residual, shift, reference = (features(seed=seed) for seed in range(3))
    parts = [slice(0, 4), slice(4, 5), slice(5, 5)]  # the last one has no token that counts

    def part(lists, where):
        return [f[where] for f in lists]

    joint = forget_loss(residual, shift, reference, 5)
    split = [forget_loss(part(residual, p), part(shift, p), part(reference, p), torch.tensor(5)) for p in parts]
    torch.testing.assert_close(sum(split), joint)
    joint = retain_loss(residual, reference, 5)
    split = [retain_loss(part(residual, p), part(reference, p), torch.tensor(5)) for p in parts]
    torch.testing.assert_close(sum(split), joint)


def test_the_gradient_pulls_the_residual_to_the_shift():
    residual, shift, reference = (features(seed=seed) for seed in range(3))
    residual = [r.requires_grad_() for r in residual]
    forget_loss(residual, shift, reference, 5).backward()
    for r, s, h0 in zip(residual, shift, reference, strict=True):
        expected = 2 * (r - s) / h0.square().sum(-1, keepdim=True) / 5 / 2
        torch.testing.assert_close(r.grad, expected.detach())


class Block(nn.Module):
    def __init__(self, as_tuple):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, x):
        return (x + 1, "attention weights") if self.as_tuple else x + 1


def test_blocks_may_put_out_a_tensor_or_a_tuple():
    first, second = Block(as_tuple=True), Block(as_tuple=False)
    x = torch.zeros(2, 3, 4, requires_grad=True)
    with capture([second, first]) as kept:
        assert kept == [None, None]
        second(first(x)[0])
    assert torch.equal(kept[0], x + 2) and torch.equal(kept[1], x + 1)
    assert kept[0].grad_fn is not None
    assert not first._forward_hooks and not second._forward_hooks
