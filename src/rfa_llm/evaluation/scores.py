"""What a causal language model says: the scores of answers, greedy answers, and next-token distributions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.distributions import Categorical, kl_divergence
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rfa_llm.adapters import computing_in_model_dtype
from rfa_llm.data.formats import encode


class BrokenModelError(ValueError):
    """A loss is NaN."""


@dataclass(frozen=True)
class AnswerScore:
    """What the model makes of one answer of n tokens, its closing end-of-sequence token included, given the true
    tokens before each.

    Args:
        token_losses: float64 `[n]`, minus the log-probability of each token, in nats.
        matches: bool `[n]`, whether the most likely token is the true one.
        means, deviations: float64 `[n]`, mean and standard deviation of the log-probability under the model's own
            next-token distribution at each position; `None` unless asked for.
    """

    token_losses: np.ndarray
    matches: np.ndarray
    means: np.ndarray | None
    deviations: np.ndarray | None

    @property
    def loss(self) -> float:
        """Mean cross-entropy over the answer's tokens, in nats."""
        return float(self.token_losses.mean())


def answer_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    batch_size: int = 16,
    moments: int = 0,
    desc: str = "answer scores",
) -> list[AnswerScore]:
    """Score each row's answer, token by token, from one forward pass.

    Answers to the same prompt share its keys and values, so it is computed once.

    Args:
        model: a causal language model, with or without an adapter; run in evaluation mode and left as it was.
        tokenizer: its tokenizer, whatever its padding side.
        rows: n rows in a format of `rfa_llm.data.formats.encode`, such as {"question", "answer"}.
        batch_size: answers in a forward pass; the result does not depend on it.
        moments: rows, from the first, whose `means` and `deviations`, which min-k++ needs, are computed too.
        desc: what the progress bar says.

    Returns:
        n scores in the order of `rows`; computed in float32 from the logits, whatever the model's dtype.

    Raises:
        ValueError: a row is in none of the formats, or a loss is NaN.
    """
    return encoded_answer_scores(model, [encode(row, tokenizer) for row in rows], batch_size, desc, moments)


@torch.no_grad()
def encoded_answer_scores(
    model: PreTrainedModel, encoded: Sequence[dict], batch_size: int, desc: str, moments: int = 0
) -> list[AnswerScore]:
    """`answer_scores` of rows that are token ids already, from `encode` or `rfa_llm.data.formats.prepare`."""
    prompts = [tuple(row["input_ids"][: row["answer_start"]]) for row in encoded]
    answers = [row["input_ids"][row["answer_start"] :] for row in encoded]
    longest: dict[tuple[int, ...], int] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        longest[prompt] = max(len(answer), longest.get(prompt, 0))

    # Prompts of one length go together, so that none is padded and positions need no mending. Longest first: a lack
    # of memory shows at once.
    def length(index: int) -> tuple:
        return len(prompts[index]), longest[prompts[index]], prompts[index], len(answers[index])

    order = sorted(range(len(encoded)), key=length, reverse=True)
    scores: list[AnswerScore | None] = [None] * len(encoded)
    with _evaluating(model), tqdm(total=len(encoded), desc=desc, delay=2) as progress:
        for _, group in groupby(order, key=lambda i: len(prompts[i])):
            group = list(group)
            for begin in range(0, len(group), batch_size):
                indices = group[begin : begin + batch_size]
                batch = _batch_scores(
                    model,
                    [prompts[i] for i in indices],
                    [answers[i] for i in indices],
                    [i < moments for i in indices],
                )
                for index, score in zip(indices, batch, strict=True):
                    scores[index] = score
                progress.update(len(indices))
    for index, score in enumerate(scores):
        if np.isnan(score.token_losses).any():
            raise BrokenModelError(
                f"the model's loss on row {index} is NaN; its weights, or its adapter's, are broken."
            )
    return scores


def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    batch_size: int = 16,
    desc: str = "answer losses",
) -> list[float]:
    """The mean cross-entropy of each row's answer: `AnswerScore.loss` of `answer_scores`, which see.

    Returns:
        n losses in nats per token, in the order of `rows`.
    """
    return [score.loss for score in answer_scores(model, tokenizer, rows, batch_size=batch_size, desc=desc)]


def _batch_scores(
    model: PreTrainedModel, prompts: list[tuple[int, ...]], answers: list[list[int]], moments: list[bool]
) -> list[AnswerScore]:
    """Scores of answers to prompts of one length."""
    cache = DynamicCache(config=model.config)
    # All but the last token of a prompt, which predicts the answer's first and goes with it.
    shared = len(prompts[0]) - 1
    if shared:
        different = list(dict.fromkeys(prompts))
        ids = torch.tensor([prompt[:-1] for prompt in different], device=model.device)
        nothing = torch.empty(0, dtype=torch.int64)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=nothing)
        cache.reorder_cache(torch.tensor([different.index(prompt) for prompt in prompts], device=model.device))

    width = max(len(answer) for answer in answers)
    input_ids = torch.zeros(len(answers), width, dtype=torch.int64)
    attention_mask = torch.ones(len(answers), shared + width, dtype=torch.int64)
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        input_ids[index, : len(answer)] = torch.tensor([prompt[-1], *answer[:-1]])
        attention_mask[index, shared + len(answer) :] = 0
    logits = model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        past_key_values=cache,
        use_cache=True,
    ).logits

    scores = []
    for answer, of_row, has_moments in zip(answers, logits, moments, strict=True):
        # The vocabulary is wide, so logits turn to float32 one row at a time.
        log_probs = of_row[: len(answer)].float().log_softmax(-1)
        ids = torch.tensor(answer, device=log_probs.device)
        losses = -log_probs.gather(1, ids[:, None])[:, 0]
        means = deviations = None
        if has_moments:
            probs = log_probs.exp()
            # A token that is ruled out (-inf) has no weight.
            log_probs = log_probs.masked_fill(probs == 0, 0)
            means = torch.linalg.vecdot(probs, log_probs)
            deviations = torch.linalg.vecdot(probs, (log_probs - means[:, None]).square()).sqrt()
            means, deviations = means.double().cpu().numpy(), deviations.double().cpu().numpy()
        matches = of_row[: len(answer)].argmax(-1) == ids
        scores.append(AnswerScore(losses.double().cpu().numpy(), matches.cpu().numpy(), means, deviations))
    return scores


def answer_gradient_norms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    desc: str = "gradient norms",
) -> list[float]:
    """The norm of the gradient of each row's answer loss with respect to the model's weights.

    The weights of LoRA adapters are left out: the gradient with respect to what they are added to is that of the
    merged model, so models with and without an adapter compare. Quantised weights have no gradient and are left out.

    Args:
        model: a causal language model, with or without an adapter; run in evaluation mode and left as it was.
        tokenizer: its tokenizer.
        rows: n rows in a format of `rfa_llm.data.formats.encode`, each run alone.
        desc: what the progress bar says.

    Returns:
        n Euclidean norms, in nats per unit of weight.
    """
    weights = [p for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name]
    trained = [weight.requires_grad for weight in weights]
    norms = []
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with _evaluating(model):
            for row in tqdm(rows, desc=desc, delay=2):
                encoded = encode(row, tokenizer)
                ids = torch.tensor([encoded["input_ids"]], device=model.device)
                start = encoded["answer_start"]
                logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
                loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, start:])
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                norms.append(torch.stack([g.float().norm() for g in gradients if g is not None]).norm().item())
    finally:
        for weight, train in zip(weights, trained, strict=True):
            weight.requires_grad_(train)
    return norms


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    batch_size: int = 64,
    max_new_tokens: int = 200,
    desc: str = "greedy answers",
) -> list[str]:
    """The model's greedy answer to each row's prompt.

    An answer ends at the token that closes the rows' answers, at the tokenizer's end of sequence, at one of the
    model's generation_config, or after `max_new_tokens`. The generation_config's other settings (sampling, beams,
    penalties, length) are left aside.

    Args:
        model: a causal language model, with or without an adapter; run in evaluation mode and left as it was.
        tokenizer: its tokenizer, whatever its padding side.
        rows: n rows in a format of `rfa_llm.data.formats.encode`, such as {"question", "answer"}; the answer is not
            shown to the model.
        batch_size: prompts in a batch; a row leaves it when its answer has ended.
        max_new_tokens: the longest answer, in tokens.
        desc: what the progress bar says.

    Returns:
        n answers in the order of `rows`, without special tokens, stripped.

    Raises:
        ValueError: a row is in none of the formats.
    """
    encoded = [encode(row, tokenizer) for row in rows]
    prompts = [row["input_ids"][: row["answer_start"]] for row in encoded]
    # A template may close answers with another token than the end of sequence, and a chat model's generation_config
    # may list more than one.
    model_ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(model_ends if isinstance(model_ends, list) else [model_ends])} - {None}
    ends |= {row["input_ids"][-1] for row in encoded}
    # By the length of the true answer, the best guess of the generated one's: a batch shrinks all at once.
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]) - len(encoded[i]["input_ids"]))
    answers = [""] * len(rows)
    with _evaluating(model), tqdm(total=len(rows), desc=desc, delay=2) as progress:
        for begin in range(0, len(order), batch_size):
            indices = order[begin : begin + batch_size]
            batch = _batch_answers(model, [prompts[i] for i in indices], ends, max_new_tokens)
            for index, ids in zip(indices, batch, strict=True):
                answers[index] = tokenizer.decode(ids, skip_special_tokens=True).strip()
            progress.update(len(indices))
    return answers


def _batch_answers(
    model: PreTrainedModel, prompts: list[list[int]], ends: set[int], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of the greedy answers, up to the first of the tokens `ends`. `generate` would run every row until the
    last one ends."""
    ends = torch.tensor(sorted(ends), device=model.device)
    # Models of relative positions (ALiBi) read them from the mask, and take none.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    takes_positions = "position_ids" in inspect.signature(base.forward).parameters

    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for index, prompt in enumerate(prompts):
        input_ids[index, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[index, width - len(prompt) :] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)

    answers: list[list[int]] = [[] for _ in prompts]
    going = torch.arange(len(prompts), device=model.device)
    cache = DynamicCache(config=model.config)
    for _ in range(max_new_tokens):
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            # 1 would make a slice, for which the CPU's bfloat16 product copies the head's weights once a row.
            logits_to_keep=torch.tensor([-1]),
            **({"position_ids": positions} if takes_positions else {}),
        ).logits
        tokens = logits[:, -1].argmax(-1)
        for index, token in zip(going.tolist(), tokens.tolist(), strict=True):
            answers[index].append(token)
        goes_on = ~torch.isin(tokens, ends)
        if not goes_on.any():
            break
        if not goes_on.all():
            going, tokens, attention_mask = going[goes_on], tokens[goes_on], attention_mask[goes_on]
            cache.reorder_cache(goes_on.nonzero()[:, 0])
        input_ids = tokens[:, None]
        attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=1)
    return answers


@torch.no_grad()
def next_token_logits(model: PreTrainedModel, sequences: Sequence[list[int]]) -> Iterator[torch.Tensor]:
    """The model's logits of the next token at every position of each sequence, one sequence at a time.

    Args:
        model: a causal language model, with or without an adapter; run in evaluation mode and left as it was.
        sequences: n lists of token ids, such as the `input_ids` of `rfa_llm.data.formats.prepare`.

    Yields:
        n tensors `[tokens, vocabulary]` in the model's dtype, on the CPU.
    """
    for ids in sequences:
        # Not around the `yield`, which would put the caller's own computations into the context.
        with _evaluating(model):
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].cpu()
        yield logits


def next_token_kl(logits: torch.Tensor, other_logits: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of the next-token distributions p and q that two models' logits give at the same positions.

    Args:
        logits: p's, `[tokens, vocabulary]`, of any dtype.
        other_logits: q's, likewise.

    Returns:
        float64 `[tokens]`, in nats, at least 0; infinite where q rules out a token that p does not, and NaN where a
        logit is.

    Raises:
        ValueError: the two differ in shape.
    """
    if logits.shape != other_logits.shape:
        raise ValueError(
            f"logits, other_logits: {list(logits.shape)} and {list(other_logits.shape)} differ; give two models' "
            "logits of the same tokens and vocabulary."
        )
    # Without validation, so that a NaN comes out as NaN; -inf (a token that is ruled out) is taken as probability 0.
    p, q = (Categorical(logits=of.double(), validate_args=False) for of in (logits, other_logits))
    return kl_divergence(p, q)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The whole model in evaluation mode; afterwards every module is in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    # On CPUs with AVX512-BF16, bitsandbytes packs 4-bit weights anew, with coarser scales, at their first forward in
    # evaluation mode. In training mode these layers, which have no dropout, compute the same and stay as they are.
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()
    try:
        with computing_in_model_dtype(model, model.device):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
