"""`rfa-llm report RUN...`: what runs were asked, what they did and what it cost, as an HTML and a Markdown page."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from rfa_llm.cli.settings import read_settings


@dataclass
class ReportArguments:
    """Which runs, and the logs of their evaluations. A demo's folder has its logs."""

    runs: list[str] = field(
        default=None,
        metadata={"help": "Folders that `rfa-llm unlearn` or `rfa-llm demo` wrote; may come first. Required."},
    )
    output_file: str = field(
        default="report.html", metadata={"help": "The HTML page; the Markdown page beside it ends in .md."}
    )
    log: list[str] | None = field(
        default=None,
        metadata={"help": "Logs of `rfa-llm evaluate` with the adapters: one a run, in the order of the runs."},
    )
    before_log: str | None = field(default=None, metadata={"help": "Log of the base without an adapter."})
    retain_log: str | None = field(default=None, metadata={"help": "Log of a model that never saw the forget set."})
    forget_text: str = field(
        default="hide",
        metadata={
            "help": "The forget set's questions and answers: hide folds them up in the HTML page, leave_out writes "
            "the page without them.",
            "choices": ["hide", "leave_out"],
        },
    )


def report(args: ReportArguments) -> tuple[Path, Path]:
    """Write the pages and return their paths; see `rfa_llm.report.write_report`."""
    # Here, because help is to be had without the plotting library that the pages need.
    from rfa_llm.report import read_run, write_report

    if not args.runs:
        raise ValueError("runs: none is given; give the folders as `rfa-llm report RUN...`.")
    logs = args.log or [None] * len(args.runs)
    if len(logs) != len(args.runs):
        raise ValueError(
            f"log: {len(logs)} given for {len(args.runs)} runs; give one a run, in the order of the runs."
        )
    runs = [
        read_run(folder, log, args.before_log, args.retain_log) for folder, log in zip(args.runs, logs, strict=True)
    ]
    return write_report(runs, args.output_file, args.forget_text)


def main(argv: list[str]) -> None:
    folders = list(takewhile(lambda word: not word.startswith("-"), argv))
    named = ["--runs", *folders] if folders else []
    usage = "%(prog)s RUN... --output_file FILE.html [--config FILE.yaml] [--SETTING VALUE ...] [--debug]"
    (args,) = read_settings((ReportArguments,), "report", [*named, *argv[len(folders) :]], usage)
    html, markdown = report(args)
    print(f"The report is in {html}, and in {markdown} without figures and answers.")
