"""Publishing an adapter on the Hugging Face Hub: its files in one commit, and nothing else that lies beside them."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from rfa_llm.card import Words, model_card
from rfa_llm.data.formats import texts
from rfa_llm.receipt import (
    RECEIPT_NAME,
    SALT_NAME,
    VOCABULARY_FILES,
    adapter_digests,
    as_text,
    is_tokenizer_file,
    read_adapter_config,
    read_receipt,
    read_salt,
    row_hashes,
    tokenizer_digests,
    with_card,
)

CARD_NAME = "README.md"
# Shorter pieces of the forget set, such as "yes" or a year, may stand anywhere.
SHORTEST_PRIVATE = 12
_WORD = re.compile(r"[^\W_]+")
# What stands before the first word of a sentence.
_SENTENCE_START = re.compile(r"""(^|[.!?:\n])[\s"'“”‘’«»()*-]*$""")


def base_on_hub(named: str | None, own: str | None, in_receipt: str | None = None) -> str:
    """The Hub id of an adapter's base.

    Args:
        named: What the publisher calls it, if at all.
        own: What the adapter calls it.
        in_receipt: What the receipt calls it, if there is one: of a folder, which need not be there any more, it has
            the own name alone.

    Raises:
        ValueError: That is a folder, or no Hub id; or a name without an owner, which a folder may have too.
    """
    base_model = named or own or ""
    try:
        validate_repo_id(base_model)
        may_be_folder = "/" not in base_model or Path(base_model).exists() or in_receipt not in (None, base_model)
        found = bool(named) or not may_be_folder
    except ValueError:
        found = False
    if not found:
        raise ValueError(
            f"base_model: {base_model!r} is no Hub id, and others have no such folder; give the Hub id of the same "
            "weights (--base_model, or --hub_base_model in the training)."
        )
    return base_model


def check_words(words: Words) -> None:
    """Check that a card can be published with these words.

    Raises:
        ValueError: What was forgotten is not said, or not in plain words, or a figure is no number.
        TypeError: The datasets are text.
    """
    if isinstance(words.datasets, str):
        # It would be searched letter by letter.
        raise TypeError(f"datasets: {words.datasets!r} is text; give a list, such as [{words.datasets!r}].")
    if not (words.forgotten or "").strip():
        raise ValueError(
            "forgotten: nothing is said; say in your own words what was forgotten, without a row or a name of the "
            "forget set."
        )
    if set(words.forgotten) & set("|<"):
        # `has_figures_of` tells the receipt's tables from others by these.
        raise ValueError(f"forgotten: {words.forgotten!r} has a '|' or a '<' in it; say it in plain words.")
    for figures in words.evaluations.values():
        for metric, value in figures.items():
            _number(metric, value)


def files_to_publish(folder: str | Path, repo_id: str, words: Words) -> dict[str, bytes | Path]:
    """What goes up, by name: the adapter, its configuration with the base's Hub id, the tokenizer, the receipt and the
    card.

    Nothing else in the folder does: neither the salt nor checkpoints, logs, caches and training arguments.

    Raises:
        ValueError: The folder holds no adapter with a receipt, or an adapter that its receipt is not of; or a figure
            is no number, or not finite, which JSON has no word for.
    """
    folder = Path(folder)
    receipt = read_receipt(folder)
    if adapter_digests(folder) != receipt["adapter"] or tokenizer_digests(folder) != receipt["tokenizer"]:
        raise ValueError(
            f"folder: the adapter in {str(folder)!r}, or its tokenizer, is not the one of its {RECEIPT_NAME}; publish "
            "them as they were saved together."
        )
    config = read_adapter_config(folder)
    if config["base_model_name_or_path"] != words.base_model:
        # A revision of another repository.
        config["revision"] = None
    config["base_model_name_or_path"] = words.base_model
    receipt["base_model"] |= {"name": words.base_model, "revision": config["revision"]}
    if words.evaluations:
        receipt["metrics"]["evaluation"] = {
            model: {metric: _number(metric, value) for metric, value in figures.items()}
            for model, figures in words.evaluations.items()
        }
    card = str(model_card(receipt, words, repo_id, config))
    return {
        CONFIG_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        SAFETENSORS_WEIGHTS_NAME: folder / SAFETENSORS_WEIGHTS_NAME,
        **{name: (folder / name).read_bytes() for name in receipt["tokenizer"]},
        RECEIPT_NAME: as_text(with_card(receipt, card)).encode(),
        CARD_NAME: card.encode(),
    }


def _number(metric: str, value: object) -> float:
    """A published figure, which may come as a number of numpy or torch; YAML has no word for those."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"evaluations: {metric} is {value!r}; give a finite number, or leave it out.")
    return number


def check_private(files: dict[str, bytes | Path], rows: Iterable[dict]) -> None:
    """Check that no text of the forget set of `SHORTEST_PRIVATE` characters or more is in what goes up.

    Args:
        files: From `files_to_publish`.
        rows: The forget set, in a format of `rfa_llm.data.formats.encode`.

    Raises:
        ValueError: Some is; the sentence names the file and the row, and does not repeat the text.
    """
    contents = {name: _header(file) if isinstance(file, Path) else file for name, file in files.items()}
    # Case and line breaks do not make another text of it.
    contents = {name: _flat(_read_as(content)) for name, content in contents.items()}
    for number, text in _texts(rows):
        for name, content in contents.items():
            if len(text.strip()) >= SHORTEST_PRIVATE and _flat(text) in content:
                raise ValueError(
                    f"forgotten: text of row {number} of the forget set is in {name}, which everybody could read; "
                    "say it in other words."
                )


def check_said(said: dict[str, str], rows: Iterable[dict]) -> None:
    """Check that the publisher's own words share no name, title or date with the forget set, and no piece of its text.

    Only words count (letters and digits), not what stands between them, nor how Unicode writes them. Refused is

    - a run of words, `SHORTEST_PRIVATE` characters or longer, that has a telling word in the row: one with a digit, or
      of four letters or more that begins with a capital inside a sentence (a title's "The" tells nothing);
    - a shorter run of two words or more that each begin with a capital or a digit in both texts;
    - any run of `SHORTEST_PRIVATE` characters or more that goes over more than one word, or parts of them.

    So a name of two words is found wherever it stands. A word alone passes where it is shorter or tells nothing:
    nothing tells a surname from "English". A script without capitals has no names here, and one without spaces no
    words either, so of those little or nothing is found.

    Args:
        said: Setting -> what the publisher says in it.
        rows: The forget set, in a format of `rfa_llm.data.formats.encode`.

    Raises:
        ValueError: Something is shared; the sentence names the setting and the row, and of a name it does not repeat
            the text.
    """
    own = {name: _WORD.findall(_plain(text)) for name, text in said.items()}
    for number, text in _texts(rows):
        text = _plain(text)
        joined = " ".join(_WORD.findall(text)).casefold()
        for name, words in own.items():
            if _shares_a_name(words, text):
                raise ValueError(
                    f"{name}: it shares a name, a title or a date with row {number} of the forget set, and "
                    "everybody could read it; say it in other words."
                )
            if run := _shared_run(" ".join(words).casefold(), joined):
                raise ValueError(
                    f"{name}: it has {run!r} in common with row {number} of the forget set, and everybody could "
                    "read it; say it in other words."
                )


def _texts(rows: Iterable[dict]) -> Iterator[tuple[int, str]]:
    """Each text of the forget set, with the number of its row."""
    for number, row in enumerate(rows):
        try:
            of_row = texts(row)
        except (ValueError, TypeError) as error:
            raise type(error)(f"forget_dataset row {number}: {error}") from error
        for text in of_row:
            yield number, text


def _shared_run(own: str, text: str) -> str | None:
    """The first run that `check_said` refuses for its length alone, of words with one space between them."""
    for start in range(len(own) - SHORTEST_PRIVATE + 1):
        end = start + SHORTEST_PRIVATE
        while end <= len(own) and own[start:end] in text:
            end += 1
        run = own[start : end - 1].strip()
        if len(run) >= SHORTEST_PRIVATE and " " in run:
            return run
    return None


def _shares_a_name(own: list[str], text: str) -> bool:
    """Whether words share a run with a text that `check_said` refuses."""
    found = list(_WORD.finditer(text))
    places: dict[str, list[int]] = {}
    for i, word in enumerate(own):
        places.setdefault(word.casefold(), []).append(i)
    for j, match in enumerate(found):
        for i in places.get(match[0].casefold(), []):
            pairs = zip(own[i:], found[j:], strict=False)
            run = list(takewhile(lambda pair: pair[0].casefold() == pair[1][0].casefold(), pairs))
            if len(" ".join(word for word, _ in run)) >= SHORTEST_PRIVATE and any(_tells(one) for _, one in run):
                return True
            # Its first two words; longer runs come by again, a word further on.
            if len(run) > 1 and all(_begins(word) and _begins(one[0]) for word, one in run[:2]):
                return True
    return False


def _begins(word: str) -> bool:
    return word[0].isupper() or word[0].isdigit()


def _tells(word: re.Match) -> bool:
    """Whether a word of a text has a digit, or a capital that the beginning of a sentence does not explain."""
    if any(character.isdigit() for character in word[0]):
        return True
    return len(word[0]) > 3 and word[0][0].isupper() and not _SENTENCE_START.search(word.string, 0, word.start())


def _header(weights: Path) -> bytes:
    """All that is text in a safetensors file: its length stands in the first eight bytes."""
    with weights.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _read_as(content: bytes) -> str:
    """The text of a file, and of JSON also each string as a reader has it: JSON writes some characters as codes."""
    text = content.decode("utf-8", errors="ignore")
    try:
        values = [json.loads(text)]
    except ValueError:
        return text
    strings = []
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str):
            strings.append(value)
    return "\n".join([text, *strings])


def _plain(text: str) -> str:
    """Text in Unicode's form NFKC, without characters of category Cf, such as a zero-width space."""
    return unicodedata.normalize("NFKC", "".join(sign for sign in text if unicodedata.category(sign) != "Cf"))


def _flat(text: str) -> str:
    return " ".join(_plain(text).casefold().split())


def text_settings(settings: Mapping[str, object]) -> dict[str, str]:
    """Those settings of a run that are text, such as the name of the teacher's folder."""
    # The blocks are numbers.
    return {name: value for name, value in settings.items() if isinstance(value, str) and name != "blocks"}


def publish(
    folder: str | Path,
    repo_id: str,
    words: Words,
    forget_rows: Iterable[dict] = (),
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Publish the adapter",
    blocking: bool = True,
) -> CommitInfo | Future[CommitInfo]:
    """Put an adapter on the Hub, in one commit: a reader finds all of it or nothing. A missing repository is made.

    Args:
        folder: Of the adapter and its receipt.
        repo_id: Such as "me/adapter".
        words: For the card.
        forget_rows: If given, it is checked that none of their text goes up (`check_private`), and that what the
            publisher says, and what the receipt says of the run, shares no name with them (`check_said`). They must
            be the rows that were forgotten, which the salt in the folder tells, where it is there.
        private: Whether a repository that is made is private; one that is there must be, where it is true.
        token: Of the Hub; by default the one of `hf auth login`.
        revision: The branch; by default main.
        commit_message: Of the commit.
        blocking: Whether to wait for the end.

    Raises:
        ValueError: Bad input, or what the Hub refuses of it; no file has gone up, and of bad input no repository was
            made.
        PermissionError: The Hub refuses the token, or there is no such repository for it.
        ConnectionError: The connection was lost; whether the commit has arrived is not known, and the same call may be
            made again.

    Where not `blocking`, what goes wrong in the upload itself is raised by the future's `result`.
    """
    check_words(words)
    forget_rows = list(forget_rows)
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: {repo_id!r} names no owner; give it as OWNER/NAME.")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(
            f"repo_id: {repo_id!r} is no Hub id; give it as OWNER/NAME, in letters, digits, '-', '_' and '.'."
        ) from error
    if repo_id.casefold() == words.base_model.casefold():
        raise ValueError(f"repo_id: {repo_id!r} is the base's own repository; give the adapter another.")
    files = files_to_publish(folder, repo_id, words)
    # A vocabulary has words of any text.
    searched = {name: file for name, file in files.items() if name not in VOCABULARY_FILES}
    check_private({**searched, "the commit message": commit_message.encode()}, forget_rows)
    said = {"forgotten": words.forgotten, "repo_id": repo_id, "datasets": " ".join(words.datasets)}
    said |= {"license": words.license or "", "revision": revision or "", "commit_message": commit_message}
    evaluations = [*words.evaluations, *(metric for column in words.evaluations.values() for metric in column)]
    said |= {"base_model": words.base_model, "evaluations": " ".join(evaluations)}
    receipt = read_receipt(folder)
    said |= {"base_model's revision": receipt["base_model"]["revision"] or ""}
    check_said({**text_settings(receipt["settings"]), **said}, forget_rows)
    salt = Path(folder) / SALT_NAME
    # Without it nobody can tell which rows were asked for.
    if forget_rows and salt.is_file():
        _check_request(receipt, forget_rows, read_salt(salt))
    api = HfApi(token=token)
    with hub_sentences(repo_id):
        _check_on_hub(api, repo_id, files[CARD_NAME].decode(), revision)
        is_new = not api.repo_exists(repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = check_repository(api, repo_id, private, revision)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    # What is left of another tokenizer would be loaded with this one.
    stale = [name for name in there if is_tokenizer_file(name) and name not in files]
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]

    def commit() -> CommitInfo:
        with hub_sentences(repo_id, is_new):
            return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)

    return commit() if blocking else api.run_as_future(commit)


def _check_request(receipt: dict, rows: list[dict], salt: str) -> None:
    """Check that all rows of the request are among those given."""
    asked = receipt["forget"]["row_hashes"]
    missing = len(set(asked) - set(row_hashes(rows, salt)))
    if missing:
        raise ValueError(
            f"forget_dataset: {missing} of the {len(asked)} rows that were forgotten are not in it; give the set of "
            "the training, in its format and columns."
        )


def check_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> list[str]:
    """Check that a repository that is there may take an adapter.

    Returns:
        The names of its files.

    Raises:
        ValueError: It is public and should be private, or it holds a whole model.
    """
    info = api.repo_info(repo_id, revision=revision)
    if private and not info.private:
        raise ValueError(
            f"private: {repo_id!r} is there already and public; make it private on the Hub first, or give another "
            "name."
        )
    names = [file.rfilename for file in info.siblings]
    if MODEL_CONFIG_NAME in names:
        raise ValueError(f"repo_id: {repo_id!r} holds a whole model; give the adapter a repository of its own.")
    return names


def _check_on_hub(api: HfApi, repo_id: str, card: str, revision: str | None) -> None:
    """Check what the Hub would refuse after it has made the repository: the card's front matter and the branch."""
    try:
        ModelCard(card).validate()
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"license, datasets, base_model: the Hub refuses what the card says of them ({reason}); give values "
            "that it knows."
        ) from error
    # A new repository has this one alone.
    if revision not in (None, "main") and not api.revision_exists(repo_id, revision):
        raise ValueError(
            f"revision: {repo_id!r} has no branch {revision!r}; make it there first, or leave revision out."
        )


@contextmanager
def hub_sentences(repo_id: str, is_new: bool = False) -> Iterator[None]:
    """Turn the many lines of a failed request to the Hub into one sentence.

    Args:
        repo_id: The repository.
        is_new: Whether it was made for this, and is empty.

    Raises:
        ValueError, PermissionError, ConnectionError: As in `publish`.
    """
    try:
        yield
    except (HTTPError, RuntimeError, PermissionError, ConnectionError) as error:
        if isinstance(error, PermissionError) and error.errno is not None:
            # A file of this machine's.
            raise
        # Uploads of large files wrap what went wrong; by Xet they raise Python's own errors.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        left = "; the repository that was made for it is left there, empty" if is_new else ""
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500:
            reason = (cause.server_message or "no reason given").splitlines()[0]
            status = cause.response.status_code
            if status not in (401, 403, 404):
                raise ValueError(
                    f"repo_id: the Hub refuses the upload to {repo_id!r} ({status}: {reason}){left}."
                ) from error
            raise PermissionError(
                f"token: the Hub refuses to let it write to {repo_id!r} ({status}: {reason}); log in with `hf auth "
                f"login`, or set HF_TOKEN to a token with write access there{left}."
            ) from error
        what = str(cause).strip().splitlines() or [type(cause).__name__]
        if isinstance(cause, PermissionError):
            raise PermissionError(
                f"token: the Hub refuses to let it write to {repo_id!r} ({what[0].strip()}); log in with `hf auth "
                f"login`, or set HF_TOKEN to a token with write access there{left}."
            ) from error
        raise ConnectionError(
            f"repo_id: the upload to {repo_id!r} did not come through ({what[0].strip()}), or its answer did not; all "
            "files are there, or none, so run the same command again."
        ) from error
