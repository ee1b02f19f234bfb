"""Sets that go together: what is trained on, what is asked, and the rows that no model saw."""

from __future__ import annotations

from datasets import Dataset

from rfa_llm.evaluation.suite import check_questions


def check_rows(forget: Dataset, retain: Dataset, sets: dict[str, Dataset]) -> None:
    """Check that what is asked is of what is trained on.

    Args:
        forget, retain: the sets to train on.
        sets: the questions, as `evaluate_tofu` takes them.

    Raises:
        ValueError: The two share a row or have other columns than TOFU's, a question of the forget set's is of another
            set, or one of the retain set's is to be forgotten.
    """
    for setting, rows in (("forget_config", forget), ("retain_config", retain)):
        _check_columns(rows, setting)
    check_questions(sets, None)

    def pairs(rows: Dataset) -> set[tuple[str, str]]:
        return set(zip(rows["question"], rows["answer"], strict=True))

    both = len(pairs(forget) & pairs(retain))
    if both:
        raise ValueError(f"forget_config, retain_config: {both} rows are in both sets; remove them from one of them.")
    questions = set(forget["question"])
    others = sum(question not in questions for question in sets["forget"]["question"])
    if others:
        raise ValueError(
            f"forget_perturbed_config: {others} of its {len(sets['forget'])} questions are not in the forget set "
            "(forget_config); give the perturbed split of that set."
        )
    forgotten = len(pairs(forget) & pairs(sets["retain"]))
    if forgotten:
        raise ValueError(
            f"retain_perturbed_config: {forgotten} of its {len(sets['retain'])} rows are in the forget set "
            "(forget_config); give questions of what should stay."
        )


def _check_columns(rows: Dataset, setting: str) -> None:
    if not {"question", "answer"} <= set(rows.column_names):
        raise ValueError(f"{setting}: its columns are {rows.column_names}; give rows of question and answer.")


def unseen(rows: Dataset, forget: Dataset, retain: Dataset) -> Dataset:
    """The rows, question and answer alone, whose questions are in neither set.

    Raises:
        ValueError: They have no questions and answers, or less than two questions are in neither.
    """
    _check_columns(rows, "holdout_dataset")
    rows = rows.select_columns(["question", "answer"])
    for index, row in enumerate(rows):
        for column, text in row.items():
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"holdout_dataset row {index}: {column} is {text!r}; give text or drop the row.")
    trained = {*forget["question"], *retain["question"]}
    indices = [index for index, question in enumerate(rows["question"]) if question not in trained]
    if len({rows["question"][index] for index in indices}) < 2:
        raise ValueError(
            f"holdout_dataset: {len(indices)} of its {len(rows)} rows are in neither the forget nor the retain set; "
            "give at least two questions that are not."
        )
    return rows.select(indices)


def holdout_halves(rows: Dataset, forget: Dataset, retain: Dataset) -> tuple[Dataset, Dataset]:
    """The rows that the membership attacks are scored on, and others for `stop_at`, which may be none.

    A run that stops by itself is not scored on what it has seen. The rows are drawn, because TOFU asks every author
    the same kinds of question in the same order.

    Args:
        rows: A holdout set.
        forget, retain: As of `unseen`. Each half has at most as many rows as the forget set.

    Raises:
        ValueError: As of `unseen`.
    """
    new = unseen(rows, forget, retain).shuffle(seed=0, keep_in_memory=True)
    number = min(len(forget), len(new) // 2)
    attacked = new.select(range(number))
    # A set may ask a question twice.
    scored_on = set(attacked["question"])
    others = [i for i, question in enumerate(new["question"]) if i >= number and question not in scored_on]
    return attacked, new.select(others[:number])
