"""When to stop without a retain-only model: the forget set's answers have become as unlikely as unseen ones."""

from __future__ import annotations

from statistics import fmean

import torch
from accelerate.utils import reduce
from datasets import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from .adapters import adapter_off
from .data.formats import spread
from .evaluation.scores import answer_losses

logger = logging.get_logger(__name__)

# Rows of each set that a look scores at most, spread over the set.
LOOK_ROWS = 256


class StopWhenCalibrated(TrainerCallback):
    """Ends the training when the model finds the forget set's answers as unlikely as answers that it never saw.

    A model that never saw the forget set would meet its answers as the model at hand meets a holdout set of the same
    kind. So the level to reach is the holdout set's mean answer loss with the adapter off, taken once; every `steps`
    steps, and at the last, the forget set's mean answer loss with the adapter on is held against it.

    Answers are scored whole, also where `max_length` cuts them for the training. Every process scores all the rows,
    so that it works however the model is sharded.

    Args:
        forget, holdout: rows as they were given, in a format of `rfa_llm.data.formats.encode`.
        steps: training steps between two looks.
        batch_size: answers scored at a time.

    Attributes:
        look: of the last look, `forget_answer_loss` and `holdout_answer_loss`, nats per token; empty before the first.
        is_new: whether `look` is yet to be logged.

    Raises:
        ValueError: From the training's begin, when there is nothing to forget: the level is reached without it.
    """

    def __init__(self, forget: Dataset, holdout: Dataset, steps: int, batch_size: int):
        self._forget, self._holdout = list(spread(forget, LOOK_ROWS)), list(spread(holdout, LOOK_ROWS))
        self._steps, self._batch_size = steps, batch_size
        self._level = 0.0
        self.look: dict[str, float] = {}
        self.is_new = False

    def _loss(self, args, model, tokenizer, rows: list[dict], desc: str) -> float:
        losses = answer_losses(model, tokenizer, rows, batch_size=self._batch_size, desc=desc)
        # One number for all processes, or one of them might stop alone.
        return reduce(torch.tensor(fmean(losses), device=args.device), "mean").item()

    def on_train_begin(self, args, state, control, model, processing_class, **kwargs):
        self.look, self.is_new = {}, False
        with adapter_off(model):
            self._level = self._loss(args, model, processing_class, self._holdout, "holdout: losses")
            known = self._loss(args, model, processing_class, self._forget, "forget: losses")
        if known >= self._level:
            raise ValueError(
                f"holdout_dataset: its answers have a loss of {self._level:.3f} nats a token before any training, and "
                f"the forget set's {known:.3f}: they look no more familiar; give rows of the forget set's kind that "
                "the model never saw, or leave stop_at out."
            )

    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        if state.global_step % self._steps and state.global_step < state.max_steps:
            return
        try:
            loss = self._loss(args, model, processing_class, self._forget, "forget: losses")
        except ValueError:
            # The rows passed before the training, so the adapter is broken; the trainer's own guard says so.
            return
        self.look, self.is_new = {"forget_answer_loss": loss, "holdout_answer_loss": self._level}, True
        control.should_log = True
        if loss >= self._level:
            if args.save_strategy == "steps":
                control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.look and self.look["forget_answer_loss"] < self._level and state.is_world_process_zero:
            logger.warning(
                f"stop_at: the training ended with the forget set's answers at a loss of "
                f"{self.look['forget_answer_loss']:.3f} nats a token, below the {self._level:.3f} of answers that the "
                "model never saw; raise num_train_epochs."
            )
