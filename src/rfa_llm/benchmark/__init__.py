"""Methods compared on TOFU's questions: runs with their trajectories, the table, the picture."""

from rfa_llm.benchmark.picture import check_can_draw, draw
from rfa_llm.benchmark.runs import (
    Run,
    check_numbers,
    check_reference,
    check_settings,
    identity,
    read_result,
    rows_digest,
    run_name,
    score_model,
    sees_holdout,
    train_and_score,
)
from rfa_llm.benchmark.sets import check_rows, holdout_halves, unseen
from rfa_llm.benchmark.table import at_best_learning_rate, table

__all__ = [
    "Run",
    "at_best_learning_rate",
    "check_can_draw",
    "check_numbers",
    "check_reference",
    "check_rows",
    "check_settings",
    "draw",
    "holdout_halves",
    "identity",
    "read_result",
    "rows_digest",
    "run_name",
    "score_model",
    "sees_holdout",
    "table",
    "train_and_score",
    "unseen",
]
