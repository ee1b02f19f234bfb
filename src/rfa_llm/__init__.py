"""Machine unlearning for language models by Residual Feature Alignment with LoRA."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rfa_llm.callbacks import ResidualPlotCallback, TofuEvaluationCallback
    from rfa_llm.config import RFAConfig
    from rfa_llm.data.tofu import load_tofu
    from rfa_llm.evaluation import evaluate_tofu
    from rfa_llm.trainer import RFATrainer

__version__ = "0.1.0"
__all__ = [
    "RFAConfig",
    "RFATrainer",
    "ResidualPlotCallback",
    "TofuEvaluationCallback",
    "evaluate_tofu",
    "load_tofu",
]

_HOMES = {
    "RFAConfig": "config",
    "RFATrainer": "trainer",
    "ResidualPlotCallback": "callbacks",
    "TofuEvaluationCallback": "callbacks",
    "evaluate_tofu": "evaluation",
    "load_tofu": "data.tofu",
}


def __getattr__(name: str):
    # Loaded on first use, so that `rfa-llm --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
