"""`UnlearningConfig`: the settings that every unlearning method here shares."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal

from transformers import TrainingArguments


@dataclass
class UnlearningConfig(TrainingArguments):
    r"""Settings of [`UnlearningTrainer`]; each method adds its own.

    Holds those defaults of [`~transformers.TrainingArguments`] that differ, and the settings of rows and models; the
    rest is inherited. One step sees `per_device_train_batch_size` forget rows and as many retain rows on each device,
    and one epoch is one pass over the forget set.

    Parameters:
        forget_tokens (`str`, defaults to `"answer"`): Forget rows' positions that count: `"answer"` (the answer's
            tokens and the position before the first of them) or `"all"`.
        retain_tokens (`str`, defaults to `"all"`): Retain rows' positions that count, likewise.
        max_length (`int`, *optional*, defaults to `1024`): Tokens kept of a row, from its start.
        model_init_kwargs (`dict`, *optional*): Keyword arguments of `from_pretrained` where the model is an id or
            path. `dtype` is `"auto"` unless given. `revision`, `trust_remote_code`, `token`, `cache_dir` and
            `local_files_only` are the tokenizer's too, and all but `revision` a teacher's.
        overwrite_output_dir (`bool`, defaults to `False`): Whether to write over an adapter in `output_dir`.
        forgotten (`str`, *optional*): For the model card: what is forgotten, in your own words, without a row or a
            name of the forget set. `push_to_hub` needs it.
        hub_base_model (`str`, *optional*): Hub id of the base, where the model is loaded from a folder.

    Raises:
        ValueError: A setting out of its range; the sentence names the setting, the value and the range.
    """

    # argparse cannot turn a string into this union of inherited fields, so they are listed for it, as trl does.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Of the command line's help.
    _argument_group_name = "training: TrainingArguments, and what unlearning adds at the end"

    # Defaults that differ from TrainingArguments.
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the adapter, its model card and its receipt."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate for AdamW."})
    num_train_epochs: float = field(default=6.0, metadata={"help": "Passes over the forget set."})
    per_device_train_batch_size: int = field(
        default=6, metadata={"help": "Forget rows per device and step; as many retain rows come beside them."}
    )
    warmup_steps: float = field(default=5, metadata={"help": "Warm-up steps, or their share of all if below 1."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the model's forward does not name the rows' columns."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every weight of the adapter gets a gradient in each step."}
    )

    hub_strategy: str = field(
        default="end", metadata={"help": "Must stay so: checkpoints hold more than the public may see."}
    )
    # None would let a push of the adapter put the tracked run, settings and all, into a public Space.
    trackio_static_space_id: str | None | Literal[False] = field(
        default=False, metadata={"help": "Space for a snapshot of the trackio run when the adapter is pushed."}
    )

    # Rows and model.
    forget_tokens: str = field(
        default="answer",
        metadata={"help": "Positions of forget rows that count.", "choices": ["answer", "all"]},
    )
    retain_tokens: str = field(
        default="all", metadata={"help": "Positions of retain rows that count.", "choices": ["answer", "all"]}
    )
    max_length: int | None = field(default=1024, metadata={"help": "Tokens kept of a row, from its start."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained, as JSON, where the model is an id."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write over an adapter that the output directory already holds."}
    )
    forgotten: str | None = field(
        default=None,
        metadata={"help": "For the model card: what is forgotten, in your own words, without rows or names."},
    )
    hub_base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the base for push_to_hub, where the model is loaded from a folder."}
    )

    def __post_init__(self):
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length: {self.max_length} keeps no token; give 1 or more, or None for all.")
        self._check_positive("learning_rate")
        self._check_positive("per_device_train_batch_size", "gradient_accumulation_steps", whole=True)
        for name in ("forget_tokens", "retain_tokens"):
            self._check_choice(name, ("answer", "all"))
        # batch_rebalance looks for token ids in rows that are pairs here.
        self._check_choice("train_sampling_strategy", ("random", "sequential", "group_by_length"))
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: True would drop the rows' token ids and masks; leave it False.")
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha: {self.neftune_noise_alpha} would add noise to what is compared; leave it out."
            )
        if self.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy: {self.eval_strategy!r} has no evaluation set to run on; leave it 'no' and run "
                "`rfa-llm evaluate` or `evaluate_tofu` afterwards."
            )
        if self.eval_on_start:
            raise ValueError(
                "eval_on_start: there is no evaluation set to run on; leave it out and run `rfa-llm evaluate` first."
            )
        if self.save_strategy == "best" or self.save_only_model:
            raise ValueError(
                f"save_strategy, save_only_model: {str(self.save_strategy)!r} and {self.save_only_model} would leave "
                "no checkpoint to go on from; use 'steps' or 'epoch', and leave save_only_model off."
            )
        if self.hub_strategy != "end":
            raise ValueError(
                f"hub_strategy: {str(self.hub_strategy)!r} would put up adapters that have not forgotten yet, and "
                "checkpoints; leave it 'end'."
            )
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            # DeepSpeed refuses a launch file and arguments that differ.
            self.bf16 = self.bf16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(
                f"num_train_epochs: {self.num_train_epochs} trains nothing; give more than 0, or set max_steps."
            )
        super().__post_init__()
        if not isinstance(self.model_init_kwargs, (dict, NoneType)):
            raise ValueError(
                f"model_init_kwargs: {self.model_init_kwargs!r} is no object; give names and values, as JSON "
                '\'{"attn_implementation": "eager"}\'.'
            )

    def _check_positive(self, *names: str, whole: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name}: {value!r} is text; give a number above 0.")
            if value is None or not value > 0:
                raise ValueError(f"{name}: {value} is not positive; give a number above 0.")
            if whole and not isinstance(value, int):
                raise ValueError(f"{name}: {value} is no whole number; give 1, 2 or more.")
            if math.isinf(value):
                raise ValueError(f"{name}: {value} is not finite; give a number above 0.")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}: {getattr(self, name)!r} is not known; use one of {', '.join(allowed)}.")
