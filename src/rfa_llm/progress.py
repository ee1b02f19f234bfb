"""The Trainer's progress bar without the numbers of every log."""

from __future__ import annotations

from transformers import PrinterCallback, Trainer
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK


# In a notebook transformers has a bar of another kind.
class _Bar(DEFAULT_PROGRESS_CALLBACK):
    def on_log(self, *args, **kwargs):
        pass


def bar_alone(trainer: Trainer) -> None:
    """Let a trainer show its bar, and print no logs; they stay in `trainer.state.log_history`."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.add_callback(_Bar)
