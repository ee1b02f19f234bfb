"""Evaluation of unlearning on TOFU: scores of a model's answers, metrics, the suite, and its log format."""

from rfa_llm.evaluation.log import forget_truth_ratios, read_log, write_log
from rfa_llm.evaluation.scores import (
    AnswerScore,
    answer_gradient_norms,
    answer_losses,
    answer_scores,
    greedy_answers,
    next_token_kl,
    next_token_logits,
)
from rfa_llm.evaluation.suite import evaluate_tofu, summary

__all__ = [
    "AnswerScore",
    "answer_gradient_norms",
    "answer_losses",
    "answer_scores",
    "evaluate_tofu",
    "greedy_answers",
    "next_token_kl",
    "next_token_logits",
    "read_log",
    "forget_truth_ratios",
    "summary",
    "write_log",
]
