"""`rfa-llm publish FOLDER REPO_ID`: an adapter, its card and its receipt go to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitInfo

from rfa_llm.card import Words
from rfa_llm.cli.settings import leading_words, read_settings
from rfa_llm.data.formats import load_rows
from rfa_llm.evaluation import read_log, summary
from rfa_llm.hub import base_on_hub, publish
from rfa_llm.receipt import read_adapter_config, read_receipt


@dataclass
class PublishArguments:
    """What goes up, and what its card says."""

    folder: str = field(
        default=None, metadata={"help": "Folder that `rfa-llm unlearn` wrote; may come first. Required."}
    )
    repo_id: str = field(default=None, metadata={"help": "Where it goes, as OWNER/NAME; may come second. Required."})
    forgotten: str = field(
        default=None,
        metadata={
            "help": "What was forgotten, in your own words, without a row or a name of the forget set. Required."
        },
    )
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id of the base, where the adapter was trained on a folder. It must hold those weights."
        },
    )
    datasets: list[str] | None = field(default=None, metadata={"help": "Hub ids of datasets that the card names."})
    license: str | None = field(default=None, metadata={"help": "License of the adapter, such as apache-2.0."})
    log: str | None = field(
        default=None, metadata={"help": "Log of `rfa-llm evaluate` with the adapter; its summary goes on the card."}
    )
    before_log: str | None = field(default=None, metadata={"help": "Log of the base without the adapter."})
    retain_log: str | None = field(default=None, metadata={"help": "Log of a model that never saw the forget set."})
    forget_dataset: str | None = field(
        default=None,
        metadata={"help": "The forget set: it is checked that no text and no name of it goes up, and it stays here."},
    )
    forget_config: str | None = field(
        default=None, metadata={"help": "Configuration of the forget set's Hub dataset, such as forget10."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the Hub dataset."})
    private: bool | None = field(
        default=None, metadata={"help": "Make a new repository private; refuse one that is there and public."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch of the repository; by default main."})


def publish_adapter(args: PublishArguments) -> CommitInfo:
    """Publish the adapter, with the summaries of the logs on its card; see `rfa_llm.hub.publish`."""
    if args.folder is None or args.repo_id is None:
        raise ValueError("folder, repo_id: both are needed; give them as `rfa-llm publish FOLDER REPO_ID`.")
    receipt = read_receipt(args.folder)
    logs = {"before": ("before_log", args.before_log), "after": ("log", args.log)}
    logs["retain_only"] = ("retain_log", args.retain_log)
    own = read_adapter_config(args.folder)["base_model_name_or_path"]
    words = Words(
        forgotten=args.forgotten,
        base_model=base_on_hub(args.base_model, own, receipt["base_model"]["name"]),
        datasets=args.datasets or [],
        license=args.license,
        evaluations={model: summary(read_log(log, name)) for model, (name, log) in logs.items() if log is not None},
    )
    forget_rows = ()
    if args.forget_dataset is not None:
        forget_rows = load_rows(args.forget_dataset, "forget_dataset", args.forget_config, args.dataset_split)
    return publish(
        args.folder, args.repo_id, words, forget_rows=forget_rows, private=args.private, revision=args.revision
    )


def main(argv: list[str]) -> None:
    usage = "%(prog)s FOLDER REPO_ID --forgotten WORDS [--config FILE.yaml] [--SETTING VALUE ...] [--debug]"
    (args,) = read_settings((PublishArguments,), "publish", leading_words(argv, "folder", "repo_id"), usage)
    commit = publish_adapter(args)
    if args.forget_dataset is None:
        print("\nNothing was searched for text or names of the forget set; --forget_dataset would have had it done.")
    print(f"\n{args.repo_id} holds the adapter now: {commit.commit_url}")
    print(f"The salt of its receipt stays in {Path(args.folder)}; keep it private.")
