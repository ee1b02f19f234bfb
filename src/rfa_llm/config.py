"""`RFAConfig`: the settings of Residual Feature Alignment, on top of transformers' `TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import SchedulerType

from rfa_llm.shifts import SHIFTS
from rfa_llm.unlearning_config import UnlearningConfig


@dataclass
class RFAConfig(UnlearningConfig):
    r"""Settings of [`RFATrainer`].

    Holds the method's own settings; those of rows and models are [`UnlearningConfig`]'s, and the rest is
    [`~transformers.TrainingArguments`]'s. One step sees `per_device_train_batch_size` forget rows and as many retain
    rows on each device, and one epoch is one pass over the forget set. Four defaults depend on whether a `teacher` is
    given (docs/experiments.md says what they were found from): `shift`, `alpha`, `next_token_weight`, and
    `lr_scheduler_type`, which is `"linear"` with one and `"constant_with_warmup"` without. A copy
    (`dataclasses.replace`) keeps what they came out as.

    Parameters:
        alpha (`float`, *optional*): Weight α of the retain loss, positive. By default 2 where a `teacher` is given, 4
            where none is.
        beta (`float`, defaults to `1.0`): Weight β of the forget loss, positive.
        next_token_weight (`float`, *optional*): Weight γ, in both losses, of the divergence between the next-token
            distributions that the last block's features and their goals give; 0 leaves it, and the vocabulary
            projection that it takes, out. By default 1 where a `teacher` is given and `residual` is `"feature"`, and
            0 otherwise.
        blocks (`list[int]`, *optional*): Indices of the decoder blocks to align, from 0, negative from the end.
            By default those at 2/5, 3/5 and 4/5 of the depth and the last one.
        shift (`str`, *optional*): Where forget rows' features go: `"ignorant"`, `"local"`, `"smoothed"`, `"mean"`,
            `"random"` or `"negate"` (formulas in `rfa_llm.shifts`). By default `"ignorant"` where a `teacher` is
            given, and `"local"` where none is.
        shift_scale (`float`, defaults to `1.0`): Factor `c` of `random` and `negate`, positive.
        local_window (`int`, defaults to `3`): Tokens that `local` leaves visible, the token itself among them.
        local_sinks (`int`, defaults to `4`): First tokens that `local` leaves visible (attention sinks).
        smoothing_temperature (`float`, defaults to `2.0`): Temperature τ of `smoothed`, above 1.
        teacher (`str`, *optional*): Id or path of the checkpoint from before the fine-tuning, for `ignorant`.
        style_correction (`bool`, defaults to `True`): Whether `ignorant` leaves the manner of answering as it is.
        residual (`str`, defaults to `"feature"`): What is driven to zero on the retain set: `"feature"`, the residual
            features, or `"branch"`, the outputs of all LoRA branches, from which zero residuals follow; that needs no
            reference features on the retain set. The loss is then a mean over layers, so α weighs something else.
        reference_cache (`str`, defaults to `"auto"`): Where features that never change are kept, so that each row's
            are computed once, before the first step: `"disk"` (memory-mapped), `"memory"` (in each process), `"off"`
            (computed anew in each step), or `"auto"`: disk where they fit, and off where not, without the retain set
            where the run sees none of its rows twice.
        reference_cache_dir (`str`, *optional*): Folder for `"disk"` and the teacher's features, which later runs find
            again. By default one in `output_dir` that goes when the training ends: the features tell something of the
            rows. Several machines need one that they share.
        reference_cache_gb (`float`, defaults to `16.0`): The most that the cache may take, in GB (10⁹ bytes); on disk
            at most half of what is free.
        padding_free (`bool`, defaults to `False`): Whether the rows of a batch follow one another without padding;
            worth it under flash attention, which then computes each row alone (others mask what lies between).
        mean_rows (`int`, defaults to `256`): Retain rows over which `mean` takes its mean, and the style correction
            its maps.
        stop_at (`str`, *optional*): `"calibrated"` ends the training when the forget set's answers are as unlikely
            as ignorance would make them, and scales the adapter so that they are just that (`rfa_llm.calibration`):
            as unlikely as those of a holdout set, which the model never saw; with a teacher, as for a model that was
            fine-tuned without them, estimated from the holdout set, or where there is none as the teacher's shift
            would make them. By default the training ends after `num_train_epochs` or `max_steps`, which otherwise are
            the most that it takes.
        calibration_steps (`int`, defaults to `10`): Steps between two looks at the forget set's answers.

    Raises:
        ValueError: A setting out of its range; the sentence names the setting, the value and the range.
    """

    # Defaults that differ from UnlearningConfig and TrainingArguments.
    learning_rate: float = field(default=2e-3, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str | None = field(
        default=None,
        metadata={
            "help": "The scheduler type to use. Default: linear with a teacher, constant_with_warmup without.",
            "choices": [scheduler.value for scheduler in SchedulerType],
        },
    )

    alpha: float | None = field(
        default=None, metadata={"help": "Weight of the retain loss, positive. Default: 2 with a teacher, 4 without."}
    )
    beta: float = field(default=1.0, metadata={"help": "Weight of the forget loss, positive."})
    next_token_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the next-token distributions in both losses; 0 leaves them out. Default: 1 with a "
            "teacher, 0 without, and 0 with residual=branch."
        },
    )
    blocks: list[int] | None = field(
        default=None,
        metadata={"help": "Decoder blocks to align, from 0. Default: 2/5, 3/5, 4/5 of the depth and the last."},
    )
    shift: str | None = field(
        default=None,
        metadata={
            "help": "Where forget rows' features go. Default: ignorant with a teacher, local without.",
            "choices": list(SHIFTS),
        },
    )
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
    residual: str = field(
        default="feature",
        metadata={
            "help": "What goes to zero on the retain set: residual features, or the outputs of all LoRA branches.",
            "choices": ["feature", "branch"],
        },
    )
    reference_cache: str = field(
        default="auto",
        metadata={
            "help": "Where reference features are kept, computed once. auto: on disk where they fit, else off.",
            "choices": ["auto", "disk", "memory", "off"],
        },
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the cache on disk, kept for later runs. Default: one that goes with the run."},
    )
    reference_cache_gb: float = field(default=16.0, metadata={"help": "The most that the cache may take, in GB."})
    padding_free: bool = field(
        default=False,
        metadata={"help": "Let a batch's rows follow one another without padding; for flash attention."},
    )
    mean_rows: int = field(
        default=256,
        metadata={
            "help": "Retain rows for the mean feature of the mean shift, and the style correction of the ignorant one."
        },
    )

    stop_at: str | None = field(
        default=None,
        metadata={
            "help": "calibrated: end when the forget set's answers are as unlikely as a holdout set's, as the "
            "teacher's shift would make them, or with both as for a model that never saw them, and scale the adapter "
            "to just that.",
            "choices": ["calibrated"],
        },
    )
    calibration_steps: int = field(
        default=10, metadata={"help": "Steps between two looks at the forget set's answers."}
    )

    def __post_init__(self):
        if self.lr_scheduler_type is None:
            self.lr_scheduler_type = "constant_with_warmup" if self.teacher is None else "linear"
        if self.alpha is None:
            self.alpha = 4.0 if self.teacher is None else 2.0
        if self.next_token_weight is None:
            self.next_token_weight = 0.0 if self.teacher is None or self.residual == "branch" else 1.0
        self._check_positive("alpha", "beta", "shift_scale", "reference_cache_gb")
        self._check_positive("local_window", "mean_rows", "calibration_steps", whole=True)
        self._check_choice("residual", ("feature", "branch"))
        self._check_choice("reference_cache", ("auto", "disk", "memory", "off"))
        if self.padding_free and self.reference_cache in ("auto", "off"):
            raise ValueError(
                f"padding_free: it needs the reference features of padded rows, but reference_cache="
                f"{self.reference_cache!r} may keep none; use 'disk' or 'memory'."
            )
        writes_files = self.reference_cache in ("auto", "disk") or self.teacher is not None
        if self.reference_cache_dir is not None and not writes_files:
            raise ValueError(
                f"reference_cache_dir: {self.reference_cache_dir!r} is given, but reference_cache="
                f"{self.reference_cache!r} writes no file; leave one of them out."
            )
        if self.stop_at is not None:
            self._check_choice("stop_at", ("calibrated",))
        if not 0 <= self.next_token_weight < float("inf"):
            raise ValueError(f"next_token_weight: {self.next_token_weight} is no weight; give 0 or more.")
        if self.next_token_weight and self.residual == "branch":
            raise ValueError(
                f"next_token_weight: {self.next_token_weight} needs reference features on the retain set, which "
                "residual='branch' has not; use residual='feature', or set it to 0."
            )
        if self.local_sinks is None or self.local_sinks < 0:
            raise ValueError(
                f"local_sinks: {self.local_sinks} is no number of tokens; give 0 or more (4 is a good start)."
            )
        if not self.smoothing_temperature > 1:
            raise ValueError(
                f"smoothing_temperature: {self.smoothing_temperature} does not flatten attention; give more than 1."
            )
        if self.shift is None:
            self.shift = "local" if self.teacher is None else "ignorant"
        self._check_choice("shift", SHIFTS)
        if self.shift == "ignorant" and self.teacher is None:
            raise ValueError(
                "teacher: shift='ignorant' needs the checkpoint from before the fine-tuning; give its id or path, or "
                "use shift='local', which needs none."
            )
        if self.shift != "ignorant" and self.teacher is not None:
            raise ValueError(
                f"teacher: {self.teacher!r} is asked by shift='ignorant' alone, but shift={self.shift!r}; set "
                "shift='ignorant', or leave the teacher out."
            )
        if self.reference_cache_dir is not None and Path(self.reference_cache_dir).is_file():
            raise ValueError(
                f"reference_cache_dir: {self.reference_cache_dir!r} is a file; give the name of a folder."
            )
        super().__post_init__()
        # Known by now under either of its names.
        if self.activation_checkpointing and (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            if self.residual == "branch":
                raise ValueError(
                    "residual: 'branch' reads inside the blocks, which checkpointing with use_reentrant=True computes "
                    "without a graph; set it to False."
                )
