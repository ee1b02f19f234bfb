"""When to stop, and how strong the adapter is to be, without a retain-only model: the forget set's answers are to be
as unlikely as ignorance would make them."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch
from accelerate.utils import reduce
from datasets import Dataset
from peft.helpers import rescale_adapter_scale
from scipy.optimize import brentq
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from rfa_llm.adapters import adapter_off, scale_adapter
from rfa_llm.data.formats import spread
from rfa_llm.evaluation.scores import BrokenModelError, encoded_answer_scores
from rfa_llm.memory import reshard

logger = logging.get_logger(__name__)

# Rows of each set that a look scores at most, spread over the set.
LOOK_ROWS = 256
# An adapter that falls short is made stronger by these factors, until one is too much; far beyond what was trained,
# nothing is known.
LARGER_SCALES = (1.1, 1.25, 1.5, 2.0)
# How finely the factor is sought.
SCALE_STEP = 0.01
# Losses that differ by less than this share count as one.
TOLERANCE = 0.02
# What gives another level, by the level's name in the logs.
MENDS = {
    "holdout_answer_loss": "give a holdout_dataset of the forget set's kind that the model never saw",
    "goal_answer_loss": "give the teacher from before the fine-tuning on the forget set",
    "retrained_answer_loss": "give the teacher from before the fine-tuning on the forget set, and a holdout_dataset "
    "of the forget set's kind that neither model saw",
}


class NothingToForgetError(ValueError):
    """The forget set is as unlikely as ignorance would make it before any training."""


class StopWhenCalibrated(TrainerCallback):
    """Ends the training when the forget set's answers are as unlikely as ignorance would make them, and scales the
    adapter so that they are just that.

    Every `steps` steps, and at the last, the forget set's mean answer loss with the adapter on is held against a
    level. At the first look that reaches it the training ends. There, and wherever else the training ends, the
    adapter's effect is multiplied by the factor at which the loss is the level: below 1 where the training went too
    far, up to 2 where it fell short. Where there is none the adapter is left as it is, and a warning says so.

    Answers are scored as the training sees them, cut at `max_length`. Every process scores all the rows, so that it
    works however the model is sharded.

    Args:
        forget: encoded rows, from `rfa_llm.data.formats.prepare`.
        level: gives the level, nats per token, from the model; called once, at the training's begin.
        level_name: what the level is called in the logs, a key of `MENDS`.
        steps: training steps between two looks.
        batch_size: answers scored at a time.

    Attributes:
        look: of the last look, `forget_answer_loss` and the level, nats per token, and at the end `adapter_scale`, the
            factor; empty before the first.
        is_new: whether `look` is yet to be logged.

    Raises:
        NothingToForgetError: From the training's begin, when the level is reached without it.
        ValueError: Likewise, when a checkpoint from after the scaling does not give its loss.
    """

    def __init__(
        self, forget: Dataset, level: Callable[[nn.Module], float], level_name: str, steps: int, batch_size: int
    ):
        self._forget, self._make_level, self._level_name = forget, level, level_name
        self._steps, self._batch_size = steps, batch_size
        self._level = 0.0
        self.look: dict[str, float] = {}
        self.is_new = False

    def _loss(self, args, model) -> float:
        return mean_answer_loss(model, self._forget, self._batch_size, args.device, "forget: losses")

    def _scale(self, args, model, loss: float) -> float:
        """Multiply the adapter's effect by the factor at which `loss`, the model's now, would be the level."""
        losses = {1.0: loss}

        def beyond(factor: float) -> float:
            if factor not in losses:
                with rescale_adapter_scale(model, factor):
                    losses[factor] = self._loss(args, model)
            return losses[factor] - self._level

        low, high = 0.0, 1.0
        if loss < self._level:
            for larger in LARGER_SCALES:
                low, high = high, larger
                try:
                    if beyond(high) >= 0:
                        break
                except BrokenModelError:
                    return 1.0
            else:
                return 1.0
        elif beyond(low) >= 0:
            # What the adapter has beside LoRA's branches (DoRA's magnitudes, whole modules) has no factor.
            return 1.0
        factor = brentq(beyond, low, high, xtol=SCALE_STEP)
        reshard(model)
        scale_adapter(model, factor)
        return factor

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.look, self.is_new = {}, False
        self._level = self._make_level(model)
        with adapter_off(model):
            known = self._loss(args, model)
        if known > (1 - TOLERANCE) * self._level:
            raise NothingToForgetError(
                f"stop_at: the forget set's answers have a loss of {known:.3f} nats a token before any training, and "
                f"{self._level_name}, which stands for ignorance, is {self._level:.3f}: they look no more familiar; "
                f"{MENDS[self._level_name]}, or leave stop_at out."
            )
        last = final_look(state)
        if last is not None:
            self.look = {name: last[name] for name in ("forget_answer_loss", self._level_name, "adapter_scale")}
            short = self.look["adapter_scale"] > 1 or self.look["forget_answer_loss"] < (1 - TOLERANCE) * self._level
            if short and state.global_step < state.max_steps:
                raise ValueError(
                    f"resume_from_checkpoint: the run had come to its end at step {state.global_step}, short of its "
                    "level, and a scaled adapter is not trained on; start anew with as many steps as it is to have."
                )
            # ZeRO-3 puts back the weights that its optimizer has, which were not scaled.
            if abs(self._loss(args, model) - self.look["forget_answer_loss"]) > TOLERANCE * self._level:
                raise ValueError(
                    "resume_from_checkpoint: the run had come to its end and scaled its adapter there, which does not "
                    "come back under this launch mode; take the adapter that lies in the checkpoint's folder."
                )

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self._steps and not control.should_training_stop:
            return
        try:
            loss = self._loss(args, model)
        except BrokenModelError:
            # The trainer's own guard says so.
            return
        self.look, self.is_new = {"forget_answer_loss": loss, self._level_name: self._level}, True
        control.should_log = True
        if loss >= self._level:
            if args.save_strategy == "steps":
                control.should_save = True
            control.should_training_stop = True
        if control.should_training_stop:
            factor = self._scale(args, model, loss)
            self.look |= {"forget_answer_loss": self._loss(args, model), "adapter_scale": factor}

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        if "adapter_scale" not in self.look:
            logger.warning(
                f"stop_at: something else ended the training at step {state.global_step}, where it was not looked at, "
                "so the adapter was not scaled."
            )
        elif abs(self.look["forget_answer_loss"] - self._level) > TOLERANCE * self._level:
            too_little = self.look["forget_answer_loss"] < self._level
            mend = (
                "start anew with more num_train_epochs"
                if too_little
                else "train LoRA alone, and with a lower learning_rate"
            )
            logger.warning(
                f"stop_at: the training ended with the forget set's answers at a loss of "
                f"{self.look['forget_answer_loss']:.3f} nats a token, where {self._level_name} is {self._level:.3f}, "
                f"and no factor of the adapter up to {LARGER_SCALES[-1]:g} makes up for it; {mend}."
            )


def final_look(state: TrainerState) -> dict[str, float] | None:
    """The log of the look after which the adapter was scaled, if that was at this step."""
    looks = [log for log in state.log_history if "adapter_scale" in log and log["step"] == state.global_step]
    return looks[-1] if looks else None


def answer_loss(model: nn.Module, rows: Dataset, batch_size: int, desc: str) -> float:
    """Mean over rows of the answer's loss, nats per token, over at most `LOOK_ROWS` encoded rows of a set."""
    scores = encoded_answer_scores(model, list(spread(rows, LOOK_ROWS)), batch_size, desc)
    return fmean(score.loss for score in scores)


def mean_answer_loss(model: nn.Module, rows: Dataset, batch_size: int, device: torch.device, desc: str) -> float:
    """`answer_loss` as one number for all processes, or one of them might stop alone."""
    return reduce(torch.tensor(answer_loss(model, rows, batch_size, desc), device=device), "mean").item()
