"""When to stop without a retain-only model: the forget set's answers have become as unlikely as unseen ones."""

from __future__ import annotations

from statistics import fmean

import torch
from accelerate.utils import reduce
from datasets import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from .data.formats import spread
from .evaluation.scores import answer_losses
from .reference import adapter_off

logger = logging.get_logger(__name__)

# Rows of each set that a look scores at most, spread over the set.
LOOK_ROWS = 256


class StopWhenCalibrated(TrainerCallback):
    """Ends the training when the model finds the forget set's answers as unlikely as answers that it never saw.

    A model that never saw the forget set would meet its answers as the model at hand meets a holdout set of the same
    kind. So the level to reach is the holdout set's mean answer loss with the adapter off, taken once; every `steps`
    steps the forget set's mean answer loss with the adapter on is held against it.

    Every process scores all the rows, so that it works however the model is sharded.

    Args:
        forget, holdout: rows as they were given, in a format of `rfa_llm.data.formats.encode`.
        steps: training steps between two looks.
        batch_size: answers scored at a time.

    Attributes:
        look: of the last look, `forget_answer_loss` and `holdout_answer_loss`, nats per token; empty before the first.
    """

    def __init__(self, forget: Dataset, holdout: Dataset, steps: int, batch_size: int):
        self._forget, self._holdout = list(spread(forget, LOOK_ROWS)), list(spread(holdout, LOOK_ROWS))
        self._steps, self._batch_size = steps, batch_size
        self.look: dict[str, float] = {}
        self._level = 0.0

    def _loss(self, args, model, tokenizer, rows: list[dict], desc: str) -> float:
        losses = answer_losses(model, tokenizer, rows, batch_size=self._batch_size, desc=desc)
        # One number for all processes, or one of them might stop alone.
        return reduce(torch.tensor(fmean(losses), device=args.device), "mean").item()

    def on_train_begin(self, args, state, control, model, processing_class, **kwargs):
        self.look = {}
        with adapter_off(model):
            self._level = self._loss(args, model, processing_class, self._holdout, "holdout: losses")

    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        if state.global_step % self._steps:
            return
        loss = self._loss(args, model, processing_class, self._forget, "forget: losses")
        self.look = {"forget_answer_loss": loss, "holdout_answer_loss": self._level}
        if loss >= self._level:
            # A checkpoint of the last step, where checkpoints are written.
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        reached = self.look.get("forget_answer_loss", 0.0)
        if reached < self._level and state.is_world_process_zero:
            logger.warning(
                f"stop_at: the training ended with the forget set's answers at a loss of {reached:.3f} nats a token, "
                f"below the {self._level:.3f} of answers that the model never saw; raise num_train_epochs."
            )
