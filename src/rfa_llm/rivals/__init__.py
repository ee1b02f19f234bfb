"""Other unlearning methods to measure Residual Feature Alignment against, on the same data, adapters and launching."""

from rfa_llm.rivals.config import METHODS, RivalConfig
from rfa_llm.rivals.trainers import RIVALS, RivalTrainer

__all__ = ["METHODS", "RIVALS", "RivalConfig", "RivalTrainer"]
