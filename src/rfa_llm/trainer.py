"""`RFATrainer`: makes a causal language model forget by Residual Feature Alignment with a LoRA adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from . import reference, residuals, shifts
from .blocks import (
    check_adapter_placement,
    check_decoder_only,
    disable_dropout,
    find_blocks,
    num_blocks,
    placed,
    resolve_blocks,
)
from .checkpoints import (
    METHOD_STATE_NAME,
    base_model_digest,
    newest_whole_checkpoint,
    read_method_state,
    run_fingerprint,
    write_method_state,
)
from .config import RFAConfig
from .data.formats import check_disjoint, check_tokenizer, load_rows, prepare
from .data.pairing import ForgetRetainPairs, PairCollator
from .memory import base_model_bytes, held_values, peak_bytes, start_peak

LAST_GOOD_NAME = "last_good_adapter"


class RFATrainer(Trainer):
    """Trainer for unlearning by Residual Feature Alignment (arXiv 2411.08443).

    It trains a LoRA adapter towards zero residuals on the retain set and shifted residuals on the forget set; the
    base weights never move, and the reference is the same model with its adapter off.

    Example:

    ```python
    from rfa_llm import RFAConfig, RFATrainer

    trainer = RFATrainer(
        model="path/to/fine-tuned-model",
        args=RFAConfig(output_dir="adapter"),
        forget_dataset="forget.jsonl",
        retain_dataset="retain.jsonl",
    )
    trainer.train()
    trainer.save_model()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model that has to forget: an id
            or path, a causal LM, or one that carries a trainable adapter already, which is then trained. The base
            model's dropout is switched off in place.
        args ([`RFAConfig`], *optional*): Settings.
        forget_dataset (`str` or [`~datasets.Dataset`]): What to forget: rows, a .jsonl, .csv or .parquet file, or a
            Hub id, in one of the formats of `rfa_llm.data.formats`.
        retain_dataset (`str` or [`~datasets.Dataset`]): What to keep, likewise.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The tokenizer; by default the
            model's own.
        shift (`Callable`, *optional*): A shift of your own, `(reference [n, hidden], block) -> [n, hidden]`, in the
            place of `args.shift`.
        peft_config ([`~peft.PeftConfig`], *optional*): The adapter; by default LoRA of rank 32. Without
            `target_modules` it goes on every linear layer of the blocks up to the last aligned one.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): For an id or path.
        callbacks, optimizers: As in [`~transformers.Trainer`].

    Raises:
        ValueError, TypeError: Bad input; one sentence that names the argument, the value and the mend, before the
            model is loaded where that can be.
        FloatingPointError: From `train`, when a loss is not finite; the last good adapter is on disk by then.
    """

    _tag_names = ["rfa-llm", "unlearning"]
    # `compute_loss` divides by the tokens of the whole global step, accumulation included.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RFAConfig | None = None,
        forget_dataset: str | Dataset | None = None,
        retain_dataset: str | Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        shift: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        if args is None:
            args = RFAConfig(output_dir="rfa-adapter")
        _check_output_dir(args)
        _check_launch(args)
        # The draw of LoRA's first weights must not depend on what ran before.
        set_seed(args.seed)

        # Everything that can be refused without the model's weights is, before they are loaded.
        if not isinstance(model, (str, PreTrainedModel, PeftModel)):
            raise TypeError(
                f"model: got a {type(model).__name__}; pass an id or path as text, a causal LM or a PeftModel."
            )
        is_path = isinstance(model, str)
        if is_path:
            _check_not_adapter(model)
            init_kwargs = {"dtype": "auto", **(args.model_init_kwargs or {})}
            source = {"revision": init_kwargs["revision"]} if "revision" in init_kwargs else {}
            config, name = AutoConfig.from_pretrained(model, **source), model
        else:
            if quantization_config is not None or args.model_init_kwargs is not None:
                raise ValueError(
                    "model: it is loaded already, so quantization_config and model_init_kwargs cannot apply; pass its "
                    "id or path, or leave them out."
                )
            source, config, name = {}, model.config, model.config.name_or_path
        check_decoder_only(config, name)
        self.aligned = resolve_blocks(args.blocks, num_blocks(config))

        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(name, **source)
        check_tokenizer(processing_class)
        forget = prepare(
            load_rows(forget_dataset, "forget_dataset"), processing_class, "forget_dataset", args.max_length
        )
        retain = prepare(
            load_rows(retain_dataset, "retain_dataset"), processing_class, "retain_dataset", args.max_length
        )
        check_disjoint(forget, retain)

        self.shift = shift
        self._mean_rows = retain.select(range(min(args.mean_rows, len(retain))))
        self._teacher = None
        if shift is None and args.shift == "ignorant":
            if not is_path:
                raise ValueError(
                    "model: shift='ignorant' runs the teacher before the model is loaded, so that two models never "
                    f"share the memory, but got a loaded {type(model).__name__}; pass the model's id or path."
                )
            if args.teacher == model:
                raise ValueError(
                    f"teacher: {args.teacher!r} is the model itself, whose features are no shift; pass the checkpoint "
                    "from before the fine-tuning."
                )
            self._teacher = self._run_teacher(args, config, forget, processing_class.pad_token_id, init_kwargs)

        if is_path:
            model = AutoModelForCausalLM.from_pretrained(
                model, **init_kwargs, **({"quantization_config": quantization_config} if quantization_config else {})
            )
        model = self._with_adapter(model, peft_config, args)

        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(processing_class.pad_token_id, args.forget_tokens, args.retain_tokens),
            train_dataset=ForgetRetainPairs(forget, retain, args.seed),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # peft saves no such tags of its own; the Hub lists adapters by them.
        self.model.add_model_tags(self._tag_names)
        self.add_callback(_NextEpochsPairs(self.train_dataset))

        self._base_bytes = base_model_bytes(self.model)
        self._fingerprint = self._make_fingerprint(forget, retain)
        self._shift_vectors: torch.Tensor | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._sums_since_step = 0
        self._good_step, self._good_adapter = -1, {}

    # ---- the method ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`L = α·L_retain + β·L_forget` over one batch of forget and retain rows (`PairCollator`).

        Args:
            model: The model as the launch mode wraps it.
            inputs: `input_ids`, `attention_mask`, `token_mask` `[rows, tokens]`, `is_forget` and `index` `[rows]`.
            num_items_in_batch: Tokens that count in the global step, `[forget, retain]`; by default the batch's.

        Returns:
            The batch's share of the loss, a float32 scalar, times the number of processes, over which gradients are
            averaged.
        """
        if self._shift_vectors is None:
            self._shift_vectors = self._make_shift_vectors()
        num_forget, num_retain = self._count_tokens([inputs]) if num_items_in_batch is None else num_items_in_batch
        on_forget = inputs["token_mask"] & inputs["is_forget"][:, None]
        on_retain = inputs["token_mask"] & ~inputs["is_forget"][:, None]
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}

        h0 = reference.reference_features(self._peft_model(), self._blocks(), **tokens)
        h = residuals.block_features(model, self._blocks(), **tokens)
        h0_forget, h0_retain = _select(h0, on_forget), _select(h0, on_retain)
        r_forget = [a - b for a, b in zip(_select(h, on_forget), h0_forget, strict=True)]
        r_retain = [a - b for a, b in zip(_select(h, on_retain), h0_retain, strict=True)]
        shift = self._shift(inputs, h0_forget)

        # Blocks may sit on several devices; what becomes of them meets on the Trainer's.
        device = self.args.device
        loss_retain = residuals.retain_loss(r_retain, h0_retain, num_retain).to(device)
        loss_forget = residuals.forget_loss(r_forget, shift, h0_forget, num_forget).to(device)
        loss = self.args.alpha * loss_retain + self.args.beta * loss_forget

        self._stop_if_not_finite(loss_forget, loss_retain)
        self._add_up("loss_forget", loss_forget)
        self._add_up("loss_retain", loss_retain)
        for i, block in enumerate(self.aligned):
            forgotten = residuals.squared_ratio(r_forget[i], h0_forget[i]).sqrt().sum().to(device) / num_forget
            retained = residuals.squared_ratio(r_retain[i], h0_retain[i]).sqrt().sum().to(device) / num_retain
            self._add_up(f"residual_forget/block_{block}", forgotten)
            self._add_up(f"residual_retain/block_{block}", retained)

        loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _shift(self, inputs: dict[str, torch.Tensor], h0: list[torch.Tensor]) -> list[torch.Tensor]:
        """`S_b` at the forget tokens that count, `[n, hidden]` a block, for the reference features `h0` there."""
        args = self.args
        if self.shift is not None:
            # A copy each, because the loss divides by these features and the function may change its own.
            own = [self.shift(h.clone(), block) for h, block in zip(h0, self.aligned, strict=True)]
            for s, h, block in zip(own, h0, self.aligned, strict=True):
                if not isinstance(s, torch.Tensor) or s.shape != h.shape:
                    got = list(s.shape) if isinstance(s, torch.Tensor) else type(s).__name__
                    raise ValueError(
                        f"shift: the function gave {got} for block {block}; return a tensor {list(h.shape)}, as its "
                        "argument is."
                    )
            return own
        if args.shift == "negate":
            return [shifts.negate_shift(h, args.shift_scale) for h in h0]
        if args.shift == "mean":
            return [shifts.mean_shift(h, mean.to(h)) for h, mean in zip(h0, self._shift_vectors, strict=True)]
        if args.shift == "random":
            return [
                shifts.random_shift(h, direction.to(h), args.shift_scale)
                for h, direction in zip(h0, self._shift_vectors, strict=True)
            ]
        if args.shift == "ignorant":
            teacher = self._teacher.rows(inputs["index"][inputs["is_forget"]].tolist())
            styles = self._shift_vectors if args.style_correction else [None] * len(h0)
            return [
                shifts.ignorant_shift(h, t.to(h), None if style is None else style.to(h))
                for h, t, style in zip(h0, teacher, styles, strict=True)
            ]
        forget = {name: inputs[name][inputs["is_forget"]] for name in ("input_ids", "attention_mask")}
        on_tokens = inputs["token_mask"][inputs["is_forget"]]
        if args.shift == "smoothed":
            smoothed = reference.smoothed_features(
                self._peft_model(), self._blocks(), **forget, temperature=args.smoothing_temperature
            )
            return [shifts.smoothed_shift(h, s) for h, s in zip(h0, _select(smoothed, on_tokens), strict=True)]
        local = reference.local_features(
            self._peft_model(), self._blocks(), **forget, window=args.local_window, sinks=args.local_sinks
        )
        return [shifts.local_shift(h, near) for h, near in zip(h0, _select(local, on_tokens), strict=True)]

    def _make_shift_vectors(self) -> torch.Tensor:
        """The shift's fixed vectors, `[blocks, hidden]` float32: means, random directions, style, or none."""
        args = self.args
        if self.shift is None and args.shift == "random":
            hidden = self._peft_model().config.get_text_config(decoder=True).hidden_size
            return shifts.random_directions(len(self.aligned), hidden, args.seed)
        if self.shift is None and args.shift == "mean":
            return self._retain_mean(args.retain_tokens)
        if self.shift is None and args.shift == "ignorant" and args.style_correction:
            return self._retain_mean(args.forget_tokens) - self._teacher.retain_mean
        return torch.empty(len(self.aligned), 0)

    def _retain_mean(self, tokens: str) -> torch.Tensor:
        """Mean reference feature of the retain set's first `mean_rows` rows, `[blocks, hidden]` float32."""
        model, blocks = self._peft_model(), self._blocks()
        batches = reference.batches(
            self._mean_rows,
            tokens,
            self.processing_class.pad_token_id,
            2 * self.args.per_device_train_batch_size,
            "Mean features of the retain set",
        )
        return reference.mean_features(
            lambda **batch: reference.reference_features(model, blocks, **batch), batches, self.args.device
        )

    def _run_teacher(self, args, config, forget, pad_token_id, init_kwargs) -> reference.TeacherFeatures:
        """Let the teacher run over the sets, unless its features are on disk already, and open them."""
        teacher_config = AutoConfig.from_pretrained(args.teacher)
        check_decoder_only(teacher_config, args.teacher)
        for field in ("num_hidden_layers", "hidden_size", "vocab_size"):
            ours = getattr(config.get_text_config(decoder=True), field)
            theirs = getattr(teacher_config.get_text_config(decoder=True), field)
            if ours != theirs:
                raise ValueError(
                    f"teacher: {args.teacher!r} has {field}={theirs}, but the model {ours}; pass the checkpoint that "
                    "the model was fine-tuned from."
                )
        path = reference.teacher_features_path(
            args.output_dir,
            args.teacher,
            init_kwargs["dtype"],
            self.aligned,
            forget,
            self._mean_rows,
            args.forget_tokens,
        )
        with PartialState().main_process_first(), _loaded_whole(args):
            if not path.exists():
                reference.write_teacher_features(
                    path,
                    args.teacher,
                    self.aligned,
                    forget,
                    self._mean_rows,
                    args.forget_tokens,
                    pad_token_id,
                    2 * args.per_device_train_batch_size,
                    args.device,
                    {"dtype": init_kwargs["dtype"]},
                )
        return reference.TeacherFeatures(path, self.aligned)

    def _with_adapter(self, model, peft_config: PeftConfig | None, args: RFAConfig) -> PeftModel:
        """The model with its adapter on, checked, without dropout of the base model's own."""
        if isinstance(model, PeftModel):
            if peft_config is not None:
                raise ValueError("peft_config: the model carries an adapter already; leave peft_config out.")
        else:
            if peft_config is None:
                peft_config = LoraConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM")
            model = get_peft_model(model, placed(peft_config, model, self.aligned[-1]))
        base = model.get_base_model()
        check_adapter_placement(base, self.aligned)
        if self.shift is None and args.shift in ("local", "smoothed"):
            reference.check_attention(base, args.shift)
        disable_dropout(base)
        if args.gradient_checkpointing:
            # Otherwise nothing that enters a checkpointed block asks for a gradient, and LoRA inside gets none.
            base.enable_input_require_grads()
        return model

    def _peft_model(self) -> PeftModel:
        return self.accelerator.unwrap_model(self.model)

    def _blocks(self) -> list[nn.Module]:
        blocks = find_blocks(self._peft_model().get_base_model())
        return [blocks[index] for index in self.aligned]

    # ---- counting, logging, guarding ----

    def _count_tokens(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        counts = [
            torch.stack([b["token_mask"][b["is_forget"]].sum(), b["token_mask"][~b["is_forget"]].sum()])
            for b in batches
        ]
        return torch.stack(counts).sum(0)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Tokens that count in the global step, `[forget, retain]` int64, over all processes and accumulation."""
        return self.accelerator.reduce(self._count_tokens(batch_samples).to(device), "sum")

    def _add_up(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add both losses and the mean relative residual `‖R_b‖ / ‖h⁰_b‖` of each aligned block on both sets."""
        if "train_runtime" in logs:
            # The summary at the end; in place, because `train` returns this dict as the run's metrics.
            logs.update(self._memory_figures())
        if self._sums:
            steps = self.state.global_step - self._sums_since_step
            totals = self.accelerator.reduce(torch.stack(list(self._sums.values())), "sum") / steps
            logs = {**logs, **dict(zip(self._sums, totals.tolist(), strict=True))}
            self._sums, self._sums_since_step = {}, self.state.global_step
        super().log(logs, start_time)

    def _memory_figures(self) -> dict[str, int]:
        peaks = self.accelerator.gather(torch.tensor([peak_bytes(self.args.device)], device=self.args.device))
        per_process = {f"peak_bytes/process_{rank}": peak for rank, peak in enumerate(peaks.tolist())}
        return {"base_model_bytes": self._base_bytes, **per_process}

    def _stop_if_not_finite(self, loss_forget: torch.Tensor, loss_retain: torch.Tensor) -> None:
        """Keep a copy of the adapter as long as its losses are finite; stop, with that copy on disk, when not."""
        bad = ~torch.isfinite(torch.stack([loss_forget.detach(), loss_retain.detach()]))
        # Summed, so that every process stops when one has to.
        bad = self.accelerator.reduce(bad.int(), "sum")
        if not bad.any():
            if self._good_step != self.state.global_step:
                self._good_step = self.state.global_step
                self._good_adapter = {name: [v.clone() for v in held_values(p)] for name, p in self._adapter()}
            return
        sets = " and ".join(name for name, is_bad in zip(("forget", "retain"), bad.tolist(), strict=True) if is_bad)
        self._stop(f"The loss on the {sets} set is not finite at step {self.state.global_step + 1}")

    def _stop(self, what: str) -> None:
        """Put the last good adapter on disk and raise `FloatingPointError`."""
        if not self._good_adapter:
            raise FloatingPointError(
                f"{what}, before the adapter has learned anything; load the model in float32 or bfloat16, or choose "
                "another shift."
            )
        for name, parameter in self._adapter():
            for value, good in zip(held_values(parameter), self._good_adapter[name], strict=True):
                value.copy_(good)
        folder = Path(self.args.output_dir) / LAST_GOOD_NAME
        super().save_model(str(folder))
        raise FloatingPointError(
            f"{what}; the adapter as it was when the losses were last finite (after step {self._good_step}) is in "
            f"{folder}; lower learning_rate."
        )

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a plain PEFT adapter, which `PeftModel.from_pretrained` loads.

        Args:
            output_dir: The folder; by default `args.output_dir`.

        Raises:
            FloatingPointError: The last step left the adapter not finite; the last good one is on disk.
        """
        values = [value for _, p in self._adapter() for value in held_values(p)]
        bad = sum((~torch.isfinite(value)).sum().to(self.args.device) for value in values)
        if self.accelerator.reduce(bad, "sum"):
            self._stop(f"The adapter is not finite after step {self.state.global_step}")
        super().save_model(output_dir, _internal_call)

    def _adapter(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _make_fingerprint(self, forget: Dataset, retain: Dataset) -> dict[str, str]:
        # Only the first process is sure to have the base model's values (FSDP may leave the others without).
        digest = [base_model_digest(self.model) if self.accelerator.is_main_process else None]
        return run_fingerprint(
            self.args,
            self._peft_model().active_peft_config,
            self.args.shift if self.shift is None else "a function",
            self.aligned,
            broadcast_object_list(digest)[0],
            forget["input_ids"][:],
            retain["input_ids"][:],
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train the adapter.

        Args:
            resume_from_checkpoint: A checkpoint to go on from, or `True` for the newest whole one in `output_dir`
                (a kill in the middle of a write leaves one that is not).
            kwargs: As in [`~transformers.Trainer.train`].

        Returns:
            `TrainOutput`; its metrics hold also `base_model_bytes` (the base model's weights, all devices together)
            and `peak_bytes/process_N` (`rfa_llm.memory.peak_bytes` of each process).

        Raises:
            ValueError: There is no whole checkpoint, or it belongs to another forget set, retain set, base model,
                shift, block list or setting (which).
            FloatingPointError: A loss is not finite; the last good adapter is on disk by then.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint: True, but {self.args.output_dir!r} holds no whole checkpoint; leave it "
                    "out to start anew."
                )
        if resume_from_checkpoint:
            self._shift_vectors = read_method_state(resume_from_checkpoint, self._fingerprint)
        start_peak(self.args.device)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # What an earlier run left there is whole no more.
            (folder / METHOD_STATE_NAME).unlink(missing_ok=True)
        # Older checkpoints go only when the new one is whole: every process has written its part, and the mark is set.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_method_state(folder, self._shift_vectors, self._fingerprint)
            # By time, so that what a kill left half-written, whatever its step, goes first.
            rotate_checkpoints(self.args.output_dir, limit, use_mtime=True)

    def _init_training_state(self, *args, **kwargs):
        # A resumed run's first logged step must not be averaged over the steps before it.
        result = super()._init_training_state(*args, **kwargs)
        self._sums, self._sums_since_step = {}, self.state.global_step
        self._good_step, self._good_adapter = -1, {}
        return result


class _NextEpochsPairs(TrainerCallback):
    """Tells the pairs which epoch it is; accelerate does not reach the dataset when a sampler takes `set_epoch`."""

    def __init__(self, pairs: ForgetRetainPairs):
        self.pairs = pairs

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.pairs.set_epoch(int(state.epoch))


@contextmanager
def _loaded_whole(args: RFAConfig) -> Iterator[None]:
    """Let `from_pretrained` load a model whole under ZeRO-3 too; in shards it would take all the processes."""
    if args.deepspeed_plugin is None:
        yield
        return
    config = args.hf_deepspeed_config if args.deepspeed else args.deepspeed_plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def _select(features: list[torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
    """The features at the masked positions, `[n, hidden]` a block."""
    return [feature[mask.to(feature.device)] for feature in features]


def _check_launch(args: RFAConfig) -> None:
    if args.n_gpu > 1 or args.accelerator_config.dispatch_batches:
        raise ValueError(
            "args: DataParallel (one process, several GPUs) and dispatch_batches would cut a batch between its forget "
            "and its retain rows; launch a process for each GPU (`--accelerate_config ddp`) or show one "
            "(CUDA_VISIBLE_DEVICES=0), and leave dispatch_batches off."
        )
    # accelerate goes on alone, without a word, where it finds no device or backend for a process of several.
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != args.world_size:
        raise ValueError(
            f"args: {started} processes were started, but they are not connected and each would train alone; on the "
            "CPU set use_cpu=True (with DeepSpeed ddp_backend='gloo' instead)."
        )


def _check_output_dir(args: RFAConfig) -> None:
    # A finished run puts its adapter at the top; a run to resume has checkpoints below it only.
    done = (Path(args.output_dir) / CONFIG_NAME).exists()
    if done and not args.overwrite_output_dir and not args.resume_from_checkpoint:
        raise ValueError(
            f"output_dir: {args.output_dir!r} already holds an adapter; choose another folder or set "
            "overwrite_output_dir=True."
        )


def _check_not_adapter(model: str) -> None:
    if (Path(model) / CONFIG_NAME).exists():
        raise ValueError(
            f"model: {model!r} is an adapter, and its knowledge would be switched off with it; merge it into its base "
            "(`rfa-llm merge`) and pass the merged model."
        )
