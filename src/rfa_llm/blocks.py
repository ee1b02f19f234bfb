"""Where the decoder blocks of a causal language model are, and where LoRA goes on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

_STATE = "keeps a state in the place of keys and values, which answers to one prompt cannot share here"
# Kinds of models that would be scored or aligned wrongly, and why.
UNSUPPORTED = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), _STATE),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "has blocks that put out several features a token"),
}


def read_config(name: str, field: str, what: str, **source) -> PreTrainedConfig:
    """A model's config, from its folder or the Hub.

    Args:
        name: The folder, or the id on the Hub.
        field: The setting that names it, for the message.
        what: What it should be the folder or id of, likewise.
        **source: Where on the Hub, as `AutoConfig.from_pretrained` takes it (`revision`, `token` and so on).

    Raises:
        ValueError: There is none; or an adapter is, which transformers would load onto its base without a word.
    """
    if (Path(name) / CONFIG_NAME).exists():
        raise ValueError(
            f"{field}: {name!r} is an adapter and no whole model; give the folder or Hub id of {what} "
            "(`rfa-llm merge` merges an adapter into its base)."
        )
    try:
        return AutoConfig.from_pretrained(name, **source)
    except (OSError, ValueError) as error:
        # What the Hub would not take for an id is the path of a folder.
        is_path = isinstance(error.__cause__, HFValidationError)
        reason = "there is no such folder" if is_path else " ".join(str(error).split())
        raise ValueError(f"{field}: {name!r} is no model ({reason}); give the folder or Hub id of {what}.") from error


def check_decoder_only(config: PreTrainedConfig, name: str, field: str = "model") -> None:
    """Refuse a model that is not a decoder-only language model, from its config alone.

    Args:
        config: The model's config.
        name: What the user called the model, for the message.
        field: The setting that it came from.

    Raises:
        ValueError: For an encoder, an encoder-decoder model, one that has no causal language model class, or one of
            `UNSUPPORTED`.
    """
    if config.is_encoder_decoder:
        raise ValueError(f"{field}: {name!r} is an encoder-decoder ({config.model_type}); pass a decoder-only model.")
    # Masked language models may sit in the causal mapping too; they are decoders only when told so.
    # Not every configuration of such a model knows the word.
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.to_dict().get("is_decoder"):
        raise ValueError(f"{field}: {name!r} is an encoder ({config.model_type}); pass a decoder-only model.")
    if config.model_type in UNSUPPORTED:
        raise ValueError(
            f"{field}: {name!r} ({config.model_type}) {UNSUPPORTED[config.model_type]}; pass another model."
        )
    # Or a class in the repository's own code, under `trust_remote_code`.
    own_classes = config.to_dict().get("auto_map", {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "AutoModelForCausalLM" not in own_classes:
        raise ValueError(
            f"{field}: {name!r} ({config.model_type}) has no causal language model class in transformers; "
            "pass a decoder-only model."
        )


def num_blocks(config: PreTrainedConfig) -> int:
    """Number of decoder blocks that a config describes (the text part's, where a model has several parts)."""
    return config.get_text_config(decoder=True).num_hidden_layers


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Find the decoder blocks from the model's own structure.

    They are the one outermost `ModuleList` of the decoder that is as long as the config says there are hidden
    layers; the lists inside a block (experts, say) do not count.

    Args:
        model: A causal LM, with or without LoRA layers in it.

    Raises:
        ValueError: Where there is no such list, or more than one.
    """
    count = num_blocks(model.config)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.get_decoder().named_modules():
        inside_found = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside_found:
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"model: {type(model).__name__} has {len(found)} module lists of {count} decoder blocks "
            f"({', '.join(found) or 'none'}), so its blocks cannot be told; RFA needs exactly one."
        )
    return next(iter(found.values()))


class _FirstBlocks(nn.ModuleList):
    """Decoder blocks of which a forward pass sees the first `shown`.

    All of them stay registered, because FSDP and ZeRO look for their weights there.
    """

    shown: int

    def __len__(self) -> int:
        return self.shown

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(super().__iter__(), self.shown)

    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        return list(self)[index]


@contextmanager
def ends_after(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let forward passes inside the context end after the last of these blocks; those above are not called.

    What the model returns is then of no use; its blocks' outputs are (`rfa_llm.residuals.capture`).

    Args:
        model: A causal LM, wrapped or not.
        blocks: Some of its decoder blocks, at least one.
    """
    wanted = {id(block) for block in blocks}
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    found = next(one for one in lists if wanted <= {id(block) for block in one})
    shown = 1 + max(index for index, block in enumerate(found) if id(block) in wanted)
    whole = found.__class__
    found.__class__, found.shown = _FirstBlocks, shown
    try:
        yield
    finally:
        found.__class__ = whole
        del found.shown


def resolve_blocks(blocks: Sequence[int] | None, count: int) -> list[int]:
    """Indices of the blocks to align, in ascending order.

    Args:
        blocks: Indices from 0; negative ones count from the end. `None` takes blocks at 2/5, 3/5 and 4/5 of the
            depth and the last one (12, 18, 24 and 29 of 30): blocks above the last aligned one keep what they
            know, so the default reaches the top.
        count: Number of decoder blocks of the model.

    Raises:
        ValueError: For one number, an empty list, an index out of range, or one given twice.
    """
    if blocks is None:
        return sorted({2 * count // 5, 3 * count // 5, 4 * count // 5, count - 1})
    if isinstance(blocks, int):
        raise ValueError(f"blocks: {blocks} is no list; give one, such as [{blocks}].")
    if len(blocks) == 0:
        raise ValueError("blocks: the list is empty; name at least one block, or leave it out for the default.")
    for index in blocks:
        if not -count <= index < count:
            raise ValueError(
                f"blocks: {index} is out of range for a model of {count} blocks; use {-count} to {count - 1}."
            )
    resolved = sorted(index % count for index in blocks)
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"blocks: {list(blocks)} names a block twice; name each block once.")
    return resolved


def lora_placement(model: PreTrainedModel, last_block: int) -> dict:
    """`LoraConfig` fields that put LoRA on every linear layer of the blocks up to `last_block`.

    The modules are named one by one because peft refuses `layers_to_transform` with the string `"all-linear"`. Blocks
    need not be alike (dense and sparse ones, say), so all of them are looked at.
    """
    blocks = find_blocks(model)
    path = next(name for name, module in model.named_modules() if module is blocks)
    linear = {
        name.rpartition(".")[2]
        for block in blocks[: last_block + 1]
        for name, module in block.named_modules()
        # A router gives more than one tensor, which LoRA cannot add to.
        if isinstance(module, (nn.Linear, Conv1D)) and "Router" not in type(module).__name__
    }
    return {
        "target_modules": sorted(linear),
        "layers_to_transform": list(range(last_block + 1)),
        # All of the path but its root, so that a vision tower's blocks of the same name are left out.
        "layers_pattern": path.partition(".")[2],
    }


def placed(peft_config: PeftConfig, model: PreTrainedModel, last_block: int) -> PeftConfig:
    """The adapter's config with what it leaves open of `lora_placement` filled in, or as it is where it names its own
    `target_modules` or `target_parameters`.

    The config that was passed stays as it was: the placement is this model's, and the config may meet another one.
    """
    given = peft_config.to_dict()
    if given["target_modules"] is not None or given.get("target_parameters") is not None:
        return peft_config
    peft_config = copy(peft_config)
    for name, value in lora_placement(model, last_block).items():
        if given.get(name) is None:
            setattr(peft_config, name, value)
    return peft_config


def check_adapter_placement(model: PreTrainedModel, aligned: Sequence[int]) -> None:
    """Check that every adapter can be trained by the aligned blocks, and every aligned block moved by an adapter.

    Args:
        model: The base model inside a `PeftModel`, whose trainable parameters are the adapter's.
        aligned: Aligned block indices, ascending.

    Raises:
        ValueError: An aligned block below every adapter (its residual is always zero), or an adapter above the last
            aligned block (it would get no gradient) or outside the blocks.
    """
    blocks = find_blocks(model)
    block_of = {id(p): index for index, block in enumerate(blocks) for p in block.parameters()}
    trainable = {name: block_of.get(id(p)) for name, p in model.named_parameters() if p.requires_grad}
    adapted = [index for index in trainable.values() if index is not None]
    if not adapted or aligned[0] < min(adapted):
        first = f"the first adapter sits on block {min(adapted)}" if adapted else "no block has an adapter"
        raise ValueError(
            f"blocks: aligned block {aligned[0]} lies below every adapter ({first}), so its residual is always zero; "
            "align deeper blocks or adapt shallower ones."
        )
    for name, index in trainable.items():
        if index is None:
            raise ValueError(
                f"peft_config: {name} lies outside the decoder blocks, whose features alone are aligned; leave it out "
                "of the adapter."
            )
        if index > aligned[-1]:
            raise ValueError(
                f"peft_config: {name} lies above the last aligned block ({aligned[-1]}) and would get no gradient; "
                f"leave it out of the adapter (`layers_to_transform=list(range({aligned[-1] + 1}))`) or align a "
                "deeper block."
            )


def is_noise(name: str) -> bool:
    """Whether a field or attribute of this name says how much noise a training adds: dropout, or a router's jitter."""
    return "drop" in name or "jitter" in name


def disable_dropout(model: PreTrainedModel) -> None:
    """Switch the base model's own dropout off, in place; adapters' dropout stays.

    A residual compares two forward passes, and dropout would put noise of its own into the difference. Covers
    `nn.Dropout` modules and the rates that attention layers and blocks hold as plain floats, or read from the model's
    configuration (Falcon's do); and the jitter that routers put on what they see in training.
    """
    config = model.config.get_text_config(decoder=True)
    for name, value in config.to_dict().items():
        if is_noise(name) and isinstance(value, float):
            setattr(config, name, 0.0)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parts = [part for layer in layers for name, part in layer.named_children() if name != "base_layer"]
    adapters = {*layers, *(module for part in parts for module in part.modules())}
    for module in model.modules():
        if module in adapters:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if is_noise(attribute) and isinstance(value, float):
                setattr(module, attribute, 0.0)


def hidden_state(output: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden state `[rows, tokens, hidden]` of a block's output, which is a tensor or a tuple led by it."""
    return output[0] if isinstance(output, tuple) else output
