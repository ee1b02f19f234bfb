"""What a checkpoint holds of the method, what it belongs to, and which checkpoint is whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rfa_llm.blocks import is_noise
from rfa_llm.files import written_whole
from rfa_llm.memory import gathered
from rfa_llm.unlearning_config import UnlearningConfig

# Written last of all, so a folder that has it is whole.
METHOD_STATE_NAME = "rfa_state.safetensors"
# Settings of ours that do not change what is learnt.
FREE = {
    "overwrite_output_dir",
    "model_init_kwargs",
    "reference_cache",
    "reference_cache_dir",
    "reference_cache_gb",
    "forgotten",
    "hub_base_model",
}
# Inherited settings that a resumed Trainer would drop without a word: it goes on with the checkpoint's own.
KEPT = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16"),
)
# Inherited settings that say which rows a step sees.
ORDER = ("seed", "data_seed", "train_sampling_strategy")
# Fields of an adapter's configuration that say where it came from, not what it is.
PLACE = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}
# Where peft's wrappers keep what they wrap: a layer, a module that is trained whole, an embedding of trained tokens.
WRAPPED = ("base_layer", "original_module", "token_adapter")
# Fields of a model's configuration that are names and versions, that a training sets, or that the digest of its
# weights covers.
NOT_COMPUTED_WITH = {
    "_name_or_path",
    "architectures",
    "transformers_version",
    "use_cache",
    "dtype",
    "quantization_config",
}


def newest_whole_checkpoint(output_dir: str) -> str | None:
    """Path of the newest checkpoint in a folder that no kill cut short; `None` where there is none."""
    marks = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{METHOD_STATE_NAME}")
    # By time: a run that began anew in the same folder has the lower step numbers.
    newest = max(marks, key=lambda mark: mark.stat().st_mtime_ns, default=None)
    return None if newest is None else str(newest.parent)


def own_settings(args: UnlearningConfig) -> list[str]:
    """Names of the settings that a method has beside the Trainer's, but for those that change nothing (`FREE`)."""
    inherited = {field.name for field in fields(TrainingArguments)}
    return sorted({field.name for field in fields(args)} - inherited - FREE)


def run_fingerprint(
    args: UnlearningConfig,
    peft_config: PeftConfig,
    method: dict[str, str],
    base_model: str,
    launch: str,
    forget_ids: list,
    retain_ids: list,
) -> dict[str, str]:
    """What a checkpoint must share with the run that goes on from it, by name.

    Args:
        args: The run's settings; the method's own, the seeds and the rows of a step count.
        peft_config: The adapter's.
        method: What the method adds; an entry stands for the setting of the same name.
        base_model: From `base_model_digest`.
        launch: How the processes share the optimizer, whose state another way of launching would not find.
        forget_ids, retain_ids: Token ids of the two sets' rows.

    Returns:
        Text a name: settings as they are, the sets and the base model as digests.
    """
    own = [name for name in own_settings(args) if name not in method]
    settings = {name: json.dumps(getattr(args, name)) for name in [*own, *KEPT, *ORDER]}
    adapter = {name: value for name, value in peft_config.to_dict().items() if name not in PLACE}
    # Which rows a step sees follows from its number only as long as it sees as many.
    rows_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "base_model": base_model,
        "forget_dataset": digest(json.dumps(forget_ids)),
        "retain_dataset": digest(json.dumps(retain_ids)),
        **method,
        "peft_config": digest(json.dumps(adapter, sort_keys=True, default=sorted)),
        "rows_a_step": str(rows_a_step),
        "launch": launch,
        **settings,
    }


def base_model_digest(model: PreTrainedModel | PeftModel, reads: bool = True) -> str:
    """SHA-256 over the whole base model as it is loaded: its quantization, and name, dtype, shape and every
    byte of each of its tensors.

    It reads one tensor after the other, about a gigabyte a second. A model says the same with an adapter on it and
    without; it says something else in another dtype, or quantized otherwise.

    Args:
        model: Alone, or with an adapter, whether that trains or not. Under ZeRO-3 every process has to call this
            together.
        reads: Whether this process has the values, and should read them.

    Returns:
        "sha256:" and 64 hexadecimal digits, without a meaning where `reads` is off.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    quantization = base.config.to_dict().get("quantization_config")
    whole = hashlib.sha256(json.dumps(quantization, default=str).encode())
    wrappers = {
        path for path, module in base.named_modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    # With the scales of quantized weights, which are no parameters.
    for name, tensor in base.state_dict(keep_vars=True).items():
        if _belongs_to_adapter(name, wrappers):
            continue
        with gathered(tensor) as values:
            if not reads:
                continue
            name = ".".join(part for part in name.split(".") if part not in WRAPPED)
            whole.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
            # numpy has no bfloat16, so bytes are what it gets.
            whole.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{whole.hexdigest()}"


def _belongs_to_adapter(name: str, wrappers: set[str]) -> bool:
    """Whether a tensor lies in one of peft's wrappers, and there beside what it wraps."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in wrappers and parts[depth] not in WRAPPED for depth in range(1, len(parts)))


def base_config_digest(config: PreTrainedConfig) -> str:
    """SHA-256 over what a model computes with beside its weights: its configuration, as JSON with sorted keys, but for
    `NOT_COMPUTED_WITH` and dropout, here and in the configurations of its parts.

    Returns:
        "sha256:" and 64 hexadecimal digits. A transformers with more fields may say another digest.
    """
    text = json.dumps(_computed_with(config.to_dict()), sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _computed_with(fields_of_config: dict) -> dict:
    return {
        name: _computed_with(value) if isinstance(value, dict) else value
        for name, value in fields_of_config.items()
        # A training sets the noise to 0. Names of classes may be numbers.
        if name not in NOT_COMPUTED_WITH and not is_noise(str(name))
    }


def write_method_state(folder: Path, vectors: torch.Tensor, fingerprint: dict[str, str]) -> None:
    """Put the method's vectors and the fingerprint into a checkpoint, in one move: from then on it is whole."""
    with written_whole(folder / METHOD_STATE_NAME) as part:
        save_file({"vectors": vectors}, part, metadata=fingerprint)


def read_method_state(folder: str, fingerprint: dict[str, str]) -> torch.Tensor:
    """The method's vectors of a checkpoint that belongs to this run, `[vectors, hidden]` float32.

    Raises:
        ValueError: The checkpoint is not whole, or belongs to a run of other settings, sets or base model (which).
    """
    path = Path(folder) / METHOD_STATE_NAME
    if not path.exists():
        raise ValueError(
            f"resume_from_checkpoint: {folder!r} is no whole checkpoint ({METHOD_STATE_NAME} is missing); give "
            "another one, or True for the newest whole one."
        )
    with safe_open(path, framework="pt") as file:
        for name, ours in fingerprint.items():
            theirs = file.metadata().get(name)
            if theirs != ours:
                raise ValueError(
                    f"{name}: {folder!r} was trained with {theirs}, but this run has {ours}; resume with the same "
                    f"{name} or start anew."
                )
        return file.get_tensor("vectors")


def digest(text: str) -> str:
    """A short name for a text that is too long, or too private, to stand in a checkpoint."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
