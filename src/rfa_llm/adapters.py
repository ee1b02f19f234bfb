"""Adapters: off and on, the dtype that they compute in, and saved ones read with care (peft takes what fits and says
nothing)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from rfa_llm.memory import held_values


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Switch the adapters off inside the context, without a graph: the model is its own reference there."""
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.no_grad(), model.disable_adapter():
            # peft freezes the adapter here, and on the way out lets all of it train, also what had been frozen. FSDP2
            # reads in the first forward which weights train, so they must never look frozen.
            for parameter, train in trains:
                parameter.requires_grad_(train)
            yield
    finally:
        for parameter, train in trains:
            parameter.requires_grad_(train)


@torch.no_grad()
def scale_adapter(model: nn.Module, factor: float) -> None:
    """Multiply what a LoRA adapter adds by a factor, in its weights (`lora_B`), so that it is saved with them."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            values = held_values(parameter)
            # ZeRO-3 may hold one weight in two tensors.
            for value, scaled in zip(values, [factor * value for value in values], strict=True):
                value.copy_(scaled)


@contextmanager
def computing_in_model_dtype(
    model: PreTrainedModel | PeftModel, device: torch.device, recomputes: bool = False
) -> Iterator[None]:
    """Let the adapter of a bfloat16 model compute in bfloat16 too; its weights, and their gradients, stay in float32.

    By itself peft takes what enters an adapter to the float32 of its weights, which on SmolLM2-135M and a CPU makes
    up a third of a step. The forward runs under `torch.autocast`.

    Args:
        model: With an adapter or without; one of another dtype, or without an adapter, is left as it is.
        device: Where the model computes.
        recomputes: Whether activation checkpointing will run parts of the forward again outside this context, where
            peft must cast as it always does.
    """
    if not isinstance(model, PeftModel) or model.dtype != torch.bfloat16:
        yield
        return
    # peft's own cast to float32 would only be undone.
    with (
        disable_input_dtype_casting(model, active=not recomputes),
        torch.autocast(device.type, dtype=torch.bfloat16),
    ):
        yield


def read_adapter(adapter: str) -> PeftConfig:
    """The configuration of a saved adapter, whose weights can be read too.

    Raises:
        ValueError: It is no adapter, its weights are broken, or it is of a kind without a place in a base's weights.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
        load_peft_weights(adapter, device="cpu")
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise ValueError(
            f"adapter_name_or_path: {adapter!r} is no adapter ({error}); pass the folder that `rfa-llm unlearn` "
            "wrote, or a Hub id."
        ) from error
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter_name_or_path: {adapter!r} is of the type {config.peft_type.value}, which has no place in the "
            "base's weights; pass a LoRA adapter."
        )
    return config


def base_revision(revision: str | None, name: str | None, given: str | None) -> dict[str, str]:
    """The `revision` to load an adapter's base with, as an argument of `from_pretrained`; none where there is none.

    Args:
        revision, name: The adapter's revision, which is of the base that it names, and that name.
        given: The base that is asked for; another than the adapter's stands for itself.
    """
    return {"revision": revision} if revision and given in (None, name) else {}


def on_its_base(model: PreTrainedModel, adapter: str) -> PeftModel:
    """The model with the adapter on; one whose weights are of other places or sizes is refused.

    Raises:
        ValueError: The adapter does not fit the model.
    """
    try:
        model = PeftModel.from_pretrained(model, adapter)
        loaded = set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"))
        missing = [name for name in loaded.missing_keys if model.base_model.prefix in name]
        wrong = f"{len(loaded.unexpected_keys)} weights too many, {len(missing)} too few"
        fits = not loaded.unexpected_keys and not missing
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        fits, wrong = False, str(error).splitlines()[-1].strip()
    if not fits:
        raise ValueError(
            f"model_name_or_path: the adapter {adapter!r} does not fit {model.name_or_path!r} ({wrong}); pass the "
            "model that it was trained on."
        )
    return model
