"""What a causal language model says: the losses of answers, greedy answers, and next-token distributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from bitsandbytes.nn import Linear4bit
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rfa_llm.data.formats import encode

# What a model's own generation_config may set and greedy decoding must not see: sampling fields would be warned of,
# penalties would change the answer.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "max_length": None,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "typical_p": None,
    "epsilon_cutoff": None,
    "eta_cutoff": None,
    "repetition_penalty": None,
    "no_repeat_ngram_size": None,
}


@torch.inference_mode()
def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    batch_size: int = 16,
    desc: str = "answer losses",
) -> list[float]:
    """The mean cross-entropy of each row's answer, its closing end-of-sequence token included.

    Args:
        model: a causal language model, with or without an adapter; run in evaluation mode and left as it was.
        tokenizer: its tokenizer, whatever its padding side.
        rows: n rows in a format of `rfa_llm.data.formats.encode`, such as {"question", "answer"}.
        batch_size: sequences in a forward pass; the result does not depend on it.
        desc: what the progress bar says.

    Returns:
        n losses in nats per token, in the order of `rows`; computed in float32 whatever the model's dtype.

    Raises:
        ValueError: a row is in none of the formats, or the model ignores `logits_to_keep`.
    """
    encoded = [encode(row, tokenizer) for row in rows]
    # Longest first: batches of like length waste little on padding, and a lack of memory shows at once.
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]["input_ids"]))
    losses = [0.0] * len(encoded)
    with _evaluating(model), tqdm(total=len(encoded), desc=desc, delay=2) as progress:
        for begin in range(0, len(order), batch_size):
            indices = order[begin : begin + batch_size]
            batch = [encoded[index] for index in indices]
            for index, loss in zip(indices, _batch_losses(model, tokenizer, batch), strict=True):
                losses[index] = loss
            progress.update(len(indices))
    for index, loss in enumerate(losses):
        if loss != loss:
            raise ValueError(f"the model's loss on row {index} is NaN; its weights, or its adapter's, are broken.")
    return losses


def _batch_losses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[dict]) -> list[float]:
    lengths = [len(row["input_ids"]) for row in batch]
    input_ids = torch.full((len(batch), max(lengths)), tokenizer.eos_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(batch):
        input_ids[index, : lengths[index]] = torch.tensor(row["input_ids"])
        attention_mask[index, : lengths[index]] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)

    # The token at position t is predicted at t - 1. The vocabulary is wide, so logits are asked for only where some
    # row has an answer, and turned to float32 one row at a time.
    first = min(row["answer_start"] for row in batch) - 1
    positions = torch.arange(first, max(lengths) - 1, device=model.device)
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=positions
    ).logits
    if logits.shape[1] != len(positions):
        raise ValueError(f"{type(model).__name__} ignores logits_to_keep; give a causal language model that takes it.")
    losses = []
    for index, row in enumerate(batch):
        start, end = row["answer_start"], lengths[index]
        answer_logits = logits[index, start - 1 - first : end - 1 - first].float()
        losses.append(cross_entropy(answer_logits, input_ids[index, start:end], reduction="none"))
    token_losses = torch.cat(losses).cpu().double()
    return [part.mean().item() for part in token_losses.split([len(loss) for loss in losses])]


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    batch_size: int = 16,
    max_new_tokens: int = 200,
    desc: str = "greedy answers",
) -> list[str]:
    """The model's greedy answer to each row's prompt.

    An answer ends at the tokenizer's end-of-sequence token, at one of the model's generation_config, or after
    `max_new_tokens`. The generation_config's settings of sampling, beams, penalties and length are left aside.

    Args:
        model: a causal language model, with or without an adapter; run in evaluation mode and left as it was.
        tokenizer: its tokenizer, whatever its padding side.
        rows: n rows in a format of `rfa_llm.data.formats.encode`, such as {"question", "answer"}; the answer is not
            shown to the model.
        batch_size: prompts in a batch.
        max_new_tokens: the longest answer, in tokens.
        desc: what the progress bar says.

    Returns:
        n answers in the order of `rows`, without special tokens, stripped.

    Raises:
        ValueError: a row is in none of the formats.
    """
    encoded = [encode(row, tokenizer) for row in rows]
    # A batch runs until its longest answer ends, so rows go together by the length of the true answer: the best guess
    # of the generated one's.
    order = sorted(
        range(len(encoded)), key=lambda index: encoded[index]["answer_start"] - len(encoded[index]["input_ids"])
    )
    prompts = [row["input_ids"][: row["answer_start"]] for row in encoded]
    answers = [""] * len(encoded)
    with _evaluating(model), tqdm(total=len(encoded), desc=desc, delay=2) as progress:
        for begin in range(0, len(order), batch_size):
            indices = order[begin : begin + batch_size]
            batch = [prompts[index] for index in indices]
            for index, answer in zip(indices, _batch_answers(model, tokenizer, batch, max_new_tokens), strict=True):
                answers[index] = answer
            progress.update(len(indices))
    return answers


def _batch_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), tokenizer.eos_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for index, prompt in enumerate(prompts):
        input_ids[index, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[index, width - len(prompt) :] = 1
    # A chat model's generation_config may list its end-of-turn token beside the end of sequence.
    model_ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(model_ends if isinstance(model_ends, list) else [model_ends])} - {None}
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id,
        **GREEDY,
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


@torch.inference_mode()
def next_token_logits(model: PreTrainedModel, sequences: Sequence[list[int]]) -> Iterator[torch.Tensor]:
    """The model's logits of the next token at every position of each sequence, one sequence at a time.

    Args:
        model: a causal language model, with or without an adapter; run in evaluation mode and left as it was.
        sequences: n lists of token ids, such as the `input_ids` of `rfa_llm.data.formats.prepare`.

    Yields:
        n tensors `[tokens, vocabulary]` in the model's dtype, on the CPU.
    """
    with _evaluating(model):
        for ids in sequences:
            yield model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].cpu()


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
    training = model.training
    model.eval()
    # On CPUs with AVX512-BF16, bitsandbytes packs 4-bit weights anew, with coarser scales, at their first forward in
    # evaluation mode. In training mode these layers, which have no dropout, compute the same and stay as they are.
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()
    try:
        yield
    finally:
        model.train(training)
