"""Which directions of a layer's input the adapter reads: those that forget rows use and retain rows hardly do.

LoRA adds `B·A·x` to a linear layer's output, so of the input `x` the adapter sees `A·x` alone. Where the rows of `A`
are directions along which the forget set's inputs are strong and the retain set's weak, `B` can move forget features
far and retained ones hardly, whatever it learns. `A` is set so before the training and stays as it is; `B` is trained.

That LoRA's `A` can stay fixed is known (Zhang et al., "LoRA-FA", arXiv 2308.03303); to choose it by a generalised
eigenvalue problem of two sets' covariances is the method of common spatial patterns.
"""

from __future__ import annotations

from collections.abc import Iterator

import scipy.linalg
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from .reference import adapter_off, batches

# Added to the retain set's second moments, as a share of their mean, so that directions in which nothing was seen do
# not win by noise.
RIDGE = 0.01
# Moments of more layers than fit in here are taken in further passes over the rows.
MOMENT_BYTES = 2 * 2**30
# The same whatever a step takes, so that the directions do not depend on how a batch is cut.
BATCH_ROWS = 16


def contrastive_directions(forget: torch.Tensor, retain: torch.Tensor, rank: int) -> torch.Tensor:
    """The `rank` directions with the largest ratio of forget to retain energy, `[rank, inputs]` float32.

    They solve `C_f·v = λ·(C_r + ridge·I)·v` for the largest `λ` (`scipy.linalg.eigh`). Their length is that of a row
    of peft's own draw, `1/√3` on average.

    Args:
        forget, retain: Second moments `C = mean x·xᵀ` of a layer's inputs, `[inputs, inputs]`.
        rank: How many; at most `inputs`.
    """
    forget, retain = forget.double().cpu(), retain.double().cpu()
    regular = retain + RIDGE * retain.diagonal().mean() * torch.eye(len(retain), dtype=torch.float64)
    last = len(forget) - 1
    _, vectors = scipy.linalg.eigh(forget.numpy(), regular.numpy(), subset_by_index=[last - rank + 1, last])
    directions = torch.from_numpy(vectors.T.copy())
    return (directions / (3**0.5 * directions.norm(dim=1, keepdim=True))).float()


def second_moments(model: PeftModel, layers: dict[str, nn.Module], rows: Iterator[dict]) -> dict[str, torch.Tensor]:
    """Mean `x·xᵀ` of each layer's input `x` over the tokens that count, with the adapter off.

    Args:
        model: The model.
        layers: By name; their inputs are `[rows, tokens, inputs]`.
        rows: Padded batches with their `token_mask` (`reference.batches`).

    Returns:
        Float32 `[inputs, inputs]` by name, on the layer's device. Layers that are given the same tensor one after the
        other (query, key and value, say) have the same object.

    Raises:
        ValueError: A layer is not given every token.
    """
    sums: dict[str, torch.Tensor] = {}
    first: dict[str, str] = {}
    last: tuple[str, torch.Tensor] | None = None
    mask, count = None, 0

    def add(name: str):
        def hook(module, args):
            nonlocal last
            x = args[0]
            if last is not None and last[1] is x:
                first[name] = last[0]
                return
            first[name], last = name, (name, x)
            if x.shape[:2] != mask.shape:
                raise ValueError(
                    f"input_directions: {name} is not given every token (as experts are not), so 'contrastive' cannot "
                    "compare its inputs; use input_directions='random'."
                )
            x = x[mask.to(x.device)].float()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    handles = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    try:
        with adapter_off(model):
            for batch in rows:
                mask, last = batch["token_mask"], None
                count += mask.sum().item()
                tokens = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
                model(**tokens, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    means = {name: total / count for name, total in sums.items()}
    return {name: means[first[name]] for name in layers}


def find_directions(
    model: PeftModel,
    forget: Dataset,
    retain: Dataset,
    tokens: tuple[str, str],
    pad_token_id: int,
) -> dict[str, torch.Tensor]:
    """`contrastive_directions` for every layer that LoRA adapts.

    Args:
        model: With its LoRA adapter, whole on its device.
        forget, retain: Encoded rows (`rfa_llm.data.formats.prepare`).
        tokens: Which positions of a forget and of a retain row count, `"answer"` or `"all"`.
        pad_token_id: The tokenizer's.

    Returns:
        What `lora_A` is to be, `[rank, inputs]` float32 on the CPU, by the layer's name in the model.

    Raises:
        ValueError: The rank is above a layer's inputs, or a layer is not given every token.
    """
    adapter = model.active_adapter
    layers = {name: module for name, module in model.named_modules() if name and adapter in _lora_a(module)}
    for name, layer in layers.items():
        rank, inputs = _lora_a(layer)[adapter].weight.shape
        if rank > inputs:
            raise ValueError(
                f"peft_config: the rank {rank} is above the {inputs} inputs of {name}; give a lower rank, or use "
                "input_directions='random'."
            )
    found: dict[str, torch.Tensor] = {}
    for group in _groups(layers):
        of_forget, of_retain = (
            second_moments(model, group, batches(rows, which, pad_token_id, BATCH_ROWS, f"Inputs on the {name} set"))
            for name, rows, which in zip(("forget", "retain"), (forget, retain), tokens, strict=True)
        )
        same: dict[tuple[int, int], torch.Tensor] = {}
        for name, layer in group.items():
            key = (id(of_forget[name]), layer.r[adapter])
            if key not in same:
                same[key] = contrastive_directions(of_forget[name], of_retain[name], layer.r[adapter])
            found[name] = same[key]
    return found


def aim_adapter(model: PeftModel, directions: dict[str, torch.Tensor]) -> None:
    """Set `lora_A` of each layer to its directions, and let it be trained no more."""
    for name, values in directions.items():
        weight = _lora_a(model.get_submodule(name))[model.active_adapter].weight
        weight.data.copy_(values)
        weight.requires_grad_(False)


def _lora_a(module: nn.Module) -> nn.ModuleDict | dict:
    return module.lora_A if isinstance(module, LoraLayer) else {}


def _groups(layers: dict[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """The layers in their order, in groups whose moments on two sets fit in `MOMENT_BYTES`; one layer at least."""
    group, size = {}, 0
    for name, layer in layers.items():
        needed = 2 * 4 * layer.in_features**2
        if group and size + needed > MOMENT_BYTES:
            yield group
            group, size = {}, 0
        group[name] = layer
        size += needed
    yield group
