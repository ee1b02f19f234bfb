"""Callbacks for a training: TOFU's metrics on the way, and a picture of the residuals that grows in a notebook."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from rfa_llm.evaluation.scores import BrokenModelError
from rfa_llm.evaluation.suite import check_questions, check_sizes, evaluate_tofu, summary
from rfa_llm.memory import reshard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)

# A drawing takes a tenth of a second, which is more than a step of a small model.
REDRAW_SECONDS = 2.0
LINES = ("-", "--", "-.", ":")


class TofuEvaluationCallback(TrainerCallback):
    """Runs `evaluate_tofu` every `steps` steps and after the last one, and logs the summary through the Trainer.

    The figures are in `trainer.state.log_history` and in every tracker of `report_to`, as `tofu/forget_quality`,
    `tofu/model_utility` and so on: the columns of `rfa_llm.evaluation.summary`. No text of the sets is logged. The
    training is the same with the callback as without it, but for the time: `train_runtime` counts it too.

    Every process runs every forward pass, so that it works however the model is sharded.

    Example:

    ```python
    trainer = RFATrainer(model, args, forget_dataset=forget, retain_dataset=retain)
    trainer.add_callback(TofuEvaluationCallback(trainer, sets, steps=30, retain_log="retain_eval.json"))
    trainer.train()
    ```

    Args:
        trainer ([`~transformers.Trainer`]): The trainer that it is added to.
        sets (`Mapping[str, Dataset]`): The question sets, as `evaluate_tofu` takes them.
        steps (`int`): Training steps between two evaluations.
        batch_size, retain_log, max_new_tokens: As in `evaluate_tofu`.

    Raises:
        ValueError: `steps` is not positive, or as `evaluate_tofu`, before the training.
    """

    def __init__(
        self,
        trainer: Trainer,
        sets: Mapping[str, Dataset],
        steps: int,
        batch_size: int = 16,
        retain_log: str | os.PathLike | dict | None = None,
        max_new_tokens: int = 200,
    ):
        if steps < 1:
            raise ValueError(f"steps: {steps} is not positive; give the number of steps between two evaluations.")
        self._trainer, self._sets, self._steps = trainer, sets, steps
        check_sizes(batch_size, max_new_tokens)
        self._retain_log = check_questions(sets, retain_log)
        self._settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        self._evaluated = 0

    def _evaluate(self, state, control, model, tokenizer) -> None:
        if self._evaluated == state.global_step:
            return
        self._evaluated = state.global_step
        try:
            log = evaluate_tofu(model, tokenizer, self._sets, retain_log=self._retain_log, **self._settings)
        except BrokenModelError as error:
            # The trainer ends with the last good adapter.
            logger.warning(f"No TOFU figures of step {state.global_step}: {error}")
            return
        reshard(model)
        # `Trainer.log` takes back that the step's own log is due.
        should_log = control.should_log
        self._trainer.log({f"tofu/{name}": value for name, value in summary(log).items()})
        control.should_log = should_log

    def on_train_begin(self, args, state, control, **kwargs):
        self._evaluated = state.global_step

    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        if state.global_step % self._steps == 0 or state.global_step >= state.max_steps:
            self._evaluate(state, control, model, processing_class)

    def on_log(self, args, state, control, logs, model, processing_class, **kwargs):
        # The summary at the end, where another callback ended the training, at whatever event. `on_train_end` would be
        # too late: the trackers are closed by then. The summary alone has the mean loss (`train_runtime` may be in
        # each step's log).
        if "train_loss" in logs:
            self._evaluate(state, control, model, processing_class)


class ResidualPlotCallback(TrainerCallback):
    """In a notebook, draws the residuals of each aligned block while [`RFATrainer`] trains.

    It is one picture, redrawn in its place under the Trainer's progress bar, every two seconds at most and at the end.

    Raises:
        ImportError: From the training's begin, where matplotlib or IPython is not installed.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        try:
            import IPython.display
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"the picture needs {error.name}; install it with `pip install rfa-llm[notebook]`."
            ) from error
        self._display = IPython.display
        self._shown, self._drawn = None, float("-inf")

    def on_log(self, args, state, control, logs, **kwargs):
        drawable = any(name.startswith("residual_forget/") for name in logs)
        if drawable and state.is_world_process_zero and time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw(state.log_history)

    def on_train_end(self, args, state, control, **kwargs):
        if self._shown is not None:
            self._draw(state.log_history)

    def _draw(self, history: Sequence[dict]) -> None:
        png = BytesIO()
        draw_residuals(history).savefig(png, format="png", dpi=100)
        picture = self._display.Image(data=png.getvalue(), format="png")
        if self._shown is None:
            self._shown = self._display.display(picture, display_id=True)
        else:
            self._shown.update(picture)
        self._drawn = time.monotonic()


def draw_residuals(history: Sequence[dict]) -> Figure:
    """The residuals of each aligned block over the steps, forget and retain set side by side on one scale.

    Blocks differ by line style as well as by colour.

    Args:
        history: `trainer.state.log_history` of an [`RFATrainer`].

    Returns:
        A figure with one panel a set; without the retain set's where `residual="branch"` does not measure it.

    Raises:
        ValueError: The history holds no residuals.
    """
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, tuple[list, list]]] = {}
    for log in history:
        for name, value in log.items():
            kind, _, block = name.partition("/block_")
            if kind in ("residual_forget", "residual_retain"):
                steps, values = curves.setdefault(kind, {}).setdefault(block, ([], []))
                steps.append(log["step"])
                values.append(value)
    if not curves:
        raise ValueError(
            f"history: none of its {len(history)} entries has residuals; train with RFATrainer, with logging_steps at "
            "most the number of steps."
        )

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, sorted(curves), strict=True):
        for number, (block, (steps, values)) in enumerate(curves[kind].items()):
            panel.plot(steps, values, linestyle=LINES[number % len(LINES)], label=f"block {block}")
        panel.set_title(f"{kind.removeprefix('residual_')} set")
        panel.set_xlabel("training step")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    # How large the residual is against the feature that it changes, so it has no unit.
    panels[0].set_ylabel(r"$\|R_b\|\,/\,\|h^0_b\|$, mean over tokens")
    panels[0].legend(fontsize=8)
    return figure
