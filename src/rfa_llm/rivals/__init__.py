"""Other unlearning methods to measure Residual Feature Alignment against, on the same data, adapters and launching."""

from .config import METHODS, RivalConfig
from .trainers import RIVALS, RivalTrainer

__all__ = ["METHODS", "RIVALS", "RivalConfig", "RivalTrainer"]
