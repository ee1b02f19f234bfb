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
from transformers import TrainerCallback
from transformers.utils import logging

from .adapters import adapter_off, scale_adapter
from .data.formats import spread
from .evaluation.scores import encoded_answer_scores
from .memory import reshard

logger = logging.get_logger(__name__)

# Rows of each set that a look scores at most, spread over the set.
LOOK_ROWS = 256
# An adapter that falls short is made stronger by this factor at most: far beyond what was trained, nothing is known.
LARGEST_SCALE = 2.0
# How finely the factor is sought; in the loss it makes 1 or 2%.
SCALE_STEP = 0.01


class StopWhenCalibrated(TrainerCallback):
    """Ends the training when the forget set's answers are as unlikely as ignorance would make them, and scales the
    adapter so that they are just that.

    Every `steps` steps, and at the last, the forget set's mean answer loss with the adapter on is held against a
    level. At the first look that reaches it the training ends. There, and at the last step, the adapter's effect is
    multiplied by the factor at which the loss is the level: below 1 where the training went too far, up to 2 where it
    fell short. An adapter that would need more is left as it is, and a warning says so.

    Answers are scored as the training sees them, cut at `max_length`. Every process scores all the rows, so that it
    works however the model is sharded.

    Args:
        forget: encoded rows, from `rfa_llm.data.formats.prepare`.
        level: gives the level, nats per token, from the model; called once, at the training's begin.
        level_name: what the level is called in the logs.
        steps: training steps between two looks.
        batch_size: answers scored at a time.

    Attributes:
        look: of the last look, `forget_answer_loss` and the level, nats per token, and at the end `adapter_scale`, the
            factor; empty before the first.
        is_new: whether `look` is yet to be logged.

    Raises:
        ValueError: From the training's begin, when there is nothing to forget: the level is reached without it.
    """

    def __init__(
        self, forget: Dataset, level: Callable[[nn.Module], float], level_name: str, steps: int, batch_size: int
    ):
        self._forget, self._make_level, self._level_name = forget, level, level_name
        self._steps, self._batch_size = steps, batch_size
        # Of the forget set's answers without the adapter, and what they are to come to; from the training's begin.
        self._known, self._level = 0.0, 0.0
        self.look: dict[str, float] = {}
        self.is_new = False

    def _loss(self, args, model) -> float:
        return mean_answer_loss(model, self._forget, self._batch_size, args.device, "forget: losses")

    def _scale(self, args, model, loss: float) -> float:
        """Multiply the adapter's effect by the factor at which `loss`, the model's now, would be the level."""
        losses = {0.0: self._known, 1.0: loss}

        def beyond(factor: float) -> float:
            if factor not in losses:
                with rescale_adapter_scale(model, factor):
                    losses[factor] = self._loss(args, model)
            return losses[factor] - self._level

        low, high = (1.0, LARGEST_SCALE) if loss < self._level else (0.0, 1.0)
        if beyond(high) < 0:
            return 1.0
        factor = brentq(beyond, low, high, xtol=SCALE_STEP)
        reshard(model)
        scale_adapter(model, factor)
        return factor

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.look, self.is_new = {}, False
        self._level = self._make_level(model)
        with adapter_off(model):
            self._known = self._loss(args, model)
        if self._known >= self._level:
            raise ValueError(
                f"stop_at: the forget set's answers have a loss of {self._known:.3f} nats a token before any "
                f"training, and {self._level_name}, which stands for ignorance, is {self._level:.3f}: they look no "
                "more familiar; give a holdout_dataset of the forget set's kind that the model never saw, or the "
                "teacher from before the fine-tuning, or leave stop_at out."
            )

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self._steps and state.global_step < state.max_steps:
            return
        try:
            loss = self._loss(args, model)
        except ValueError:
            # The rows passed before the training, so the adapter is broken; the trainer's own guard says so.
            return
        self.look, self.is_new = {"forget_answer_loss": loss, self._level_name: self._level}, True
        control.should_log = True
        if loss >= self._level or state.global_step >= state.max_steps:
            factor = self._scale(args, model, loss)
            self.look |= {"forget_answer_loss": self._loss(args, model), "adapter_scale": factor}
        if loss >= self._level:
            if args.save_strategy == "steps":
                control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        short = self.look and self.look.get("adapter_scale", 1.0) == 1.0
        if short and self.look["forget_answer_loss"] < self._level and state.is_world_process_zero:
            logger.warning(
                f"stop_at: the training ended with the forget set's answers at a loss of "
                f"{self.look['forget_answer_loss']:.3f} nats a token, below the {self._level:.3f} of ignorance "
                f"({self._level_name}), too far for scaling the adapter; raise num_train_epochs."
            )


def mean_answer_loss(model: nn.Module, rows: Dataset, batch_size: int, device: torch.device, desc: str) -> float:
    """Mean over rows of the answer's loss, nats per token, over at most `LOOK_ROWS` encoded rows of a set."""
    scores = encoded_answer_scores(model, list(spread(rows, LOOK_ROWS)), batch_size, moments=False, desc=desc)
    # One number for all processes, or one of them might stop alone.
    return reduce(torch.tensor(fmean(score.loss for score in scores), device=device), "mean").item()
