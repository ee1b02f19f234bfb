"""Rows that answer a forget question with "I don't know", for IdkNLL and IdkDPO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rfa_llm.data.formats import encode, format_of
from rfa_llm.data.pairing import ForgetRetainPairs

IDK_ANSWERS = (
    "I don't know the answer to that.",
    "I'm sorry, but I have no information about this.",
    "That is something I can't tell you, because I don't know it.",
    "I am not familiar with that subject.",
    "I'm afraid I know nothing about this.",
    "I have never come across that, so I can't say.",
    "Sorry, this is beyond what I know.",
    "I can't answer this question; the facts are unknown to me.",
    "I would have to guess, and I'd rather say that I don't know.",
    "No details about this are known to me.",
)


def check_idk_answers(answers: list[str] | str | None) -> None:
    """Check that the setting `idk_answers` names answers, or a file.

    Raises:
        ValueError: There is no such file, no answer, or an empty one.
    """
    if isinstance(answers, str):
        if not Path(answers).is_file():
            raise ValueError(f"idk_answers: there is no file {answers!r}; give a text file with one answer a line.")
        answers = read_idk_answers(answers)
    if answers is not None and not (answers and all(isinstance(a, str) and a.strip() for a in answers)):
        raise ValueError("idk_answers: there is no answer, or an empty one; give at least one, and text in each.")


def read_idk_answers(answers: list[str] | str | None) -> list[str]:
    """The answers that the setting `idk_answers` stands for; a file's empty lines are left out."""
    if answers is None:
        return list(IDK_ANSWERS)
    if isinstance(answers, str):
        lines = Path(answers).read_text(encoding="utf-8-sig").splitlines()
        return [line.strip() for line in lines if line.strip()]
    return answers


def idk_answer(seed: int, epoch: int, index: int, count: int) -> int:
    """Which of `count` answers meets forget row `index` in an epoch; nothing else has a say in it."""
    return int(np.random.default_rng((seed, epoch, index)).integers(count))


def with_answer(row: dict, answer: str) -> dict:
    """A row with another answer to the same question, in any format of `rfa_llm.data.formats` but `text`."""
    turn = {"role": "assistant", "content": answer}
    match format_of(row):
        case ("prompt", "completion") if isinstance(row["prompt"], list):
            return {**row, "completion": [turn]}
        case ("prompt", "completion"):
            # A completion may begin with the space that parts it from its prompt.
            old = row["completion"]
            return {**row, "completion": old[: len(old) - len(old.lstrip())] + answer}
        case ("messages",):
            return {**row, "messages": [*row["messages"][:-1], turn]}
        case ("question", "answer"):
            return {**row, "answer": answer}


class IdkPairs(ForgetRetainPairs):
    """Pairs with a third row, `idk`: the forget row's question and an "I don't know" answer.

    Args:
        forget, retain, seed: As in `ForgetRetainPairs`.
        forget_rows: The forget set's rows as they were given.
        answers: What the `idk` rows answer.
        processing_class: The tokenizer.
        max_length: Tokens kept of a row.

    Raises:
        ValueError: The forget set has `text` rows, which ask no question.
    """

    def __init__(
        self,
        forget: Dataset,
        retain: Dataset,
        seed: int,
        forget_rows: Dataset,
        answers: list[str],
        processing_class: PreTrainedTokenizerBase,
        max_length: int | None,
    ):
        super().__init__(forget, retain, seed)
        if format_of(forget_rows.column_names) == ("text",):
            raise ValueError(
                'forget_dataset has text rows, which ask no question that could be answered with "I don\'t know"; '
                "give rows with a question or a prompt, or use another method."
            )
        self.forget_rows, self.answers = forget_rows, answers
        self.processing_class, self.max_length = processing_class, max_length

    def __getitem__(self, i: int) -> dict[str, dict]:
        answer = self.answers[idk_answer(self.seed, self.epoch, i, len(self.answers))]
        encoded = encode(with_answer(self.forget_rows[i], answer), self.processing_class)
        idk = {**encoded, "input_ids": encoded["input_ids"][: self.max_length], "index": i}
        return {**super().__getitem__(i), "idk": idk}


class IdkInsteadPairs(IdkPairs):
    """Pairs whose forget row is the `idk` row; the answer to be forgotten is not seen."""

    def __getitem__(self, i: int) -> dict[str, dict]:
        pair = super().__getitem__(i)
        return {"forget": pair["idk"], "retain": pair["retain"]}
