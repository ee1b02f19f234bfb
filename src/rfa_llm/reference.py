"""Features with the adapter off, the narrowed and smoothed views of them, and a teacher's."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask, eager_mask

from rfa_llm.adapters import adapter_off
from rfa_llm.blocks import find_blocks
from rfa_llm.calibration import answer_loss
from rfa_llm.feature_cache import FeatureCache
from rfa_llm.residuals import block_features

# Attention implementations whose mask can show a window and the sinks; flash attention takes none but causal ones.
MASKABLE = ("eager", "sdpa", "flex_attention")
# Layer types, by their names in transformers' configs, that mix tokens by attention and by nothing else.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# Of `fit_style`; a tenth of it, or a hundredth, gave as good a goal by hand.
STYLE_RIDGE = 0.1


def reference_features(model: PeftModel, blocks: Sequence[nn.Module], **inputs: torch.Tensor) -> list[torch.Tensor]:
    """`h⁰_b`: the blocks' features with the adapters off, `[rows, tokens, hidden]` a block, without a graph."""
    with adapter_off(model):
        return block_features(model, blocks, **inputs)


def attention_obstacle(model: PreTrainedModel) -> str | None:
    """Why a model's attention cannot be given another scale or mask, as the rest of a sentence; `None` if it can."""
    name = type(model).__name__
    if not model._supports_attention_backend:
        return (
            f"needs attention that takes a custom mask or scale, which {name} (ALiBi or attention of its own) does not"
        )
    # Not every configuration has them, and RecurrentGemma's are no field of its own.
    layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    others = sorted(set(layer_types) - ATTENTION_LAYERS)
    if others:
        return (
            f"changes attention alone, but {name} has {', '.join(others)} layers too, which would still see everything"
        )
    return None


def check_attention(model: PreTrainedModel, shift: str) -> None:
    """Check that a model's attention can be narrowed (`local`) or smoothed (`smoothed`).

    Raises:
        ValueError: The model does not go through transformers' attention interface (ALiBi models do not), or its
            attention implementation takes no mask of ours.
    """
    obstacle = attention_obstacle(model)
    if obstacle is not None:
        raise ValueError(f"shift: {shift!r} {obstacle}; use shift='mean', 'random', 'negate' or 'ignorant'.")
    implementation = model.config._attn_implementation
    if shift == "local" and implementation not in MASKABLE:
        raise ValueError(
            f"shift: 'local' needs a window-and-sink mask, which attn_implementation={implementation!r} cannot take; "
            "load the model with attn_implementation='sdpa', or use another shift."
        )


def local_mask(model: PreTrainedModel, attention_mask: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """Attention mask that shows each token the last `window` tokens (itself among them) and the first `sinks`.

    The first tokens are the attention sinks (Xiao et al., arXiv 2309.17453); without them the features explode.

    Args:
        model: The base model; its config says which form the mask takes.
        attention_mask: `[rows, tokens]`, right-padded.
        window, sinks: In tokens.

    Returns:
        What `transformers.masking_utils` makes for the model's attention implementation: 4D bool for `sdpa`, 4D
        additive float for `eager`, a block mask for `flex_attention`.
    """

    def visible(batch, head, query, key):
        return (query - key < window) | (key < sinks)

    return create_causal_mask(
        config=model.config.get_text_config(decoder=True),
        # Only shape, dtype and device are read.
        inputs_embeds=torch.empty(*attention_mask.shape, 0, dtype=model.dtype, device=attention_mask.device),
        attention_mask=attention_mask,
        past_key_values=None,
        and_mask_function=visible,
    )


def local_features(
    model: PeftModel,
    blocks: Sequence[nn.Module],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    window: int,
    sinks: int,
) -> list[torch.Tensor]:
    """`h⁰_local(w)`: reference features with attention narrowed by `local_mask`, in every layer."""
    rows, tokens = input_ids.shape
    return reference_features(
        model,
        blocks,
        input_ids=input_ids,
        attention_mask=local_mask(model.get_base_model(), attention_mask, window, sinks),
        # Given, because a model cannot count positions from a 4D mask.
        position_ids=torch.arange(tokens, device=input_ids.device).expand(rows, -1),
    )


def smoothed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    temperature: float,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention with its distribution flattened: `softmax(q·k·scaling / τ)`, in float32.

    The form is that of transformers' attention interface: `query` `[rows, heads, tokens, head_dim]`, `key` and
    `value` with a divisor of the heads, an additive mask; returns `[rows, tokens, heads, head_dim]`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.float() @ key.float().transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    logits = scores / temperature + attention_mask.float()
    if s_aux is not None:
        # Learnt sinks (gpt-oss): one more logit a head, which takes its share of the weight and gives nothing.
        sinks = (s_aux.float() / temperature).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : key.shape[2]]
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


@contextmanager
def smoothed_attention_on(model: PreTrainedModel, temperature: float) -> Iterator[None]:
    """Let every attention layer of the model run `smoothed_attention` inside the context."""
    implementation = model.config._attn_implementation
    AttentionInterface.register("rfa_smoothed", partial(smoothed_attention, temperature=temperature))
    AttentionMaskInterface.register("rfa_smoothed", eager_mask)
    model.set_attn_implementation("rfa_smoothed")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def smoothed_features(
    model: PeftModel,
    blocks: Sequence[nn.Module],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    temperature: float,
) -> list[torch.Tensor]:
    """`h⁰_smooth(τ)`: reference features with every attention distribution flattened by the temperature `τ > 1`."""
    with smoothed_attention_on(model.get_base_model(), temperature):
        return reference_features(model, blocks, input_ids=input_ids, attention_mask=attention_mask)


def mean_features(run, batches: Iterable[dict], device: torch.device) -> torch.Tensor:
    """Mean feature of the tokens that count, `[blocks, hidden]` float32 on the CPU.

    Args:
        run: `(input_ids, attention_mask) -> [rows, tokens, hidden]` a block.
        batches: Padded batches with their `token_mask`.
        device: Where `run` takes its input.
    """
    total, count = 0, 0
    for batch in batches:
        mask = batch["token_mask"]
        features = run(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
        total = total + torch.stack([f.cpu()[mask].double().sum(0) for f in features])
        count += mask.sum()
    return (total / count).float()


def fit_style(pairs: Iterable[tuple[list[torch.Tensor], list[torch.Tensor]]]) -> torch.Tensor:
    """The affine maps `s_b(h^T) ≈ h⁰ − h^T` that say, at each block, what fine-tuning changed everywhere.

    Ridge regression of the difference on the teacher's feature, over the tokens of retain rows; the ridge,
    `STYLE_RIDGE` times the median variance of a feature's components (a few of them may be huge), draws it towards the
    mean difference, which is what little data gives.

    Args:
        pairs: Of each batch, a teacher's features `h^T` and ours `h⁰` at the same n tokens, `[n, hidden]` a block.

    Returns:
        `[blocks, hidden + 1, hidden]` float32 on the CPU: the matrix, and the constant below it, so that
        `s_b(h) = h @ m[:-1] + m[-1]`.
    """
    count, sums = 0, None
    for teacher, ours in pairs:
        x, y = (torch.stack([h.cpu() for h in features]).double() for features in (teacher, ours))
        d, count = y - x, count + x.shape[1]
        new = (x.sum(1), d.sum(1), x.mT @ x, x.mT @ d)
        sums = new if sums is None else tuple(one + other for one, other in zip(sums, new, strict=True))
    mean, mean_d, squares, products = (one / count for one in sums)
    squares = squares - mean[:, :, None] * mean[:, None]
    products = products - mean[:, :, None] * mean_d[:, None]
    ridge = STYLE_RIDGE * squares.diagonal(dim1=1, dim2=2).median(1).values
    # The pseudo-inverse of 0, where all tokens have one feature, is 0.
    matrix = torch.linalg.pinv(squares + ridge[:, None, None] * torch.eye(squares.shape[1]), hermitian=True) @ products
    constant = mean_d[:, None] - mean[:, None] @ matrix
    return torch.cat([matrix, constant], dim=1).float()


class Teacher:
    """What the checkpoint from before the fine-tuning makes of the sets, each row computed once.

    Args:
        name: Model id or path of the checkpoint.
        init_kwargs: Of its `from_pretrained`, with the `dtype`.
        folder: Where its features lie.
        aligned: Aligned block indices.
        forget, retain: Encoded sets; `retain` holds the rows that `fit_style` is to see.
        holdout: Encoded rows of the forget set's kind that neither model saw, or none.
        tokens: Which positions count, `"answer"` or `"all"`.

    Attributes:
        forget, retain: Caches of the features of the sets' tokens that count, in the teacher's dtype.
        answer_losses: After `run`, the mean answer losses on the forget and the holdout set, nats per token; empty
            without a holdout set.
        key: What the features depend on beside the rows and `tokens`.
    """

    def __init__(
        self,
        name: str,
        init_kwargs: dict,
        folder: Path,
        aligned: Sequence[int],
        forget: Dataset,
        retain: Dataset,
        holdout: Dataset | None,
        tokens: str,
    ):
        self._name, self._init_kwargs, self._aligned = name, init_kwargs, aligned
        # A local teacher may be trained again under the same name.
        weights = sorted(file for file in Path(name).glob("*") if file.suffix in (".safetensors", ".bin"))
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
        self.key = ["teacher", name, files, str(init_kwargs["dtype"])]
        self.forget, self.retain = (
            FeatureCache(folder, self.key, aligned, rows, range(len(rows)), tokens) for rows in (forget, retain)
        )
        self._answers = {} if holdout is None else {"forget": forget, "holdout": holdout}
        self.answer_losses: list[float] = []

    def run(self, pad_token_id: int, batch_size: int, device: torch.device) -> None:
        """Compute what nobody has yet, features and losses; the model is freed before this returns."""
        caches = {"forget": self.forget, "retain": self.retain}
        missing = {name: cache.missing() for name, cache in caches.items()}
        if not self._answers and not any(missing.values()):
            return
        model = AutoModelForCausalLM.from_pretrained(self._name, **self._init_kwargs).to(device).eval()
        run = partial(block_features, model, [find_blocks(model)[index] for index in self._aligned])
        with torch.no_grad():
            for name, cache in caches.items():
                cache.fill(run, missing[name], pad_token_id, batch_size, device, 0, 1, f"Teacher on the {name} set")
            self.answer_losses = [
                answer_loss(model, rows, batch_size, f"Teacher, {name}: losses")
                for name, rows in self._answers.items()
            ]
        del model, run
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
