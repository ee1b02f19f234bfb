"""`RFATrainer`: makes a causal language model forget by Residual Feature Alignment with a LoRA adapter."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from rfa_llm import reference, residuals, shifts
from rfa_llm.adapters import adapter_off
from rfa_llm.blocks import (
    check_adapter_placement,
    check_decoder_only,
    find_blocks,
    num_blocks,
    read_config,
    resolve_blocks,
)
from rfa_llm.calibration import LOOK_ROWS, StopWhenCalibrated, final_look, mean_answer_loss
from rfa_llm.checkpoints import digest
from rfa_llm.config import RFAConfig
from rfa_llm.data.formats import check_disjoint, load_rows, prepare, spread
from rfa_llm.data.pairing import PairCollator, flatten_rows
from rfa_llm.feature_cache import FeatureCache, batches, has_room_for
from rfa_llm.receipt import public_name
from rfa_llm.unlearning_trainer import SOURCE, UnlearningTrainer

# Relative difference of features that rounding makes in bfloat16 at most; another row or other weights make more.
ROUNDING = 0.05


class RFATrainer(UnlearningTrainer):
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
            model's dropout is switched off in place. With a teacher an id or path alone.
        args ([`RFAConfig`], *optional*): Settings.
        forget_dataset (`str` or [`~datasets.Dataset`]): What to forget: rows, a .jsonl, .json, .csv or .parquet
            file, or a Hub id, in one of the formats of `rfa_llm.data.formats`.
        retain_dataset (`str` or [`~datasets.Dataset`]): What to keep, likewise.
        holdout_dataset (`str` or [`~datasets.Dataset`], *optional*): For `stop_at="calibrated"`: rows of the forget
            set's kind that the model never saw, nor the teacher. Without a teacher it is required.
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

    method = "rfa"
    _never_finite_mend = "load the model in float32 or bfloat16, or choose another shift"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RFAConfig | None = None,
        forget_dataset: str | Dataset | None = None,
        retain_dataset: str | Dataset | None = None,
        holdout_dataset: str | Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        shift: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        self.shift = shift
        self._holdout_dataset = holdout_dataset
        self._holdout: Dataset | None = None
        self._calibration: StopWhenCalibrated | None = None
        self._teacher: reference.Teacher | None = None
        self._shift_vectors: torch.Tensor | None = None
        # Reference features of the run that `train` is in; none outside, and where each step computes them.
        self._cached: dict[str, FeatureCache] = {}
        args = RFAConfig(output_dir="rfa-adapter") if args is None else args
        try:
            super().__init__(
                model=model,
                args=args,
                forget_dataset=forget_dataset,
                retain_dataset=retain_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                quantization_config=quantization_config,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        except BaseException:
            if self._teacher is not None:
                self._discard_features(args)
            raise
        self.add_callback(_FillCache(self))
        if self._calibration is not None:
            self.add_callback(self._calibration)

    # ---- what the method adds to the common run ----

    def _before_data(self, args, config):
        if self.shift is not None and args.teacher is not None:
            raise ValueError(
                f"teacher: {args.teacher!r} is not asked by a shift of your own; leave one of the two out."
            )
        self.aligned = resolve_blocks(args.blocks, num_blocks(config))
        if args.next_token_weight and self.aligned[-1] != num_blocks(config) - 1:
            raise ValueError(
                f"next_token_weight: {args.next_token_weight} needs the last block's features, but blocks ends with "
                f"{self.aligned[-1]} of {num_blocks(config)}; align block -1 too, or set it to 0 "
                "(with a teacher it is 1 by default)."
            )
        reads_goal = args.stop_at is not None and self._holdout_dataset is None and args.teacher is not None
        if reads_goal and self.aligned[-1] != num_blocks(config) - 1:
            raise ValueError(
                f"stop_at: {args.stop_at!r} with a teacher alone reads answers from the last block's shifted "
                f"features, but blocks ends with {self.aligned[-1]} of {num_blocks(config)}; align block -1 too, or "
                "give a holdout_dataset."
            )
        if args.stop_at is not None and self._holdout_dataset is None and not reads_goal:
            raise ValueError(
                f"stop_at: {args.stop_at!r} has nothing that says what ignorance is; give a holdout_dataset of rows "
                "like the forget set's that the model never saw, or the teacher from before the fine-tuning."
            )
        if args.stop_at is None and self._holdout_dataset is not None:
            raise ValueError(
                "holdout_dataset: one is given, but stop_at is None and nothing else reads it; set "
                "stop_at='calibrated', or leave the holdout set out."
            )

    def _make_pairs(self, args, forget, retain, forget_rows, processing_class):
        if args.stop_at is not None:
            level, name = self._goal_answer_loss, "goal_answer_loss"
            if self._holdout_dataset is not None:
                rows = load_rows(self._holdout_dataset, "holdout_dataset")
                self._holdout = prepare(rows, processing_class, "holdout_dataset", args.max_length)
                check_disjoint(self._holdout, forget, "holdout_dataset", "forget_dataset")
                check_disjoint(self._holdout, retain, "holdout_dataset", "retain_dataset")
                self._holdout_digest = digest(json.dumps(self._holdout["input_ids"][:]))
                level, name = self._holdout_answer_loss, "holdout_answer_loss"
                if args.teacher is not None:
                    level, name = self._retrained_answer_loss, "retrained_answer_loss"
            self._calibration = StopWhenCalibrated(
                forget, level, name, args.calibration_steps, 2 * args.per_device_train_batch_size
            )
        return super()._make_pairs(args, forget, retain, forget_rows, processing_class)

    def _before_model(self, args, model, config, forget, retain, pad_token_id):
        self._mean_rows = retain.select(range(min(args.mean_rows, len(retain))))
        if args.teacher is not None:
            if not isinstance(model, str):
                raise ValueError(
                    "model: shift='ignorant' runs the teacher before the model is loaded, so that two models never "
                    f"share the memory, but got a loaded {type(model).__name__}; pass the model's id or path."
                )
            # The revision is the model's alone.
            same_revision = (args.model_init_kwargs or {}).get("revision") in (None, "main")
            if same_revision and Path(args.teacher).resolve() == Path(model).resolve():
                raise ValueError(
                    f"teacher: {args.teacher!r} is the model itself, whose features are no shift; pass the checkpoint "
                    "from before the fine-tuning."
                )
            self._run_teacher(args, config, forget, pad_token_id)

    def _last_adapted_block(self, config):
        return self.aligned[-1]

    def _make_collator(self, args, pad_token_id):
        return PairCollator(pad_token_id, args.forget_tokens, args.retain_tokens, args.padding_free)

    def _check_model(self, args, base):
        if args.padding_free and reference.attention_obstacle(base) is not None:
            raise ValueError(
                f"padding_free: {type(base).__name__} does not mix tokens by attention alone, or takes no mask of "
                "ours, so rows would see one another; leave it out."
            )
        check_adapter_placement(base, self.aligned)
        if args.stop_at is not None and not all(
            isinstance(layer, LoraLayer) for layer in base.modules() if isinstance(layer, BaseTunerLayer)
        ):
            raise ValueError(
                f"stop_at: {args.stop_at!r} scales a LoRA adapter at the end, and this is another kind; leave it "
                "out, or pass a LoraConfig."
            )
        if self.shift is None and args.shift in ("local", "smoothed"):
            reference.check_attention(base, args.shift)
        if args.residual == "branch":
            residuals.check_branches(base)

    def _has_ended(self):
        return super()._has_ended() or (self._calibration is not None and final_look(self.state) is not None)

    def _method_state(self):
        return self._shift_vectors

    def _load_method_state(self, vectors):
        self._shift_vectors = vectors

    def _method_fingerprint(self):
        return {
            "shift": self.args.shift if self.shift is None else "a function",
            "blocks": ", ".join(map(str, self.aligned)),
            **({} if self._holdout is None else {"holdout_dataset": self._holdout_digest}),
            # A teacher may have been trained again under its name.
            **(
                {}
                if self._teacher is None
                else {"teacher": f"{public_name(self.args.teacher)} ({digest(json.dumps(self._teacher.key))})"}
            ),
        }

    def log(self, logs, start_time=None):
        """Add a look of the calibration to the log of its step, and the last one to the summary at the end."""
        calibration = self._calibration
        if calibration is not None and ("train_loss" in logs or ("loss" in logs and calibration.is_new)):
            # In place, because `train` returns the summary as the run's metrics.
            logs.update(calibration.look)
            calibration.is_new = False
        super().log(logs, start_time)

    # ---- the method ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`L = α·L_retain + β·L_forget` over one batch of forget and retain rows (`PairCollator`).

        With `next_token_weight` γ each of the two has γ times `residuals.next_token_loss` in it: of the last block's
        features, against `h⁰` on retain rows and `h⁰ + S` on forget rows.

        Args:
            model: The model as the launch mode wraps it.
            inputs: What `PairCollator` gives.
            num_items_in_batch: Tokens that count in the global step, `[forget, retain]`; by default the batch's.

        Returns:
            The batch's share of the loss, a float32 scalar, times the number of processes, over which gradients are
            averaged.
        """
        if self._shift_vectors is None:
            self._shift_vectors = self._make_shift_vectors()
        args, branch = self.args, self.args.residual == "branch"
        num_forget, num_retain = self._count_tokens([inputs]) if num_items_in_batch is None else num_items_in_batch
        on_forget, on_retain = inputs["on_forget"], inputs["on_retain"]
        # Rows that follow one another are told apart by their positions.
        names = ("input_ids", "position_ids" if args.padding_free else "attention_mask")
        tokens = {name: inputs[name] for name in names}

        h0_forget, h0_retain = self._reference(inputs, on_forget, on_retain)
        branches = (
            residuals.capture_branches(self._peft_model(), inputs["input_ids"].shape) if branch else nullcontext()
        )
        with branches as outputs:
            h = residuals.block_features(model, self._blocks(), **tokens)
        h_forget, h_retain = residuals.select(h, on_forget), residuals.select(h, on_retain)
        # Blocks may sit on several devices, what is cached on none of them.
        h0_forget = [h0.to(of_block.device) for h0, of_block in zip(h0_forget, h_forget, strict=True)]
        r_forget = [of_block - h0 for of_block, h0 in zip(h_forget, h0_forget, strict=True)]
        shift = self._shift(inputs, h0_forget)

        # What becomes of the blocks meets on the Trainer's device.
        device = args.device
        if branch:
            of_retain, over = (residuals.select(of_layer, on_retain) for of_layer in outputs)
        else:
            over = [h0.to(of_block.device) for h0, of_block in zip(h0_retain, h_retain, strict=True)]
            of_retain = [of_block - h0 for of_block, h0 in zip(h_retain, over, strict=True)]
        loss_retain = residuals.retain_loss(of_retain, over, num_retain).to(device)
        loss_forget = residuals.forget_loss(r_forget, shift, h0_forget, num_forget).to(device)
        if args.next_token_weight:
            read = partial(
                residuals.next_token_loss, self._peft_model(), find_blocks(self._peft_model().get_base_model())
            )
            next_retain = read(h_retain[-1], over[-1], num_retain).to(device)
            next_forget = read(h_forget[-1], h0_forget[-1] + shift[-1], num_forget).to(device)
            self._add_up("next_token_forget", next_forget)
            self._add_up("next_token_retain", next_retain)
            loss_retain = loss_retain + args.next_token_weight * next_retain
            loss_forget = loss_forget + args.next_token_weight * next_forget
        loss = args.alpha * loss_retain + args.beta * loss_forget

        self._stop_if_not_finite(loss_forget, loss_retain)
        self._add_up("loss_forget", loss_forget)
        self._add_up("loss_retain", loss_retain)
        for i, block in enumerate(self.aligned):
            forgotten = residuals.squared_ratio(r_forget[i], h0_forget[i]).sqrt().sum().to(device) / num_forget
            self._add_up(f"residual_forget/block_{block}", forgotten)
            if not branch:
                retained = residuals.squared_ratio(of_retain[i], over[i]).sqrt().sum().to(device) / num_retain
                self._add_up(f"residual_retain/block_{block}", retained)

        loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _reference(self, inputs, on_forget, on_retain) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`h⁰_b` at the tokens that count of the forget and of the retain rows, `[n, hidden]` a block; nothing for
        retain rows where only the branches' outputs count."""
        index, is_forget = inputs["index"], inputs["is_forget"]
        of_set = {"forget": is_forget}
        if self.args.residual == "feature":
            of_set["retain"] = ~is_forget
        h0 = {name: self._cached[name].rows(index[of_set[name]].tolist()) for name in of_set if name in self._cached}
        others = [rows for name, rows in of_set.items() if name not in self._cached]
        if others:
            rows = torch.stack(others).any(0)
            tokens = {name: inputs[name][rows] for name in ("input_ids", "attention_mask")}
            features = reference.reference_features(self._peft_model(), self._blocks(), **tokens)
            on = {"forget": on_forget, "retain": on_retain}
            h0 |= {name: residuals.select(features, on[name][rows]) for name in of_set if name not in h0}
        return h0["forget"], h0.get("retain", [])

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
            teacher = self._teacher.forget.rows(inputs["index"][inputs["is_forget"]].tolist())
            styles = self._shift_vectors if args.style_correction else [None] * len(h0)
            return [
                shifts.ignorant_shift(h, t.to(h), None if style is None else style.to(h.device))
                for h, t, style in zip(h0, teacher, styles, strict=True)
            ]
        if "shift" in self._cached:
            near = self._cached["shift"].rows(inputs["index"][inputs["is_forget"]].tolist())
        else:
            forget = {name: inputs[name][inputs["is_forget"]] for name in ("input_ids", "attention_mask")}
            on_tokens = inputs["token_mask"][inputs["is_forget"]]
            near = residuals.select(self._shifted_view()(**forget), on_tokens)
        shift = shifts.smoothed_shift if args.shift == "smoothed" else shifts.local_shift
        return [shift(h, n.to(h.device)) for h, n in zip(h0, near, strict=True)]

    def _shifted_view(self) -> Callable[..., list[torch.Tensor]]:
        """What computes the features that `smoothed` or `local` shift to."""
        model, blocks, args = self._peft_model(), self._blocks(), self.args
        if args.shift == "smoothed":
            return partial(reference.smoothed_features, model, blocks, temperature=args.smoothing_temperature)
        return partial(reference.local_features, model, blocks, window=args.local_window, sinks=args.local_sinks)

    # ---- when the answers are unlikely enough ----

    def _holdout_answer_loss(self, model: nn.Module) -> float:
        """Mean loss of answers that the model never saw, without its adapter."""
        batch_size = 2 * self.args.per_device_train_batch_size
        with adapter_off(model):
            return mean_answer_loss(model, self._holdout, batch_size, self.args.device, "holdout: losses")

    def _retrained_answer_loss(self, model: nn.Module) -> float:
        """Estimate of the forget answers' mean loss for a model that was fine-tuned without them: the teacher's, and
        what the fine-tuning added to it on rows that were not part of it."""
        forget, holdout = self._teacher.answer_losses
        return forget - holdout + self._holdout_answer_loss(model)

    def _goal_answer_loss(self, model: nn.Module) -> float:
        """Mean loss of the forget set's answers where the last block's features are at their goal, `h⁰ + S`."""
        if self._shift_vectors is None:
            self._shift_vectors = self._make_shift_vectors()
        peft_model, device, losses = self._peft_model(), self.args.device, []
        # Without the adapter no dropout draws numbers that are the training's.
        with adapter_off(peft_model):
            for row in spread(self._sets["forget"], LOOK_ROWS):
                teacher = self._teacher.forget.rows([row["index"]])[-1].to(device)
                style = self._shift_vectors[-1].to(device) if self.args.style_correction else None
                # This shift leads to the same place from wherever it begins.
                goal = teacher + shifts.ignorant_shift(teacher, teacher, style)
                losses.append(residuals.readout_loss(peft_model, find_blocks(peft_model.get_base_model()), goal, row))
        return reduce(torch.tensor(fmean(losses), device=device), "mean").item()

    # ---- what never changes, computed once ----

    def _cached_views(self) -> dict[str, tuple]:
        """What is worth keeping: name -> the view of the model, the encoded set, which rows, which positions."""
        args, forget, retain = self.args, self._sets["forget"], self._sets["retain"]
        all_forget = range(len(forget))
        views = {"forget": ("reference", forget, all_forget, args.forget_tokens)}
        once = self.state.num_train_epochs * len(forget) <= len(retain)
        if args.residual == "feature" and not (once and args.reference_cache == "auto"):
            seen = self.train_dataset.retain_rows(math.ceil(self.state.num_train_epochs))
            views["retain"] = ("reference", retain, seen, args.retain_tokens)
        settings = {"smoothed": [args.smoothing_temperature], "local": [args.local_window, args.local_sinks]}
        if self.shift is None and args.shift in settings:
            views["shift"] = ([args.shift, *settings[args.shift]], forget, all_forget, args.forget_tokens)
        return views

    def _fill_cache(self) -> dict[str, FeatureCache]:
        """Reference features of the rows that the run will see, and what the forget rows are shifted to; none where
        there is to be no cache."""
        args, model = self.args, self._peft_model()
        if args.reference_cache == "off":
            return {}
        folder = None if args.reference_cache == "memory" else self._cache_dir(args)
        config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
        key = [self._fingerprint["base_model"], config, model.config._attn_implementation]
        key.append(self.accelerator.mixed_precision)
        caches = {
            name: FeatureCache(folder, [*key, view], self.aligned, dataset, wanted, tokens)
            for name, (view, dataset, wanted, tokens) in self._cached_views().items()
        }

        token_bytes = model.config.get_text_config(decoder=True).hidden_size * model.dtype.itemsize
        size = token_bytes * sum(cache.values() for cache in caches.values())
        # The first process looks for all: files appear, and the disk fills, while others look.
        found = [None]
        if self.accelerator.is_main_process:
            missing = {name: cache.missing() for name, cache in caches.items()}
            new = token_bytes * sum(caches[name].values(parts) for name, parts in missing.items())
            found = [missing]
            if not has_room_for(size, new, folder, args.reference_cache_gb, args.reference_cache == "auto"):
                found = [None]
        missing = broadcast_object_list(found)[0]
        if missing is None:
            return {}

        # In memory every process needs all of them, on disk they share the work.
        process, processes = (0, 1) if folder is None else (self.accelerator.process_index, args.world_size)
        run = partial(reference.reference_features, model, self._blocks())
        runs = {name: self._shifted_view() if name == "shift" else run for name in caches}
        place = "in memory" if folder is None else "on disk"
        for name, cache in caches.items():
            cache.fill(
                runs[name],
                missing[name],
                self.processing_class.pad_token_id,
                2 * args.per_device_train_batch_size,
                args.device,
                process,
                processes,
                f"Reference features, {size / 1e9:.2g} GB {place} ({name})",
            )
        self.accelerator.wait_for_everyone()
        _check_shown(caches.values(), folder)
        for name, cache in caches.items():
            self._check_found(cache, cache.first_found(missing[name]), runs[name])
        if args.padding_free:
            self._check_padding_free(caches["forget"], runs["forget"])
        return caches

    def _check_found(self, cache: FeatureCache, row: int | None, run: Callable[..., list[torch.Tensor]]) -> None:
        """Refuse features of an earlier run that are not this model's: the files' names tell of its weights when the
        trainer was made, and of no buffers."""
        if row is None:
            return
        again = cache.compute(row, run, self.processing_class.pad_token_id, self.args.device)
        for before, now in zip(cache.rows([row]), again, strict=True):
            if not residuals.squared_ratio(now - before, now).mean() < ROUNDING**2:
                raise ValueError(
                    f"reference_cache_dir: the features in {str(self._cache_dir(self.args))!r} are not those that the "
                    "model gives, so its weights or buffers were changed after the trainer was made, or the files; "
                    "change the model before, or name another folder."
                )

    def _check_padding_free(self, cache: FeatureCache, run: Callable[..., list[torch.Tensor]]) -> None:
        """Refuse a model whose tokens see the rows before theirs where rows follow one another."""
        forget = self._sets["forget"]
        pair = [forget[0], forget[len(forget) - 1]]
        flat = flatten_rows(pair, [self.args.forget_tokens] * 2)
        features = run(**{name: flat[name].to(self.args.device) for name in ("input_ids", "position_ids")})
        # The second row is the one that could see another.
        behind = residuals.select(features, flat["token_mask"] & (flat["row"] == 1))
        for ours, alone in zip(behind, cache.rows([len(forget) - 1]), strict=True):
            alone = alone.to(ours.device)
            if not residuals.squared_ratio(ours - alone, alone).mean() < ROUNDING**2:
                raise ValueError(
                    f"padding_free: {type(self._peft_model().get_base_model()).__name__} gives rows that follow one "
                    "another other features than each alone; leave it out."
                )

    def _cache_dir(self, args: RFAConfig) -> Path:
        # `Trainer.push_to_hub` leaves out folders that begin with an underscore.
        return Path(args.reference_cache_dir or Path(args.output_dir) / "_reference_features")

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As [`UnlearningTrainer.train`]; reference features are computed before the first step, and those on disk and
        the teacher's are deleted when it ends, well or not, unless `reference_cache_dir` is set."""
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._cached = {}
            self._discard_features(self.args)

    def _discard_features(self, args: RFAConfig) -> None:
        folder = self._cache_dir(args)
        if args.reference_cache_dir is None and folder.exists() and PartialState().is_main_process:
            shutil.rmtree(folder)

    def _make_shift_vectors(self) -> torch.Tensor:
        """What the shift needs at each block, float32: means or random directions `[blocks, hidden]`, the style's maps
        `[blocks, hidden + 1, hidden]`, or nothing."""
        args = self.args
        if self.shift is None and args.shift == "random":
            hidden = self._peft_model().config.get_text_config(decoder=True).hidden_size
            return shifts.random_directions(len(self.aligned), hidden, args.seed)
        if self.shift is None and args.shift == "mean":
            return self._retain_mean(args.retain_tokens)
        if self.shift is None and args.shift == "ignorant" and args.style_correction:
            return self._style()
        return torch.empty(len(self.aligned), 0)

    def _mean_batches(self, tokens: str, desc: str) -> Iterator[dict]:
        """The retain set's first `mean_rows` rows."""
        batch_size = 2 * self.args.per_device_train_batch_size
        return batches(self._mean_rows, tokens, self.processing_class.pad_token_id, batch_size, desc)

    def _retain_mean(self, tokens: str) -> torch.Tensor:
        """Mean reference feature of the retain set's first `mean_rows` rows, `[blocks, hidden]` float32."""
        run = partial(reference.reference_features, self._peft_model(), self._blocks())
        mean_batches = self._mean_batches(tokens, "Mean features of the retain set")
        return reference.mean_features(run, mean_batches, self.args.device)

    def _style(self) -> torch.Tensor:
        """`reference.fit_style` over the retain set's first `mean_rows` rows."""

        def pairs():
            for batch in self._mean_batches(self.args.forget_tokens, "Style of the retain set"):
                tokens = {name: batch[name].to(self.args.device) for name in ("input_ids", "attention_mask")}
                features = reference.reference_features(self._peft_model(), self._blocks(), **tokens)
                ours = [feature.cpu()[batch["token_mask"]] for feature in features]
                yield self._teacher.retain.rows(batch["index"].tolist()), ours

        return reference.fit_style(pairs())

    def _run_teacher(self, args, config, forget, pad_token_id) -> None:
        """Let the teacher run, in the first process, over what of the sets is not on disk already; open all of it."""
        whole = "the whole checkpoint from before the fine-tuning"
        settings = args.model_init_kwargs or {}
        # The revision is the model's.
        source = {name: settings[name] for name in SOURCE if name in settings and name != "revision"}
        teacher_config = read_config(args.teacher, "teacher", whole, **source)
        check_decoder_only(teacher_config, args.teacher, "teacher")
        for field in ("num_hidden_layers", "hidden_size", "vocab_size"):
            ours = getattr(config.get_text_config(decoder=True), field)
            theirs = getattr(teacher_config.get_text_config(decoder=True), field)
            if ours != theirs:
                raise ValueError(
                    f"teacher: {args.teacher!r} has {field}={theirs}, but the model {ours}; pass the checkpoint that "
                    "the model was fine-tuned from."
                )
        dtype = settings.get("dtype", settings.get("torch_dtype", "auto"))
        folder, init_kwargs = self._cache_dir(args), {"dtype": dtype, **source}
        sets = (forget, self._mean_rows, self._holdout)
        # Known before it has run: what it leaves on disk goes where the run cannot begin.
        self._teacher = teacher = reference.Teacher(
            args.teacher, init_kwargs, folder, self.aligned, *sets, args.forget_tokens
        )
        state = PartialState()
        if state.is_main_process:
            with _loaded_whole(args):
                teacher.run(pad_token_id, 2 * args.per_device_train_batch_size, args.device)
        state.wait_for_everyone()
        teacher.answer_losses = broadcast_object_list([teacher.answer_losses])[0]
        _check_shown([teacher.forget, teacher.retain], folder)

    def _blocks(self) -> list[nn.Module]:
        blocks = find_blocks(self._peft_model().get_base_model())
        return [blocks[index] for index in self.aligned]


class _FillCache(TrainerCallback):
    """Fills the trainer's cache before the first step, when the model is wrapped and the run's length is known."""

    def __init__(self, trainer: RFATrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.train()
        with self.trainer.compute_loss_context_manager():
            self.trainer._cached = self.trainer._fill_cache()


def _check_shown(caches: Iterable[FeatureCache], folder: Path | None) -> None:
    """Open what all processes have written, and refuse a folder in which it cannot be seen."""
    if any(cache.missing() for cache in caches):
        raise ValueError(
            f"reference_cache_dir: {str(folder)!r} does not show this process what the others wrote; give a folder "
            "that all machines share."
        )


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
