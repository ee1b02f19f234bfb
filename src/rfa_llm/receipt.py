"""The receipt of a run: what was asked, of which weights, and what came of it, without a word of the sets.

    forget_receipt.json   beside the adapter; may be published
    _forget_salt.txt      beside it too; private: whoever has it can test guesses against the hashes of the rows

With the salt and a row one can prove that the row was in the request. Without the salt its hash says nothing, not even
to somebody who guesses the row: it is HMAC-SHA256 (RFC 2104) under a key of 256 random bits.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import platform
import secrets
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE

from rfa_llm.checkpoints import KEPT, ORDER, own_settings
from rfa_llm.data.formats import content
from rfa_llm.evaluation.scores import encoded_answer_scores
from rfa_llm.files import written_whole
from rfa_llm.unlearning_config import UnlearningConfig

RECEIPT_NAME = "forget_receipt.json"
# transformers' own `push_to_hub` leaves out names that begin with an underscore, as ours does.
SALT_NAME = "_forget_salt.txt"
FORMAT = 2
PACKAGES = ("rfa-llm", "torch", "transformers", "peft", "accelerate", "datasets", "trl")
# Inherited settings that say how much was trained.
LENGTH = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
# What is read of a receipt and of an adapter's configuration, as `misfits` takes it.
RECEIPT_KIND = {
    "made_at": str,
    "versions": dict,
    "machine": dict,
    "base_model": {
        "name": str,
        "revision": (str, None),
        "dtype": str,
        "quantization": ({"quant_method": str}, None),
        "weights": str,
        "config": str,
    },
    "adapter": {"weights": str, "config": str},
    "tokenizer": {"*": str},
    "method": str,
    "settings": {"steps": int, "new_adapter": bool, "max_length": (int, None)},
    "forget": {"rows": int, "row_hashes": [str]},
    "retain": {"rows": int, "hash": str},
    "metrics": {"before?": {"*": Real}, "after?": {"*": Real}, "evaluation?": {"*": {"*": Real}}},
    "card": str,
}
ADAPTER_KIND = {"base_model_name_or_path": (str, None), "revision": (str, None)}
# The name of a base that was handed over as an object, and of which nobody knows where it lies.
IN_MEMORY = "in memory"
# Files with the words and pieces of words that a tokenizer knows.
VOCABULARY_FILES = (
    FULL_TOKENIZER_FILE,
    ADDED_TOKENS_FILE,
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "emoji.json",
)
# What a tokenizer's `save_pretrained` writes, each where there is something to write; beside them it has a folder for
# further chat templates.
TOKENIZER_FILES = (*VOCABULARY_FILES, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_MAP_FILE, CHAT_TEMPLATE_FILE)
# Rows of each set that the receipt's figures are taken over.
FIGURE_ROWS = 64


def versions(*more: str) -> dict[str, str]:
    """Versions of the packages that a result depends on, and of `more`."""
    return {package: version(package) for package in (*PACKAGES, *more)}


def machine() -> dict:
    """What a run computes on; no name or path that tells which machine it is."""
    # Linux alone has this file.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def public_name(name: str) -> str:
    """A model's id as it is; of a folder only its own name, for the path would tell of the machine."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


def read_json(path: Path) -> tuple[object, bytes]:
    """What is in a JSON file, and its bytes.

    Raises:
        ValueError: It is no JSON, or an object in it has a key twice: JSON keeps the second, and a reader sees the
            first.
    """

    def once(pairs: list[tuple[str, object]]) -> dict:
        names = [name for name, _ in pairs]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"it has the key {twice[0]!r} twice")
        return dict(pairs)

    content = path.read_bytes()
    try:
        return json.loads(content.decode(), object_pairs_hook=once), content
    except RecursionError as error:
        raise ValueError("it is nested without end") from error


def misfits(value: object, kind: type | tuple | list | dict, path: str = "") -> Iterator[str]:
    """What of a value from JSON is missing, or of another type than it is read as.

    Args:
        value: From `read_json`.
        kind: A type; `(kind, None)` where null may stand too; `[kind]` for a list; a dict for an object's keys, where
            "?" ends the name of a key that may be missing and "*" stands for each key.
        path: Where the value stands, such as "forget.rows".

    Yields:
        A few words for each.
    """
    if isinstance(kind, tuple):
        if value is None:
            return
        kind = kind[0]
    if not isinstance(value, kind if isinstance(kind, type) else type(kind)):
        yield f"{path or 'all of it'} is {value!r:.60}"
    elif isinstance(kind, list):
        for one in value:
            yield from misfits(one, kind[0], path)
    elif isinstance(kind, dict):
        for key, inner in kind.items():
            for name in value if key == "*" else [key.removesuffix("?")]:
                where = f"{path}.{name}".lstrip(".")
                if name in value:
                    yield from misfits(value[name], inner, where)
                elif not key.endswith("?"):
                    yield f"{where} is missing"


# ---- the sets ----


def new_salt() -> str:
    """64 hexadecimal digits, from the system's source of secrets."""
    return secrets.token_hex(32)


def read_salt(path: str | os.PathLike) -> str:
    """The salt in a file.

    Raises:
        ValueError: There is no such file, or no salt in it.
    """
    salt = Path(path).read_text(encoding="ascii", errors="replace").strip() if Path(path).is_file() else ""
    if len(salt) != 64 or set(salt) - set("0123456789abcdef"):
        raise ValueError(f"salt: {str(path)!r} is no file with 64 hexadecimal digits; give the run's {SALT_NAME}.")
    return salt


def row_hash(row: dict, salt: str) -> str:
    """HMAC-SHA256 of a row's content (`rfa_llm.data.formats.content`) as JSON with sorted keys, 64 digits."""
    text = json.dumps(content(row), sort_keys=True, ensure_ascii=False)
    return hmac.new(bytes.fromhex(salt), text.encode(), hashlib.sha256).hexdigest()


def row_hashes(rows: Iterable[dict], salt: str) -> list[str]:
    """`row_hash` of each row, sorted, so that the order of a set's rows does not count."""
    return sorted(row_hash(row, salt) for row in rows)


def set_hash(rows: Iterable[dict], salt: str) -> str:
    """SHA-256 over the `row_hashes` of a set, a line each."""
    return hashlib.sha256("\n".join(row_hashes(rows, salt)).encode()).hexdigest()


def figure_rows(rows: Dataset, encoded: Dataset, salt: str) -> list[dict]:
    """At most `FIGURE_ROWS` rows of an encoded set: those with the lowest hashes, whatever the order of the set."""
    lowest = sorted(range(len(rows)), key=lambda index: row_hash(rows[index], salt))[:FIGURE_ROWS]
    return [encoded[index] for index in lowest]


# ---- the adapter and the figures ----


def read_adapter_config(folder: str | os.PathLike) -> dict:
    """What is in an adapter's `adapter_config.json`.

    Raises:
        ValueError: There is none, or it is no JSON, has a key twice, or does not say where its base is.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"folder: {str(folder)!r} has no {CONFIG_NAME}; give the folder that `rfa-llm unlearn` wrote."
        )
    try:
        config, _ = read_json(path)
        wrong = next(misfits(config, ADAPTER_KIND), None)
    except ValueError as error:
        wrong = error
    if wrong is not None:
        raise ValueError(f"folder: {path} is no adapter's configuration ({wrong}); give the file as it was written.")
    return config


def base_of(config: dict) -> dict[str, str | None]:
    """What an adapter's configuration calls its base: "name" (a Hub id, a folder's own name or `IN_MEMORY`) and
    "revision"."""
    return {
        "name": public_name(config.get("base_model_name_or_path") or IN_MEMORY),
        "revision": config.get("revision"),
    }


def adapter_digests(folder: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of an adapter's weights file, and of its configuration but for what says where its base lies.

    Raises:
        ValueError: The folder holds no adapter in safetensors.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"folder: {str(folder)!r} has no {path.name}; give the folder that `rfa-llm unlearn` wrote.")
    with path.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256")
    place = ("base_model_name_or_path", "revision")
    config = {name: value for name, value in read_adapter_config(folder).items() if name not in place}
    text = json.dumps(config, sort_keys=True)
    return {"weights": weights.hexdigest(), "config": hashlib.sha256(text.encode()).hexdigest()}


def is_tokenizer_file(name: str) -> bool:
    """Whether a file beside an adapter, named as in its folder, is its tokenizer's."""
    return name in TOKENIZER_FILES or (name.startswith(f"{CHAT_TEMPLATE_DIR}/") and name.endswith(".jinja"))


def tokenizer_digests(folder: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of each file of a tokenizer that lies beside an adapter, by its name."""
    folder = Path(folder)
    paths = sorted(path for pattern in ("*", f"{CHAT_TEMPLATE_DIR}/*") for path in folder.glob(pattern))
    names = {path: path.relative_to(folder).as_posix() for path in paths if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for path, name in names.items() if is_tokenizer_file(name)
    }


def answer_figures(model: PreTrainedModel, sets: dict[str, list[dict]], batch_size: int) -> dict[str, float]:
    """What a model makes of the sets' answers.

    Args:
        model: With its adapter on or off.
        sets: Name -> rows from `figure_rows`.
        batch_size: Answers scored at a time.

    Returns:
        dict: `{name}_answer_loss`, the mean over the rows of the mean cross-entropy of the answer's tokens, in nats.
    """
    figures = {}
    for name, rows in sets.items():
        scores = encoded_answer_scores(model, rows, batch_size, f"{name}: losses")
        figures[f"{name}_answer_loss"] = fmean(score.loss for score in scores)
    return figures


# ---- the receipt ----


def make_receipt(
    args: UnlearningConfig,
    method: str,
    overrides: dict[str, str],
    model: PreTrainedModel,
    base_digest: str,
    config_digest: str,
    folder: str,
    training: dict[str, str | int | bool],
    rows: dict[str, Dataset],
    salt: str,
    figures: dict[str, dict[str, float]],
) -> dict:
    """What `forget_receipt.json` holds, but for the card (`with_card`).

    Args:
        args: The run's settings; the method's own, the seeds and what says how long it trained are kept.
        method: Its name.
        overrides: What stands for the setting of the same name, such as the blocks that were chosen.
        model: The base model.
        base_digest: From `rfa_llm.checkpoints.base_model_digest`.
        config_digest: From `rfa_llm.checkpoints.base_config_digest`, before the training.
        folder: With the adapter and the tokenizer, which have been saved.
        training: What the training was beside its settings: "mixed_precision", of the accelerator; "steps", of the
            last `train`, with those of the checkpoint that it went on from; "new_adapter", whether that began with an
            adapter as its trainer had made it.
        rows: "forget" and "retain", as they were given.
        salt: From `new_salt`.
        figures: "before" and "after", each from `answer_figures`; empty where they are not known.
    """
    values = args.to_dict()
    # The accelerator's precision need not be that of the arguments; what it took stands in `training`.
    names = [name for name in (*own_settings(args), *KEPT, *ORDER, *LENGTH) if name not in ("bf16", "fp16")]
    settings = {name: overrides.get(name, values[name]) for name in names}
    settings = {name: public_name(value) if isinstance(value, str) else value for name, value in settings.items()}
    quantization = model.config.to_dict().get("quantization_config")
    return sealed(
        {
            "format": FORMAT,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            # Of the first process.
            "machine": {**machine(), "device": args.device.type},
            "base_model": {
                **base_of(read_adapter_config(folder)),
                "dtype": str(model.dtype).removeprefix("torch."),
                "quantization": None if quantization is None else json.loads(json.dumps(quantization, default=str)),
                # Over every byte of the weights as they were loaded, not over a sample.
                "weights": base_digest,
                "config": config_digest,
            },
            "adapter": adapter_digests(folder),
            "tokenizer": tokenizer_digests(folder),
            "method": method,
            "settings": {**settings, "world_size": args.world_size, **training},
            "forget": {"rows": len(rows["forget"]), "row_hashes": row_hashes(rows["forget"], salt)},
            "retain": {"rows": len(rows["retain"]), "hash": set_hash(rows["retain"], salt)},
            "metrics": figures,
        }
    )


def sealed(receipt: dict) -> dict:
    """The receipt with its own SHA-256 last: over all else, as JSON with sorted keys."""
    bare = {name: value for name, value in receipt.items() if name != "sha256"}
    return {**bare, "sha256": hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()}


def with_card(receipt: dict, card: str) -> dict:
    """The receipt with the SHA-256 of the card that was made of it."""
    return sealed({**receipt, "card": hashlib.sha256(card.encode()).hexdigest()})


def as_text(receipt: dict) -> str:
    # As it is read by people, and searched for words of the forget set.
    return json.dumps(receipt, indent=2, ensure_ascii=False) + "\n"


def write_receipt(folder: str | os.PathLike, receipt: dict, salt: str) -> None:
    """Write the receipt, and its salt for the owner's eyes alone, each whole or not at all."""
    for name, text in ((SALT_NAME, f"{salt}\n"), (RECEIPT_NAME, as_text(receipt))):
        with written_whole(Path(folder) / name) as part:
            part.touch(mode=0o600 if name == SALT_NAME else 0o666)
            # As bytes, with the same line ends everywhere.
            part.write_bytes(text.encode())


def read_receipt(folder: str | os.PathLike) -> dict:
    """The receipt beside an adapter: what its own hash says, and byte for byte as `write_receipt` writes it.

    Raises:
        ValueError: There is none, it was changed after it had been written, or what is read of it is missing.
    """
    path = Path(folder) / RECEIPT_NAME
    if not path.is_file():
        raise ValueError(
            f"folder: {str(folder)!r} has no {RECEIPT_NAME}; give the folder that `rfa-llm unlearn` wrote, or what "
            "`hf download` brings of a published adapter."
        )
    try:
        receipt, content = read_json(path)
        intact = receipt["sha256"] == sealed(receipt)["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"folder: {path} is no receipt ({error!r}); give the file as it was written.") from error
    if not intact:
        raise ValueError(f"folder: {path} is not what its own hash says; give the file as it was written.")
    if content != as_text(receipt).encode():
        raise ValueError(f"folder: {path} is not laid out as a receipt is; give the file as it was written.")
    if receipt.get("format") != FORMAT:
        raise ValueError(
            f"folder: {path} is of format {receipt.get('format')}, and this rfa-llm reads format {FORMAT}; use the "
            "one that wrote it."
        )
    wrong = next(misfits(receipt, RECEIPT_KIND), None)
    if wrong is not None:
        raise ValueError(f"folder: {path} is no receipt ({wrong}); give the file as it was written.")
    return receipt
