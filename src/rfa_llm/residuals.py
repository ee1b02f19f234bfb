"""Features of the aligned blocks, their residuals, and the two losses of Residual Feature Alignment.

Source of the method: Qin, Zhu, Wang, Zhou, "Machine Unlearning on Pre-trained Models by Residual Feature Alignment
Using LoRA", arXiv 2411.08443.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rfa_llm.blocks import ends_after, hidden_state


@contextmanager
def capture(blocks: Sequence[nn.Module]) -> Iterator[list[torch.Tensor | None]]:
    """Collect what each block puts out during the forward pass inside the context.

    The hooks are removed on leaving the context, also when the forward raises, so that the second forward of
    gradient checkpointing finds none. Tensors are kept as they are, on the block's own device and in the graph.

    Args:
        blocks: Modules whose output is a hidden state, or a tuple led by one.

    Yields:
        A list with one entry a block, `None` until the block has run, then `[rows, tokens, hidden]`.
    """
    features: list[torch.Tensor | None] = [None] * len(blocks)

    def keep(position: int):
        def hook(module, args, output):
            features[position] = hidden_state(output)

        return hook

    handles = [block.register_forward_hook(keep(position)) for position, block in enumerate(blocks)]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def block_features(model: nn.Module, blocks: Sequence[nn.Module], **inputs: torch.Tensor) -> list[torch.Tensor]:
    """Run the model up to the last of the blocks and return the hidden state of each.

    Args:
        model: The causal LM (wrapped or not); adapters as they are switched at the moment.
        blocks: The aligned blocks.
        inputs: What the forward takes: `input_ids` and `attention_mask` `[rows, tokens]`, or a 4D mask.

    Returns:
        One tensor `[rows, tokens, hidden]` a block, in the model's dtype, with its graph where gradients are on.
    """
    with ends_after(model, blocks), capture(blocks) as features:
        # Nobody reads the logits, so no position is projected on the vocabulary.
        model(**inputs, use_cache=False, logits_to_keep=torch.empty(0, dtype=torch.int64))
    return features


def check_branches(model: nn.Module) -> None:
    """Check that every adapted layer adds the output of a LoRA branch to its own, which `capture_branches` needs, and
    that nothing else is trained, for what is not seen could not be held.

    Raises:
        ValueError: For DoRA, other kinds of adapters, whole modules, and LoRA on embeddings or on fused experts.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not ("lora_A" in name or "lora_B" in name):
            raise ValueError(f"residual: 'branch' needs LoRA alone, but {name} is trained too; use 'feature'.")
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            adapter = layer.active_adapters[0]
            if adapter not in layer.lora_B or layer.lora_variant.get(adapter) is not None:
                raise ValueError(
                    f"residual: 'branch' needs plain LoRA on linear layers, which {name} has not; use 'feature'."
                )


@contextmanager
def capture_branches(model: nn.Module, shape: torch.Size) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Collect what each LoRA branch, and the layer below it, puts out during the forward pass inside the context.

    Args:
        model: A model with LoRA layers (`check_branches`), wrapped or not.
        shape: `[rows, tokens]` of the batch.

    Yields:
        Two lists in the order in which the layers run: `s·B·A·x` and `W·x`, `[rows, tokens, features]` each, the first
        in the graph and the second out of it.

    Raises:
        ValueError: In the forward: a layer sees other positions than the batch's, as experts do.
    """
    branches: list[torch.Tensor] = []
    bases: list[torch.Tensor] = []
    handles = []

    def keep(name: str, layer: LoraLayer) -> None:
        adapter = layer.active_adapters[0]

        def check(output: torch.Tensor) -> None:
            if output.shape[:-1] != shape:
                raise ValueError(
                    f"residual: 'branch' needs layers that see whole rows, but {name} sees {list(output.shape)} in a "
                    f"batch of {list(shape)}; use 'feature'."
                )

        def branch(module, args, output):
            check(output)
            branches.append(layer.scaling[adapter] * output)

        def base(module, args, output):
            check(output)
            bases.append(output.detach())

        handles.append(layer.get_base_layer().register_forward_hook(base))
        handles.append(layer.lora_B[adapter].register_forward_hook(branch))

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            keep(name, layer)
    try:
        yield branches, bases
    finally:
        for handle in handles:
            handle.remove()


def select(features: Sequence[torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
    """The features at the masked positions, `[n, hidden]` a block, each on its block's device."""
    return [feature[mask.to(feature.device)] for feature in features]


def squared_ratio(difference: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`‖difference‖² / ‖reference‖²` per token: `[n, hidden]` twice, any float dtype → `[n]` float32."""
    return difference.float().square().sum(-1) / reference.float().square().sum(-1)


def retain_loss(
    residuals: Sequence[torch.Tensor], references: Sequence[torch.Tensor], num_tokens: torch.Tensor | int
) -> torch.Tensor:
    """`L_retain = mean_b mean_tokens ‖R_b‖² / ‖h⁰_b‖²`: residuals to zero (arXiv 2411.08443, retained set).

    Args:
        residuals: `R_b = h_b − h⁰_b` at the tokens that count, `[n, hidden]` a block; or the outputs of LoRA branches,
            `[n, features]` a layer, whose mean over layers it then is.
        references: `h⁰_b` at the same tokens, `[n, hidden]` a block; or those of the layers below the branches.
        num_tokens: What the sum over tokens is divided by; `n`, or the tokens of the whole global step where this
            batch is only a part of it.

    Returns:
        A float32 scalar on the last block's device.
    """
    device = references[-1].device
    per_block = [squared_ratio(r, h0).sum().to(device) for r, h0 in zip(residuals, references, strict=True)]
    return torch.stack(per_block).mean() / torch.as_tensor(num_tokens, device=device)


def forget_loss(
    residuals: Sequence[torch.Tensor],
    shifts: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    num_tokens: torch.Tensor | int,
) -> torch.Tensor:
    """`L_forget = mean_b mean_tokens ‖R_b − S_b‖² / ‖h⁰_b‖²`: residuals to the shift (arXiv 2411.08443,
    unlearning set).

    Args:
        residuals: `R_b` at the tokens that count, `[n, hidden]` a block.
        shifts: `S_b` at the same tokens, `[n, hidden]` a block.
        references: `h⁰_b` at the same tokens, `[n, hidden]` a block.
        num_tokens: As in `retain_loss`.

    Returns:
        A float32 scalar on the last block's device.
    """
    missing = [r.float() - s.float() for r, s in zip(residuals, shifts, strict=True)]
    return retain_loss(missing, references, num_tokens)


def readout(model: nn.Module, blocks: Sequence[nn.Module], features: torch.Tensor) -> torch.Tensor:
    """The next-token logits that a model reads out of its last block's features, its own norm and scaling included.

    Args:
        model: The causal LM.
        blocks: Its decoder blocks; the first one runs too, over dummy tokens, and hands on the features.
        features: `[n, hidden]`, any float dtype.

    Returns:
        `[n, vocabulary]` in the model's dtype, in the features' graph.
    """

    def put_in(module, args, output):
        hidden = hidden_state(output)
        given = features[:, None].to(hidden)
        return (given, *output[1:]) if isinstance(output, tuple) else given

    first, was_training = blocks[0], blocks[0].training
    handle = first.register_forward_hook(put_in)
    # Checkpointing, which is for training, would run the hook inside, and re-entrant one without a graph.
    first.training = False
    try:
        with ends_after(model, [first]):
            ids = torch.zeros(len(features), 1, dtype=torch.int64, device=features.device)
            return model(input_ids=ids, use_cache=False).logits[:, 0]
    finally:
        first.training = was_training
        handle.remove()


def readout_loss(model: nn.Module, blocks: Sequence[nn.Module], features: torch.Tensor, row: dict) -> float:
    """Mean loss of an encoded row's answer, nats per token, that a model reads out of its last block's features.

    Args:
        model, blocks: As in `readout`.
        features: Of the row's last positions, `[n, hidden]`, from the one before the answer on at least.
        row: From `rfa_llm.data.formats.prepare`.
    """
    answer = torch.tensor(row["input_ids"][row["answer_start"] :])
    # The position before a token predicts it; the last one predicts what comes after the answer.
    logits = readout(model, blocks, features[-len(answer) - 1 : -1]).float()
    return nn.functional.cross_entropy(logits, answer.to(logits.device)).item()


def next_token_loss(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    features: torch.Tensor,
    goal: torch.Tensor,
    num_tokens: torch.Tensor | int,
) -> torch.Tensor:
    """`mean_tokens KL(p(goal) ‖ p(features))`, with `p` the next-token distribution that `readout` gives.

    The distillation loss of Hinton et al. (arXiv 1503.02531) at temperature 1.

    Args:
        model, blocks: As in `readout`.
        features, goal: Features of the last block, and what they should be, `[n, hidden]`.
        num_tokens: As in `retain_loss`.

    Returns:
        A float32 scalar, in nats.
    """
    with torch.no_grad():
        wanted = readout(model, blocks, goal).float().log_softmax(-1)
    found = readout(model, blocks, features).float().log_softmax(-1)
    return nn.functional.kl_div(found, wanted, log_target=True, reduction="sum") / torch.as_tensor(
        num_tokens, device=found.device
    )
