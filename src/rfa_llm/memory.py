"""What a process holds of a parameter that may be cut up, and the memory that a run took."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled


def held_values(parameter: nn.Parameter) -> list[torch.Tensor]:
    """The tensors in which this process holds a parameter: the whole of it, or its shard under FSDP2 and ZeRO-3.

    ZeRO-3 keeps small parameters gathered beside their shard, so there both are given (the first one empty where the
    parameter is not gathered).
    """
    if isinstance(parameter, DTensor):
        return [parameter.detach().to_local()]
    if is_deepspeed_zero3_enabled():
        from deepspeed.runtime.zero.partition_parameters import is_zero_param

        if is_zero_param(parameter):
            return [parameter.data, parameter.ds_tensor]
    return [parameter.data]


@contextmanager
def gathered(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The whole of a tensor inside the context, also of a parameter that ZeRO-3 has cut up; all processes together."""
    if not is_deepspeed_zero3_enabled():
        yield tensor
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    # It leaves alone what is not cut up.
    with GatheredParameters([tensor]):
        yield tensor


def reshard(model: nn.Module) -> None:
    """Cut FSDP2's weights up again after a forward, which leaves some whole for a backward that does not come."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def base_model_bytes(model: nn.Module) -> int:
    """Bytes of the frozen parameters, all shards together."""
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            values = held_values(parameter)
            count = parameter.numel() if len(values) == 1 else parameter.ds_numel
            total += count * parameter.element_size()
    return total


def start_peak(device: torch.device) -> None:
    """Let the peak count from now on; on the CPU it always counts from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes that torch held on a GPU since `start_peak`; on the CPU the peak resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes (getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
