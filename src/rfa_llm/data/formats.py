"""Rows of the four dataset formats trl knows, as token ids with the place where the answer starts."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# The columns of each format, tried in this order.
FORMATS = (("prompt", "completion"), ("messages",), ("question", "answer"), ("text",))

# What a question looks like to a model whose tokenizer has no chat template; the completion is " {answer}".
PLAIN_TEMPLATE = "Question: {question}\nAnswer:"

# What a file of each type has to hold.
FILE_TYPES = {
    ".jsonl": "one JSON object a line, in UTF-8",
    ".json": "a list of JSON objects, in UTF-8",
    ".csv": "a header and as many cells in each row, in UTF-8",
    ".parquet": "a whole Parquet file",
}


def _read_rows(path: Path) -> Dataset:
    """Rows of a local .jsonl, .json (a list), .csv or .parquet file, held in memory.

    The readers of `datasets` would leave a copy of the file in its cache folder, where the text to be forgotten
    would outlive the training.
    """
    if path.suffix == ".parquet":
        return Dataset.from_list(pyarrow.parquet.read_table(path).to_pylist())
    # Excel puts a byte order mark first, which "utf-8" would leave in a column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(file))
        elif path.suffix == ".json":
            rows = json.load(file)
        else:
            rows = []
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_json_line(line, number))
    if not isinstance(rows, list):
        raise ValueError("it is no list of rows")
    for index, row in enumerate(rows):
        # csv keeps cells beyond the header's under None.
        if not isinstance(row, dict) or None in row:
            raise ValueError(f"row {index} is no object, or has more cells than the header")
    return Dataset.from_list(rows)


def _json_line(line: str, number: int) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} at character {error.colno}") from error


def load_rows(
    source: str | os.PathLike | Dataset, field: str, config: str | None = None, split: str = "train"
) -> Dataset:
    """The rows of `source`: a Dataset without its format, a local file, or a dataset of the Hub.

    Args:
        source: a `datasets.Dataset`; or the path of a .jsonl, .json, .csv or .parquet file; or a Hub id.
        field: the setting `source` came from, such as "forget_dataset", named in errors.
        config: the configuration to take of a Hub dataset, such as "forget10" of TOFU.
        split: the split to take of a Hub dataset.

    Raises:
        ValueError: `source` is None, a folder, a file that is not there or not of its type, a dataset that the Hub
            does not give, or has no rows.
        TypeError: `source` is neither a Dataset nor a path.
    """
    if source is None:
        raise ValueError(f"{field} is None; give a Dataset, a file or a Hub id.")
    if not isinstance(source, (Dataset, str, os.PathLike)):
        raise TypeError(f"{field} is a {type(source).__name__}; give one Dataset, a file's path or a Hub id.")
    rows = source if isinstance(source, Dataset) else _load(os.fspath(source), field, config, split)
    if len(rows) == 0:
        raise ValueError(f"{field} is empty; give at least one row.")
    # With one, such as "torch", values would be tensors.
    return rows.with_format(None)


def _load(source: str, field: str, config: str | None, split: str) -> Dataset:
    path = Path(source)
    if path.suffix not in FILE_TYPES:
        if path.exists():
            # `datasets` would read it, and leave a copy in its cache.
            raise ValueError(
                f"{field} is {source!r}, a folder or a file of another type; give a {', '.join(FILE_TYPES)} file or a "
                "Hub id."
            )
        try:
            return load_dataset(source, config, split=split)
        except (ValueError, OSError, DatasetsError) as error:
            raise ValueError(
                f"{field}: {source!r} cannot be loaded from the Hub ({error}); give id, configuration and split of a "
                f"dataset there, or a {', '.join(FILE_TYPES)} file."
            ) from error
    if not path.is_file():
        raise ValueError(f"{field} is {source!r}, but there is no such file; give the path of a file that exists.")
    try:
        return _read_rows(path)
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        wanted = FILE_TYPES[path.suffix]
        raise ValueError(
            f"{field} {source!r} cannot be read ({error}); give {wanted}, a column's values all of one type."
        ) from error


def encode(row: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Token ids of one row, and where its answer starts.

    The prompt's ids never depend on the answer; the answer's are those that follow them where the two are tokenized
    together (some tokenizers put a space before each text), or its own where the prompt's end would be another. The
    formats are those of trl (https://huggingface.co/docs/trl/dataset_formats), and question/answer, as in TOFU:

    - prompt/completion, strings: used as they are. The tokenizer's bos (where it adds one) and eos are added unless
      the strings carry them already.
    - prompt/completion or messages, conversational: rendered with the chat template, which writes its own special
      tokens. What follows the end of the last turn's text and end token is cut.
    - question/answer: one user and one assistant turn, likewise.
    - Both without a chat template: `PLAIN_TEMPLATE`, then " {answer}" and eos.
    - text: the whole text and eos are the answer, after one bos (eos where the tokenizer has none).

    Args:
        row: one row, in any of the formats.
        tokenizer: one that `check_tokenizer` passes.

    Returns:
        `input_ids`, list of int, and `answer_start`, the index in it of the answer's first token, at least 1.

    Raises:
        ValueError: no format's columns are there, the prompt or the answer is empty, the last message is not the
            assistant's, the conversation has more turns than the plain template can show, or the chat template
            writes the prompt in another way when the answer follows.
        TypeError: a value that should be text is not.
    """
    match format_of(row):
        case ("prompt", "completion") if isinstance(row["prompt"], list):
            prompt, completion = _turns(row["prompt"], "prompt"), _turns(row["completion"], "completion")
            return _encode_turns(prompt, completion, tokenizer)
        case ("prompt", "completion"):
            prompt, completion = _text(row["prompt"], "prompt"), _answer_text(row["completion"], "completion")
            prompt_ids, answer_ids = _split(prompt, completion, tokenizer)
            return _join(_with_bos(prompt_ids, tokenizer), _with_eos(answer_ids, tokenizer))
        case ("messages",):
            turns = _turns(row["messages"], "messages")
            return _encode_turns(turns[:-1], turns[-1:], tokenizer)
        case ("question", "answer"):
            question = {"role": "user", "content": _text(row["question"], "question")}
            answer = {"role": "assistant", "content": _answer_text(row["answer"], "answer")}
            return _encode_turns([question], [answer], tokenizer)
        case ("text",):
            # One token goes before the text, so that its first token is predicted from something too.
            start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            ids = _with_eos(_ids(_answer_text(row["text"], "text"), tokenizer), tokenizer)
            return {"input_ids": ids if ids[0] == start else [start, *ids], "answer_start": 1}


def format_of(columns: Iterable[str]) -> tuple[str, ...]:
    """The first of `FORMATS` whose columns are all there.

    Raises:
        ValueError: No format's are.
    """
    found = set(columns)
    for needed in FORMATS:
        if found.issuperset(needed):
            return needed
    accepted = ", or ".join("/".join(needed) for needed in FORMATS)
    raise ValueError(f"the columns are {sorted(found)}; give {accepted}.")


def content(row: dict) -> dict:
    """The columns of a row that `encode` reads; others, such as ids or sources, are left out.

    So are a turn's keys without a value: `datasets` gives every turn the keys of all turns of its set.

    Raises:
        ValueError: no format's columns are there.
    """
    return {column: _without_none(row[column]) for column in format_of(row)}


def texts(row: dict) -> list[str]:
    """All the text of a row's content, turn by turn where it is a conversation.

    Raises:
        ValueError, TypeError: as `content`; or a value that should be text is not.
    """
    found = []
    for name, value in content(row).items():
        turns = value if isinstance(value, list) else [{"content": value}]
        found += [_text(turn.get("content"), name) for turn in turns]
    return found


def prepare(
    dataset: Dataset, processing_class: PreTrainedTokenizerBase, field: str, max_length: int | None
) -> Dataset:
    """The rows of `dataset`, encoded, without their text.

    Nothing is written to the cache of `datasets`, where the text to be forgotten would outlive the training.

    Args:
        dataset: rows in one of the formats of `encode`.
        processing_class: the model's tokenizer.
        field: the setting the rows came from, such as "forget_dataset", named in errors.
        max_length: tokens to keep of a row, from its start; None keeps all. An answer may be cut, but not off.

    Returns:
        A Dataset with the columns `input_ids` (list of int), `answer_start` (int) and `index` (int, the row number).

    Raises:
        ValueError: no format's columns are there, a row cannot be encoded, or `max_length` cuts a whole answer; each
            names the field, and the row where there is one.
        TypeError: a value that should be text is not.
    """
    columns = dataset.column_names
    try:
        format_of(columns)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error

    def encode_row(row: dict, index: int) -> dict:
        try:
            encoded = encode(row, processing_class)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{field} row {index}: {error}") from error
        except TemplateError as error:
            raise ValueError(
                f"{field} row {index}: the chat template refuses the turns ({error}); change either."
            ) from error
        if max_length is not None and encoded["answer_start"] >= max_length:
            raise ValueError(
                f"{field} row {index}: max_length={max_length} cuts the whole answer, which starts at token "
                f"{encoded['answer_start']} (counted from 0); raise max_length."
            )
        return {**encoded, "input_ids": encoded["input_ids"][:max_length], "index": index}

    return dataset.map(
        encode_row, with_indices=True, remove_columns=columns, keep_in_memory=True, desc=f"Tokenizing {field}"
    )


def check_disjoint(one: Dataset, other: Dataset, field: str, other_field: str) -> None:
    """Check that no row is in two sets, such as both to be forgotten and to be retained.

    Args:
        one, other: sets from `prepare`; rows are the same when all their token ids are.
        field, other_field: the settings they came from, such as "forget_dataset", named in errors.

    Raises:
        ValueError: some rows are in both.
    """
    others = {tuple(ids) for ids in other["input_ids"]}
    both = [row["index"] for row in one if tuple(row["input_ids"]) in others]
    if both:
        raise ValueError(
            f"{len(both)} rows of {field} are in {other_field} too, token for token, the first of them row {both[0]} "
            f"of {field} (counted from 0); remove them from one of the two, or, where their texts differ, use a "
            "tokenizer that tells them apart."
        )


def spread(rows: Dataset, most: int) -> Dataset:
    """At most `most` of the rows, spread evenly over all of them."""
    number = min(most, len(rows))
    return rows.select([index * len(rows) // number for index in range(number)])


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that answers can end and rows can be padded; a missing pad token becomes the eos token, as in trl.

    Raises:
        ValueError: the tokenizer has no eos token.
    """
    if tokenizer.eos_token is None:
        missing = "a pad and an end token" if tokenizer.pad_token is None else "an end token"
        raise ValueError(f"processing_class is a tokenizer without {missing}; set its eos_token.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _without_none(value: object) -> object:
    """A value with no key of `None` in it, however deep (a turn's tool calls have keys of their own)."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; give text.")
    return value


def _answer_text(value: object, name: str) -> str:
    if not _text(value, name).strip():
        raise ValueError(f"the answer ({name}) is empty; give it text or remove the row.")
    return value


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _split(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of the answer to it, as `encode` has them."""
    prompt_ids, whole = _ids(prompt, tokenizer), _ids(prompt + answer, tokenizer)
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole[len(prompt_ids) :]
    return prompt_ids, _ids(answer, tokenizer)


def _with_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    adds_bos = tokenizer("").input_ids[:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _join(prompt_ids: list[int], answer_ids: list[int]) -> dict:
    if not prompt_ids:
        raise ValueError("the prompt is empty; give a prompt, or the answer alone in a text column.")
    return {"input_ids": prompt_ids + answer_ids, "answer_start": len(prompt_ids)}


def _turns(value: object, name: str) -> list[dict]:
    """A conversation, where it is one."""
    if not isinstance(value, list):
        raise TypeError(f"{name} is {value!r}; give a list of turns.")
    if any(not isinstance(turn, dict) or "role" not in turn for turn in value):
        # What it says may be private.
        raise TypeError(f"{name} has a turn without a role; give each turn as an object of role and content.")
    return value


def _encode_turns(turns: list[dict], answer: list[dict], tokenizer: PreTrainedTokenizerBase) -> dict:
    roles = [turn["role"] for turn in [*turns, *answer]]
    if roles[-1:] != ["assistant"]:
        raise ValueError(f"the turns are {roles}; let an assistant's turn, the answer, be the last.")
    for turn in turns:
        _text(turn.get("content"), f"the content of a {turn['role']} turn")
    text = _answer_text(answer[-1].get("content"), "the last turn's content")

    if tokenizer.chat_template is None:
        if roles != ["user", "assistant"]:
            raise ValueError(
                f"the turns are {roles}, but a tokenizer without a chat template can show one question and its answer "
                "only; set the tokenizer's chat_template."
            )
        prompt = PLAIN_TEMPLATE.format(question=turns[0]["content"])
        prompt_ids, answer_ids = _split(prompt, f" {text}", tokenizer)
        return _join(_with_bos(prompt_ids, tokenizer), _with_eos(answer_ids, tokenizer))

    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*turns, *answer], tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template writes the prompt in another way when the answer follows; set a chat_template whose "
            "text of all turns starts with the text of the prompt."
        )
    prompt_ids, answer_ids = _split(prompt, whole[len(prompt) :].rstrip(), tokenizer)
    return _join(prompt_ids, _until_end_token(answer_ids, tokenizer))


def _until_end_token(answer_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """An answer without what follows the token that ends its turn, such as one that ends the conversation; with the
    end of sequence where the template ends no turn."""

    def is_blank(index: int, skip_special_tokens: bool) -> bool:
        return not tokenizer.decode([answer_ids[index]], skip_special_tokens=skip_special_tokens).strip()

    begin = len(answer_ids)
    while begin and is_blank(begin - 1, skip_special_tokens=True):
        begin -= 1
    ends = [index for index in range(begin, len(answer_ids)) if not is_blank(index, skip_special_tokens=False)]
    return answer_ids[: ends[0] + 1] if ends else [*answer_ids, tokenizer.eos_token_id]
