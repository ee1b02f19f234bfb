"""`RFAConfig`: the settings of Residual Feature Alignment, on top of transformers' `TrainingArguments`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .shifts import SHIFTS


@dataclass
class RFAConfig(TrainingArguments):
    r"""Settings of [`RFATrainer`].

    Holds the method's own settings and those defaults of [`~transformers.TrainingArguments`] that differ; the rest
    is inherited. One step sees `per_device_train_batch_size` forget rows and as many retain rows on each device, and
    one epoch is one pass over the forget set.

    Parameters:
        alpha (`float`, defaults to `4.0`): Weight α of the retain loss, positive.
        beta (`float`, defaults to `1.0`): Weight β of the forget loss, positive.
        blocks (`list[int]`, *optional*): Indices of the decoder blocks to align, from 0, negative from the end.
            By default those at 2/5, 3/5 and 4/5 of the depth and the last one.
        shift (`str`, defaults to `"local"`): Where forget rows' features go: `"local"`, `"smoothed"`, `"ignorant"`,
            `"mean"`, `"random"` or `"negate"` (formulas in `rfa_llm.shifts`).
        shift_scale (`float`, defaults to `1.0`): Factor `c` of `random` and `negate`, positive.
        local_window (`int`, defaults to `3`): Tokens that `local` leaves visible, the token itself among them.
        local_sinks (`int`, defaults to `4`): First tokens that `local` leaves visible (attention sinks).
        smoothing_temperature (`float`, defaults to `2.0`): Temperature τ of `smoothed`, above 1.
        teacher (`str`, *optional*): Id or path of the checkpoint from before the fine-tuning, for `ignorant`.
        style_correction (`bool`, defaults to `True`): Whether `ignorant` leaves the manner of answering as it is.
        mean_rows (`int`, defaults to `256`): Retain rows over which `mean` and the style correction take means.
        forget_tokens (`str`, defaults to `"answer"`): Forget rows' positions that count: `"answer"` (the answer's
            tokens and the position before the first of them) or `"all"`.
        retain_tokens (`str`, defaults to `"all"`): Retain rows' positions that count, likewise.
        max_length (`int`, *optional*, defaults to `1024`): Tokens kept of a row, from its start.
        model_init_kwargs (`dict`, *optional*): Keyword arguments of `from_pretrained` where the model is an id or
            path. `dtype` is `"auto"` unless given.
        overwrite_output_dir (`bool`, defaults to `False`): Whether to write over an adapter in `output_dir`.

    Raises:
        ValueError: A setting out of its range; the sentence names the setting, the value and the range.
    """

    # argparse cannot turn a string into this union of inherited fields, so they are listed for it, as trl does.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Defaults that differ from TrainingArguments.
    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate for AdamW."})
    num_train_epochs: float = field(default=6.0, metadata={"help": "Passes over the forget set."})
    per_device_train_batch_size: int = field(
        default=6, metadata={"help": "Forget rows per device and step; as many retain rows come beside them."}
    )
    warmup_steps: float = field(default=5, metadata={"help": "Warm-up steps, or their share of all if below 1."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the model's forward does not name RFA's columns."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every weight of the adapter gets a gradient in each step."}
    )

    # The method.
    alpha: float = field(default=4.0, metadata={"help": "Weight of the retain loss, positive."})
    beta: float = field(default=1.0, metadata={"help": "Weight of the forget loss, positive."})
    blocks: list[int] | None = field(
        default=None,
        metadata={"help": "Decoder blocks to align, from 0. Default: 2/5, 3/5, 4/5 of the depth and the last."},
    )
    shift: str = field(default="local", metadata={"help": "Where forget rows' features go.", "choices": list(SHIFTS)})
    shift_scale: float = field(default=1.0, metadata={"help": "Factor c of the random and negate shifts."})
    local_window: int = field(
        default=3, metadata={"help": "Tokens that the local shift leaves visible, the token itself among them."}
    )
    local_sinks: int = field(
        default=4, metadata={"help": "First tokens that the local shift leaves visible (attention sinks)."}
    )
    smoothing_temperature: float = field(
        default=2.0, metadata={"help": "Attention temperature of the smoothed shift, above 1."}
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Checkpoint from before the fine-tuning (id or path), for the ignorant shift."},
    )
    style_correction: bool = field(
        default=True, metadata={"help": "Let the ignorant shift leave the manner of answering as it is."}
    )
    mean_rows: int = field(
        default=256, metadata={"help": "Retain rows for the mean features of the mean and ignorant shifts."}
    )
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

    def __post_init__(self):
        for name in ("alpha", "beta", "shift_scale", "local_window", "mean_rows"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive; give a number above 0.")
        if self.local_sinks < 0:
            raise ValueError(f"local_sinks: {self.local_sinks} is negative; give 0 or more (4 is a good start).")
        if not self.smoothing_temperature > 1:
            raise ValueError(
                f"smoothing_temperature: {self.smoothing_temperature} does not flatten attention; give more than 1."
            )
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length: {self.max_length} keeps no token; give 1 or more, or None for all.")
        choices = {"shift": SHIFTS, "forget_tokens": ("answer", "all"), "retain_tokens": ("answer", "all")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not known; use one of {', '.join(allowed)}.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: True would drop the rows' token ids and masks; leave it False.")
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha: {self.neftune_noise_alpha} would add noise to every residual; leave it out."
            )
        if self.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy: {self.eval_strategy!r} has no evaluation set to run on; leave it 'no' and run "
                "`rfa-llm evaluate` or `evaluate_tofu` afterwards."
            )
        if self.save_strategy == "best" or self.save_only_model:
            raise ValueError(
                f"save_strategy, save_only_model: {str(self.save_strategy)!r} and {self.save_only_model} would leave "
                "no checkpoint to go on from; use 'steps' or 'epoch', and leave save_only_model off."
            )
        if self.shift == "ignorant" and self.teacher is None:
            raise ValueError(
                "teacher: shift='ignorant' needs the checkpoint from before the fine-tuning; give its id or path, or "
                "use shift='local', which needs none."
            )
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            # DeepSpeed refuses a launch file and arguments that differ.
            self.bf16 = self.bf16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        if self.resume_from_checkpoint in ("true", "True"):
            # Text, as the command line hands it over.
            self.resume_from_checkpoint = True
        super().__post_init__()
