"""The losses of the rival methods, as functions of tensors.

π is the model with its adapter on, π₀ with it off: the reference, and the second model of a paper that has one.
Each loss is a sum over the batch's tokens or rows divided by `num_tokens` or `num_rows`: those of the batch, or of the
whole global step where the batch is only a part of it. All are float32 scalars.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def nll(logits: torch.Tensor, labels: torch.Tensor, num_tokens: torch.Tensor | int) -> torch.Tensor:
    """`−mean_t log π(y_t | y_<t)`, the language model's own loss.

    Gradient ascent is `−L_forget`, gradient difference `−L_forget + L_retain` (Liu, Liu, Stone, "Continual Learning
    and Private Unlearning", arXiv 2203.12817; for language models a baseline of Maini et al., "TOFU", arXiv
    2401.06121), and IdkNLL, TOFU's "preference optimization", `L_idk + L_retain`.

    Args:
        logits: `[n, vocab]` where each token is predicted.
        labels: `[n]`, the tokens.
        num_tokens: As in the module's docstring.
    """
    return F.cross_entropy(logits.float(), labels, reduction="sum") / num_tokens


def kl(reference_logits: torch.Tensor, logits: torch.Tensor, num_tokens: torch.Tensor | int) -> torch.Tensor:
    """`mean_t KL(p_t ‖ π_t)` over next-token distributions, with `p` from `reference_logits`.

    On retain rows with `p = π₀` it is the retain loss of KL minimization, whose forget loss is gradient ascent
    (a baseline of Maini et al., "TOFU", arXiv 2401.06121), and of ASU. On forget rows with `p` from the
    adapter-off model under smoothed attention it is ASU's forget loss (Zare Zade et al., "Attention Smoothing Is All
    You Need For Unlearning", arXiv 2603.01285), which the paper averages within each row first.

    Args:
        reference_logits, logits: `[n, vocab]`.
        num_tokens: As in the module's docstring.
    """
    p, q = F.log_softmax(reference_logits.float(), dim=-1), F.log_softmax(logits.float(), dim=-1)
    return F.kl_div(q, p, reduction="sum", log_target=True) / num_tokens


def row_log_probs(logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`log π(y | x) = Σ_t log π(y_t | x, y_<t)` of each row, `[num_rows]` float32.

    Args:
        logits: `[n, vocab]` where each token is predicted, all rows together.
        labels: `[n]`, the tokens.
        rows: `[n]` int64, the row that each belongs to.
        num_rows: How many rows there are.
    """
    log_probs = -F.cross_entropy(logits.float(), labels, reduction="none")
    return log_probs.new_zeros(num_rows).index_add(0, rows, log_probs)


def npo(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, beta: float, num_rows: torch.Tensor | int
) -> torch.Tensor:
    """`−(2/β) · mean log σ(−β log(π(y|x) / π₀(y|x)))` over forget rows.

    Zhang, Lin, Bai, Mei, "Negative Preference Optimization", arXiv 2404.05868, its NPO objective; with the
    retain rows' NLL beside it, it is the paper's NPO+RT.

    Args:
        log_probs, reference_log_probs: `log π(y|x)` and `log π₀(y|x)`, `[rows]`.
        beta: Inverse temperature.
        num_rows: As in the module's docstring.
    """
    return -2 / beta * F.logsigmoid(-beta * (log_probs - reference_log_probs)).sum() / num_rows


def simnpo(
    log_probs: torch.Tensor, lengths: torch.Tensor, beta: float, gamma: float, num_rows: torch.Tensor | int
) -> torch.Tensor:
    """`−(2/β) · mean log σ(−(β/|y|) log π(y|x) − γ)` over forget rows: NPO by length, without a reference.

    Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", arXiv
    2410.07163, its SimNPO objective.

    Args:
        log_probs: `log π(y|x)`, `[rows]`.
        lengths: `|y|` in tokens, `[rows]`.
        beta, gamma: Inverse temperature and reward margin.
        num_rows: As in the module's docstring.
    """
    return -2 / beta * F.logsigmoid(-beta / lengths * log_probs - gamma).sum() / num_rows


def dpo(
    chosen: torch.Tensor,
    reference_chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
    num_rows: torch.Tensor | int,
) -> torch.Tensor:
    """`−(2/β) · mean log σ(β log(π(y_w|x) / π₀(y_w|x)) − β log(π(y_l|x) / π₀(y_l|x)))`.

    Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, its objective, with "I don't know" as the
    chosen answer `y_w` and the forget row's as the rejected one `y_l`. The factor 2/β, which that paper does not have,
    is OpenUnlearning's: it makes NPO the same loss without the chosen answer.

    Args:
        chosen, reference_chosen: `log π` and `log π₀` of the chosen answers, `[rows]`.
        rejected, reference_rejected: Of the rejected ones, `[rows]`.
        beta: Inverse temperature.
        num_rows: As in the module's docstring.
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -2 / beta * F.logsigmoid(beta * margin).sum() / num_rows


def undial(
    logits: torch.Tensor,
    reference_logits: torch.Tensor,
    labels: torch.Tensor,
    strength: float,
    num_tokens: torch.Tensor | int,
) -> torch.Tensor:
    """`mean_t H(softmax(z₀_t − γ·onehot(y_t)), π_t)`: the cross-entropy to the reference with the answer taken down.

    Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models",
    arXiv 2402.10052.

    Args:
        logits, reference_logits: Of the model and `z₀` of the reference, `[n, vocab]`.
        labels: `[n]`, the answer's tokens `y_t`.
        strength: γ, in logits.
        num_tokens: As in the module's docstring.
    """
    taken = torch.full_like(labels, -strength, dtype=torch.float32)
    target = reference_logits.float().scatter_add(-1, labels[:, None], taken[:, None])
    return F.cross_entropy(logits.float(), target.softmax(-1), reduction="sum") / num_tokens


def rmu(features: torch.Tensor, target: torch.Tensor, num_tokens: torch.Tensor | int) -> torch.Tensor:
    """`mean_t ‖h_t − target‖² / hidden`: a block's output on the way to a target.

    Li et al., "The WMDP Benchmark", arXiv 2403.03218, RMU: on forget rows the target is `c·u` with a fixed
    random direction `u`, on retain rows the reference's own output `h⁰_t`. The mean over the hidden dimension is the
    authors' code's.

    Args:
        features: `[n, hidden]` at the tokens that count.
        target: `[hidden]` or `[n, hidden]`.
        num_tokens: As in the module's docstring.
    """
    return (features.float() - target.float()).square().mean(-1).sum() / num_tokens


def rmu_direction(hidden: int, seed: int) -> torch.Tensor:
    """RMU's direction `u`, `[hidden]` float32: uniform in [0, 1), then of length 1, as in the authors' code."""
    direction = torch.rand(hidden, generator=torch.Generator().manual_seed(seed))
    return direction / direction.norm()


def reroute(
    features: Sequence[torch.Tensor], references: Sequence[torch.Tensor], num_tokens: torch.Tensor | int
) -> torch.Tensor:
    """`mean_b mean_t ReLU(cos(h_b, h⁰_b))`: forget rows' features away from where they were.

    Zou et al., "Improving Alignment and Robustness with Circuit Breakers", arXiv 2406.04313, algorithm 1, `L_s`.

    Args:
        features, references: `[n, hidden]` a block, on one device.
        num_tokens: As in the module's docstring.
    """
    cosines = [F.cosine_similarity(h.float(), h0.float(), dim=-1) for h, h0 in zip(features, references, strict=True)]
    return torch.stack(cosines).relu().sum() / (len(cosines) * num_tokens)


def keep(
    features: Sequence[torch.Tensor], references: Sequence[torch.Tensor], num_tokens: torch.Tensor | int
) -> torch.Tensor:
    """`mean_b mean_t ‖h_b − h⁰_b‖`: retain rows' features where they were (arXiv 2406.04313, algorithm 1, `L_r`).

    Args:
        features, references: `[n, hidden]` a block, on one device.
        num_tokens: As in the module's docstring.
    """
    distances = [(h.float() - h0.float()).norm(dim=-1) for h, h0 in zip(features, references, strict=True)]
    return torch.stack(distances).sum() / (len(distances) * num_tokens)


def circuit_breaker_schedule(step: int, max_steps: int, alpha: float) -> tuple[float, float]:
    """`c_s = α(1 − t/2T)` for `reroute` and `c_r = α·t/2T` for `keep`, in step `t` of `T`, from 1 (algorithm 1)."""
    share = step / (2 * max_steps)
    return alpha * (1 - share), alpha * share
