"""`rfa-llm verify FOLDER`: whether an adapter, its base, the request and the figures are what the receipt says."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from accelerate import PartialState
from datasets import Dataset
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rfa_llm.adapters import base_revision, on_its_base
from rfa_llm.card import has_figures_of
from rfa_llm.checkpoints import base_config_digest, base_model_digest
from rfa_llm.cli.settings import leading_words, read_settings
from rfa_llm.data.formats import check_tokenizer, load_rows, prepare
from rfa_llm.evaluation import read_log, summary
from rfa_llm.hub import CARD_NAME
from rfa_llm.receipt import (
    SALT_NAME,
    adapter_digests,
    answer_figures,
    base_of,
    figure_rows,
    read_adapter_config,
    read_receipt,
    read_salt,
    row_hash,
    set_hash,
    tokenizer_digests,
)

# Published evaluations -> the settings that bring their new logs.
LOGS = {"after": "log", "before": "before_log", "retain_only": "retain_log"}
# Figures that `tolerance` is a share of alone.
P_VALUES = {"forget_quality"}
# Checks of the rows that are given, which say nothing against the folder.
OF_SETS = {"rows in the request", "rows to keep", "retain set"}
# A check's name, whether it passed (`None` where nothing was measured), and what was found.
Check = tuple[str, bool | None, str]
# What transformers and peft raise where a file holds what they do not expect.
UNREADABLE = (TypeError, KeyError, AttributeError, RuntimeError, SafetensorError)


@dataclass
class VerifyArguments:
    """What is held against the receipt. The receipt and the adapter are in `folder`; the rest is given where it is."""

    folder: str = field(
        default=None,
        metadata={"help": "Folder of the adapter and its receipt, trained or downloaded; may come first. Required."},
    )
    forget: str | None = field(
        default=None,
        metadata={"help": "Rows that should be in the request: a .jsonl, .json, .csv or .parquet file, or a Hub id."},
    )
    forget_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    retain: str | None = field(default=None, metadata={"help": "The whole retain set, likewise."})
    retain_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the Hub datasets."})
    salt: str | None = field(
        default=None, metadata={"help": f"File with the run's salt. Default: {SALT_NAME} in the folder."}
    )
    log: str | None = field(
        default=None,
        metadata={"help": "New log of `rfa-llm evaluate` with the adapter, held against the published evaluation."},
    )
    before_log: str | None = field(default=None, metadata={"help": "New log of the base without the adapter."})
    retain_log: str | None = field(
        default=None, metadata={"help": "New log of a model that never saw the forget set."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base. Default: the one that the adapter names."}
    )
    tolerance: float = field(
        default=0.02,
        metadata={
            "help": "What a figure may be off, absolute or as a share of it, and forget_quality as a share alone: "
            "other machines round otherwise."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Answers scored at a time."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size} must be 1 or more.")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance: {self.tolerance} is not 0 or more.")


def verify(args: VerifyArguments) -> pd.DataFrame:
    """Hold what is given against the receipt; go on after a check that fails, as long as there is something to load.

    Args:
        args: `VerifyArguments(folder=...)` checks the hashes and the base; the sets add the request and the figures.

    Returns:
        One row a check, with `check` (str), `passed` (boolean) and `found` (str). Each published figure has a row;
        `passed` is `pandas.NA` where it was not measured, and `found` says why.

    Raises:
        ValueError: Bad input, or a receipt that was changed.
    """
    if args.folder is None:
        raise ValueError("folder: none is given; give it as `rfa-llm verify FOLDER`.")
    receipt = read_receipt(args.folder)
    # Why a set's losses, or an evaluation's figures, are not measured.
    why = {name: f"give the whole set as --{name}" for name in ("forget", "retain")}
    why |= {column: f"give a new log as --{name}" for column, name in LOGS.items()}

    def without_losses(reason: str) -> pd.DataFrame:
        return finished(receipt, checks, why | dict.fromkeys(("forget", "retain"), reason))

    checks = [("receipt", True, "its own hash is right"), *folder_checks(args.folder, receipt)]
    if "adapter's files" in failed_of(checks):
        return without_losses("the adapter cannot be read")
    # Before minutes of loading.
    sets, salt, of_sets = given_sets(args, receipt, why)
    checks += [*of_sets, *log_checks(args, receipt, why)]
    failed = failed_of(checks)
    if "adapter's configuration" in failed or ("base's name" in failed and args.model_name_or_path is None):
        # What would be loaded may be anything.
        return without_losses("the adapter's configuration is not the receipt's")
    try:
        model = load_base(args, receipt)
    except UNREADABLE as error:
        checks.append(("base's weights", False, f"{type(error).__name__}: {error}".splitlines()[0]))
        return without_losses("the base does not load")
    checks.append(same("base's weights", base_model_digest(model), receipt["base_model"]["weights"]))
    checks.append(same("base's configuration", base_config_digest(model.config), receipt["base_model"]["config"]))
    has_tokenizer = bool(tokenizer_digests(args.folder))
    if has_tokenizer and "tokenizer" in failed:
        # Figures of other token ids would say nothing.
        why |= dict.fromkeys(sets, "the tokenizer is not the receipt's")
        sets = {}
    if sets:
        tokenizer = load_tokenizer(args, model.name_or_path, beside=has_tokenizer)
        check_tokenizer(tokenizer)
        length = receipt["settings"]["max_length"]
        sets = {name: figure_rows(rows, prepare(rows, tokenizer, name, length), salt) for name, rows in sets.items()}
    for when in ("before", "after"):
        if when == "after":
            try:
                model = on_its_base(model, args.folder)
            except (ValueError, *UNREADABLE) as error:
                checks.append(("adapter on its base", False, f"{type(error).__name__}: {error}".splitlines()[0]))
                why |= dict.fromkeys(sets, "the adapter does not load on its base")
                break
            checks.append(("adapter on its base", True, "it loads"))
        figures = answer_figures(model, sets, args.batch_size)
        checks += compared(when, figures, receipt["metrics"].get(when, {}), args.tolerance)
    return finished(receipt, checks, why)


def same(name: str, found: str, expected: str) -> Check:
    return name, found == expected, found if found == expected else f"{found}, the receipt {expected}"


def said(base: dict[str, str | None]) -> str:
    """What `base_of` gives, in words."""
    return base["name"] if base["revision"] is None else f"{base['name']} at {base['revision']}"


def failed_of(checks: list[Check]) -> set[str]:
    return {name for name, passed, _ in checks if passed is False}


def folder_checks(folder: str, receipt: dict) -> list[Check]:
    """The card's, the adapter's and the tokenizer's files, and what the receipt says of itself; they end at an adapter
    that cannot be read."""
    card_file = Path(folder) / CARD_NAME
    card = card_file.read_bytes().decode(errors="replace") if card_file.is_file() else ""
    has_figures = has_figures_of(card, receipt)
    checks = [
        same("model card", hashlib.sha256(card.encode()).hexdigest(), receipt["card"]),
        ("model card's figures", has_figures, "the receipt's" if has_figures else "not the receipt's"),
    ]
    try:
        adapter = adapter_digests(folder)
    except ValueError as error:
        return [*checks, ("adapter's files", False, str(error))]
    checks.append(same("adapter's weights", adapter["weights"], receipt["adapter"]["weights"]))
    checks.append(same("adapter's configuration", adapter["config"], receipt["adapter"]["config"]))
    tokenizer_files = tokenizer_digests(folder)
    either = {*tokenizer_files, *receipt["tokenizer"]}
    changed = sorted(name for name in either if tokenizer_files.get(name) != receipt["tokenizer"].get(name))
    not_it = f"{', '.join(changed)}: not the receipt's"
    checks.append(("tokenizer", not changed, not_it if changed else f"{len(tokenizer_files)} files"))
    base = receipt["base_model"]
    named = base_of({"base_model_name_or_path": base["name"], "revision": base["revision"]})
    found = base_of(read_adapter_config(folder))
    if "/" not in named["name"]:
        # A folder's own name, of a path that need not be there any more.
        found["name"] = Path(found["name"]).name
    checks.append(same("base's name", said(found), said(named)))
    rows = receipt["forget"]
    checks.append(same("rows to forget", str(len(rows["row_hashes"])), str(rows["rows"])))
    wrong = wrong_figures(receipt)
    return [*checks, ("receipt's figures", not wrong, wrong or "those of a training and of its evaluations")]


def given_sets(
    args: VerifyArguments, receipt: dict, why: dict[str, str]
) -> tuple[dict[str, Dataset], str | None, list[Check]]:
    """The sets that are given and are the receipt's, whole; the run's salt, `None` without a set; the rows' checks.

    `why` gets what is wrong with a set that is given and not returned.
    """
    sets: dict[str, Dataset] = {}
    checks: list[Check] = []
    if args.forget is None and args.retain is None:
        return sets, None, checks
    salt = read_salt(args.salt or Path(args.folder) / SALT_NAME)
    if args.forget is not None:
        forget = load_rows(args.forget, "forget", args.forget_config, args.dataset_split)
        hashes = [row_hash(row, salt) for row in forget]
        given, asked = Counter(hashes), Counter(receipt["forget"]["row_hashes"])
        # A row that was asked once is proved once.
        known, number = (given & asked).total(), given.total()
        proved = f"{known} of the {number} given; the request has {asked.total()}"
        strange = next((index for index, one in enumerate(hashes) if one not in asked), None)
        if strange is not None:
            proved += f"; row {strange} (counted from 0) is another, or has other columns or another salt than there"
        checks.append(("rows in the request", known == number, proved))
        # The figures are of the whole set.
        if given == asked:
            sets["forget"] = forget
        else:
            why["forget"] = f"{known} of the request's {asked.total()} rows are given"
    if args.retain is not None:
        retain = load_rows(args.retain, "retain", args.retain_config, args.dataset_split)
        checks.append(same("rows to keep", str(len(retain)), str(receipt["retain"]["rows"])))
        checks.append(same("retain set", set_hash(retain, salt), receipt["retain"]["hash"]))
        if "retain set" in failed_of(checks):
            why["retain"] = "the rows given are not the retain set"
        else:
            sets["retain"] = retain
    return sets, salt, checks


def log_checks(args: VerifyArguments, receipt: dict, why: dict[str, str]) -> list[Check]:
    """The figures of the new logs; `why` gets what is wrong with a figure that they lack."""
    checks: list[Check] = []
    for (column, name), log in zip(LOGS.items(), (args.log, args.before_log, args.retain_log), strict=True):
        published = receipt["metrics"].get("evaluation", {}).get(column)
        if log is not None and published is None:
            raise ValueError(
                f"{name}: the receipt in {args.folder!r} has no evaluation to hold it against; leave it out."
            )
        if log is not None:
            checks += compared(f"evaluation {column}", summary(read_log(log, name)), published, args.tolerance)
            why[column] = "the new log has none"
    return checks


def wrong_figures(receipt: dict) -> str:
    """Which figures nobody writes, or which are missing that every training writes; empty where all is well."""
    metrics, evaluations = receipt["metrics"], receipt["metrics"].get("evaluation", {})
    losses = {f"{name}_answer_loss" for name in ("forget", "retain")}
    found = {when: set(metrics.get(when, {})) for when in ("before", "after")}
    strange = [*sorted(metrics.keys() - {"evaluation", *found}), *sorted(evaluations.keys() - LOGS)]
    strange += [f"{name}, {when}" for when, names in found.items() for name in sorted(names - losses)]
    if strange:
        return f"no training and no evaluation writes {strange}"
    steps = receipt["settings"]["steps"]
    missing = [f"{name}, {when}" for when, names in found.items() for name in sorted(losses - names)]
    return f"{steps} steps were trained, and {missing} are missing" if steps > 0 and missing else ""


def compared(what: str, figures: dict, published: dict, tolerance: float) -> list[Check]:
    """A check for each figure that was measured again; a line for one that the receipt does not have."""
    checks = []
    for name, found in figures.items():
        if name not in published:
            checks.append((f"{name}, {what}", None, f"{found:.4g}, and the receipt has none"))
            continue
        # Small p-values differ by their size: 0.019 is not 1e-12.
        absolute = 0.0 if name in P_VALUES else tolerance
        close = math.isclose(found, published[name], rel_tol=tolerance, abs_tol=absolute)
        checks.append((f"{name}, {what}", close, f"{found:.4g}, the receipt {published[name]:.4g}"))
    return checks


def finished(receipt: dict, checks: list[Check], why: dict[str, str]) -> pd.DataFrame:
    """The checks, and a line for each published figure that none of them is of, as `verify` returns them.

    Args:
        receipt: From `read_receipt`.
        checks: So far.
        why: A set, or an evaluation -> why its figures are not measured.
    """
    metrics, done = receipt["metrics"], {name for name, *_ in checks}
    figures = [
        (f"{name}_answer_loss, {when}", name)
        for when in ("before", "after")
        for name in ("forget", "retain")
        if f"{name}_answer_loss" in metrics.get(when, {})
    ]
    figures += [
        (f"{name}, evaluation {column}", column)
        for column in LOGS
        for name in metrics.get("evaluation", {}).get(column, {})
    ]
    lines = [(line, None, f"not measured: {why[of]}") for line, of in figures if line not in done]
    return pd.DataFrame([*checks, *lines], columns=["check", "passed", "found"]).astype({"passed": "boolean"})


def load_base(args: VerifyArguments, receipt: dict) -> PreTrainedModel:
    """The base as it was loaded for the training: in the same dtype, quantized in the same way."""
    base = receipt["base_model"]
    config = read_adapter_config(args.folder)
    name = args.model_name_or_path or config["base_model_name_or_path"]
    if not name:
        raise ValueError(
            "model_name_or_path: none is given, and the adapter's base was handed over in memory; give the id or path "
            "of the same weights."
        )
    device = PartialState(cpu=args.use_cpu).device
    revision = base_revision(config["revision"], config["base_model_name_or_path"], args.model_name_or_path)
    settings = {"dtype": base["dtype"], "device_map": {"": device}, **revision}
    # Checkpoints that are quantized themselves need no word.
    if base["quantization"] is not None and base["quantization"]["quant_method"] == "bitsandbytes":
        settings["quantization_config"] = BitsAndBytesConfig.from_dict(base["quantization"])
    try:
        return AutoModelForCausalLM.from_pretrained(name, **settings)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path: {name!r} cannot be loaded; pass the id or path of {base['name']!r}."
        ) from error


def load_tokenizer(args: VerifyArguments, base: str, beside: bool) -> PreTrainedTokenizerBase:
    """The run's tokenizer, beside its adapter; the base's where none lies there."""
    config = read_adapter_config(args.folder)
    revision = base_revision(config["revision"], config["base_model_name_or_path"], args.model_name_or_path)
    name, source, more = ("folder", args.folder, {}) if beside else ("model_name_or_path", base, revision)
    try:
        return AutoTokenizer.from_pretrained(source, **more)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: {source!r} has no tokenizer that can be loaded; put the run's beside the adapter, as it was "
            "saved there."
        ) from error


def main(argv: list[str]) -> None:
    usage = "%(prog)s FOLDER [--forget FILE] [--retain FILE] [--salt FILE] [--SETTING VALUE ...] [--debug]"
    (args,) = read_settings((VerifyArguments,), "verify", leading_words(argv, "folder"), usage)
    checks = verify(args)
    width = checks["check"].str.len().max()
    for check, passed, found in checks.itertuples(index=False):
        mark = "--" if pd.isna(passed) else "ok" if passed else "FAIL"
        print(f"{mark:<4}  {check:<{width}}  {found}")
    failed = checks.loc[~checks["passed"], "check"].tolist()
    if failed and set(failed) <= OF_SETS:
        raise ValueError(
            f"forget, retain: what is given is not what the receipt was made of: {', '.join(failed)}; give the "
            "training's own rows, and its salt."
        )
    if failed:
        raise ValueError(f"folder: {args.folder!r} is not what its receipt says: {', '.join(failed)}.")
