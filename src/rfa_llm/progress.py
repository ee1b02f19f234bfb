"""The Trainer's progress bar without the numbers of every log."""

from __future__ import annotations

from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils import is_in_notebook

if is_in_notebook():
    from transformers.utils.notebook import NotebookProgressCallback

    class _Bar(NotebookProgressCallback):
        def on_train_begin(self, *args, **kwargs):
            super().on_train_begin(*args, **kwargs)
            # The table of losses under the bar.
            self.training_tracker.inner_table = None

        def on_log(self, *args, **kwargs):
            pass
else:

    class _Bar(ProgressCallback):
        def on_log(self, *args, **kwargs):
            pass


def bar_alone(trainer: Trainer) -> None:
    """Let a trainer show its bar, and print no logs; they stay in `trainer.state.log_history`."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.add_callback(_Bar)
