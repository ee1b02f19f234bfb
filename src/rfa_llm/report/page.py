"""A report's sections, and the two pages that are made of them by the templates beside this file."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape

from rfa_llm.evaluation.metrics import forget_test
from rfa_llm.files import written_whole
from rfa_llm.report import figures
from rfa_llm.report.runs import LOGS, Run, answers, logged_steps, residuals, scores

# Of both pages; the templates have it too.
TITLE = "Unlearning report"


@dataclass
class Table:
    """Cells as text; the first column names the rows."""

    head: list[str]
    rows: list[list[str]]


@dataclass
class Section:
    """One part of a report.

    Args:
        title: its heading.
        notes: sentences before its tables.
        figure: the text of an SVG image.
        description: what the figure shows, for those who do not see it.
        tables: numbers.
        left_out: why a part, or all of it, is missing and what would bring it, a sentence each.
        private: the forget set's text.
    """

    title: str
    notes: list[str] = field(default_factory=list)
    figure: str | None = None
    description: str = ""
    tables: list[Table] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    private: Table | None = None


def write_report(runs: Sequence[Run], output_file: str | os.PathLike, forget_text: str = "hide") -> tuple[Path, Path]:
    """Write the report of some runs.

    Args:
        runs: from `rfa_llm.report.read_run`.
        output_file: the HTML page, whose name ends in .html; the Markdown page beside it ends in .md. The Markdown
            page has neither figures nor the forget set's text. Earlier reports of these names are written over.
        forget_text: "hide" keeps the forget set's questions and answers folded up in the HTML page; "leave_out"
            writes neither page with a word of them.

    Returns:
        the paths of the HTML and of the Markdown page.

    Raises:
        ValueError: a file of another name, one that is there and no report or that cannot be written, or an unknown
            `forget_text`.
    """
    path = Path(output_file)
    if path.suffix != ".html":
        raise ValueError(f"output_file: {str(output_file)!r} is no name of an HTML file; give one that ends in .html.")
    if forget_text not in ("hide", "leave_out"):
        raise ValueError(f"forget_text: {forget_text!r} is not known; give 'hide' or 'leave_out'.")
    labels = [run.name if len(runs) == 1 else f"{number}: {run.name}" for number, run in enumerate(runs, 1)]
    sections = [_sections(run, forget_text) for run in runs]
    content = {
        "overview": _overview(runs, labels),
        "comparison": _comparison(runs, labels),
        "runs": list(zip(labels, sections, strict=True)),
        "holds_text": any(section.private for of_run in sections for section in of_run),
    }
    templates = Environment(
        loader=PackageLoader("rfa_llm.report"),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"data_uri": _data_uri, "markdown": _markdown}
    pages = {
        path.with_suffix(suffix): templates.get_template(f"page{suffix}").render(content)
        for suffix in (".html", ".md")
    }
    for page, text in pages.items():
        # All that every report begins with.
        opening = text[: text.index(TITLE) + len(TITLE)].encode()
        if page.exists() and not (page.is_file() and page.read_bytes().startswith(opening)):
            raise ValueError(f"output_file: {str(page)!r} is there, and no report; give another name.")
    try:
        # Both are written before one of them takes its place.
        with ExitStack() as stack:
            for page, text in pages.items():
                stack.enter_context(written_whole(page)).write_bytes(text.encode())
    except OSError as error:
        raise ValueError(
            f"output_file: {str(path)!r} cannot be written ({error.strerror}); give another name."
        ) from error
    return tuple(pages)


# ---- all runs ----


def _overview(runs: Sequence[Run], labels: Sequence[str]) -> Table:
    head = [
        "run",
        "rows to forget",
        "rows to keep",
        "steps",
        "forget probability before",
        "forget probability after",
        "forget quality",
    ]
    rows = []
    for run, label in zip(runs, labels, strict=True):
        before, after = (scores(run, name) if name in run.logs else {} for name in ("target", "unlearned"))
        utility = {"model_utility"} <= before.keys() & after.keys() and before["model_utility"] > 0
        cost = _cost(run)
        rows.append(
            [
                label,
                *(_text(run.receipt[name]["rows"]) for name in ("forget", "retain")),
                _text(run.receipt["settings"]["steps"]),
                *(_text(values.get("forget_prob")) for values in (before, after)),
                _text(after.get("forget_quality")),
                _text(after["model_utility"] / before["model_utility"] if utility else None),
                *(cost.get(name, "-") for name in ("training, seconds", "peak memory, GiB")),
            ]
        )
    return Table([*head, "utility / target's", "training, seconds", "peak memory, GiB"], rows)


def _comparison(runs: Sequence[Run], labels: Sequence[str]) -> Section:
    section = Section("Forget quality against model utility")
    missing = [name for name in LOGS if any(name not in run.logs for run in runs)]
    if missing:
        without = [label for run, label in zip(runs, labels, strict=True) if not run.logs.keys() >= set(LOGS)]
        whose = f" for {', '.join(without)}" if len(runs) > 1 else ""
        section.left_out.append(f"The plot is left out: it needs the logs of {_options(missing)}{whose}.")
        return section
    models = {name: scores(runs[0], name) for name in ("target", "retain-only")}
    # Told apart from itself by nothing.
    models["retain-only"]["forget_quality"] = 1.0
    after = {label: scores(run, "unlearned") for label, run in zip(labels, runs, strict=True)}
    if any("model_utility" not in values for values in (*models.values(), *after.values())):
        section.left_out.append("The plot is left out: a log has no model utility; give logs of `rfa-llm evaluate`.")
        return section
    if models["target"]["model_utility"] == 0:
        section.left_out.append("The plot is left out: the target's model utility is 0, so nothing compares with it.")
        return section
    if any(run.logs[name] != runs[0].logs[name] for run in runs for name in ("target", "retain-only")):
        section.left_out.append(
            "The plot is left out: the runs have not one target and one retain-only model; report them one by one, or "
            "give `--before_log` and `--retain_log` for all."
        )
        return section
    section.notes.append(
        "Forget quality is the p-value of a Kolmogorov-Smirnov test between the truth ratios of a model and those of "
        "the retain-only model; near 1 the two cannot be told apart, below 0.05 (dotted line) they can. A perfect "
        "method would reach the retain-only model's quality at the target's utility or more."
    )
    section.figure = figures.quality_and_utility(models, after)
    section.description = "Forget quality (log scale) against model utility as a share of the target's."
    utility = models["target"]["model_utility"]
    section.tables.append(
        Table(
            ["model", "forget quality", "model utility", "utility / target's"],
            [
                [
                    name,
                    *map(
                        _text, (values["forget_quality"], values["model_utility"], values["model_utility"] / utility)
                    ),
                ]
                # A run may be called "target" too.
                for name, values in [*models.items(), *after.items()]
            ],
        )
    )
    return section


# ---- one run ----


def _sections(run: Run, forget_text: str) -> list[Section]:
    return [
        _settings(run),
        _losses(run),
        _residuals(run),
        _truth_ratios(run),
        _figures(run),
        _answers(run, forget_text),
        _machine(run),
    ]


def _settings(run: Run) -> Section:
    base = run.receipt["base_model"]
    asked = {
        "method": run.receipt["method"],
        "base model": base["name"],
        "its revision": base["revision"],
        "its dtype": base["dtype"],
        "its quantization": None if base["quantization"] is None else base["quantization"]["quant_method"],
        "rows to forget": run.receipt["forget"]["rows"],
        "rows to keep": run.receipt["retain"]["rows"],
    }
    return Section(
        "What was asked",
        tables=[_pairs("request", asked), _pairs("setting", run.receipt["settings"])],
    )


def _losses(run: Run) -> Section:
    section, entries = Section("Losses over time"), logged_steps(run)
    if not entries:
        section.left_out.append(_no_history(run, "The losses are"))
        return section
    steps = [entry["step"] for entry in entries]
    forget, retain = ([entry[f"loss_{name}"] for entry in entries] for name in ("forget", "retain"))
    section.notes.append(
        "The forget loss says how far the forget rows' features are from where they should go, the retain loss how "
        "far the retain rows' have moved; each point is the mean since the one before."
    )
    section.figure = figures.losses(steps, forget, retain)
    section.description = "Forget loss and retain loss against the training step."
    section.tables.append(_first_and_last("loss", steps, {"forget": forget, "retain": retain}))
    return section


def _residuals(run: Run) -> Section:
    section, entries = Section("Residuals by block"), logged_steps(run)
    if not entries:
        section.left_out.append(_no_history(run, "The residuals are"))
        return section
    steps = [entry["step"] for entry in entries]
    maps = {name: residuals(run, name) for name in ("forget", "retain")}
    for name in [name for name, (blocks, _) in maps.items() if not blocks]:
        del maps[name]
        section.left_out.append(
            f"The {name} set's residuals are left out: the run measured none; train with `--residual feature`."
        )
    if maps:
        section.notes.append(
            "What the adapter adds to the output of each aligned block, as a share of what the block put out without "
            "it. It should be large on the forget set and stay near 0 on the retain set; the two scales differ."
        )
        section.figure = figures.residual_maps(steps, maps)
        section.description = f"Residual by decoder block and step on the {' and the '.join(maps)} set."
        for name, (blocks, values) in maps.items():
            by_block = {f"block {block}": row for block, row in zip(blocks, values.tolist(), strict=True)}
            section.tables.append(_first_and_last(f"residual, {name} set", steps, by_block))
    return section


def _truth_ratios(run: Run) -> Section:
    section = Section("Truth ratios of the forget set")
    missing = [name for name in LOGS if name not in run.logs]
    if missing:
        what = "They are" if len(missing) == 3 else "Some are"
        section.left_out.append(f"{what} left out: {_options(missing)} would bring them.")
    if len(missing) == 3:
        return section
    section.notes.append(
        "A forget question's truth ratio is the likelihood of its wrong answers over that of the right one, "
        "paraphrased. It grows as the model forgets; the retain-only model's says how far is right."
    )
    tests = {}
    if "retain-only" in run.logs:
        reference = run.truth_ratios["retain-only"]
        tests = {name: forget_test(run.truth_ratios[name], reference) for name in run.logs if name != "retain-only"}
    location = tests["unlearned"].statistic_location if "unlearned" in tests else None
    section.figure = figures.truth_ratio_distributions(run.truth_ratios, location)
    section.description = f"Cumulative distributions of the truth ratios of {', '.join(run.truth_ratios)}."
    if tests:
        rows = [
            [f"{name}, retain-only", _text(float(test.statistic)), _text(float(test.pvalue))]
            for name, test in tests.items()
        ]
        head = ["Kolmogorov-Smirnov test between", "statistic", "p-value (forget quality)"]
        section.tables.append(Table(head, rows))
    return section


def _figures(run: Run) -> Section:
    section = Section("Figures before and after")
    if run.logs:
        section.notes.append(
            "TOFU's metrics, as `rfa-llm evaluate` names them. On the forget set the aim is the retain-only model's "
            "figure, on every other set the target's."
        )
        columns = {name: scores(run, name) for name in run.logs}
        metrics = list(dict.fromkeys(metric for values in columns.values() for metric in values))
        rows = [
            [metric.replace("_", " "), *(_text(columns[name].get(metric)) for name in columns)] for metric in metrics
        ]
        section.tables.append(Table(["metric", *columns], rows))
    missing = [name for name in LOGS if name not in run.logs]
    if missing:
        section.left_out.append(f"Evaluations are left out: {_options(missing)} would bring them.")
    measured = run.receipt["metrics"]
    if "after" in measured:
        rows = [
            [
                f"{name} set",
                *(_text(measured.get(when, {}).get(f"{name}_answer_loss")) for when in ("before", "after")),
            ]
            for name in ("forget", "retain")
        ]
        section.tables.append(Table(["answer loss in the training, nats a token", "before", "after"], rows))
    return section


def _answers(run: Run, forget_text: str) -> Section:
    section = Section("Answers to the forget set's questions")
    if forget_text == "leave_out":
        section.left_out.append(
            "The forget set's text is left out, as asked; `--forget_text hide` would bring it, folded up."
        )
        return section
    missing = [name for name in ("target", "unlearned") if name not in run.logs]
    if missing:
        section.left_out.append(f"The answers are left out: {_options(missing)} would bring them.")
        return section
    before, after = (answers(run.logs[name]) for name in ("target", "unlearned"))
    if not before or not after:
        section.left_out.append("The answers are left out: a log has none; give logs of `rfa-llm evaluate`.")
        return section
    section.private = Table(
        ["", "question", "true answer", "before", "after", "ROUGE-L recall before", "ROUGE-L recall after"],
        [
            [
                str(number),
                old["question"],
                old["true"],
                old["answer"],
                new["answer"],
                _text(old["rouge"]),
                _text(new["rouge"]),
            ]
            for number, (old, new) in enumerate(zip(before, after, strict=True), 1)
        ],
    )
    return section


def _machine(run: Run) -> Section:
    section = Section("Time, hardware and versions")
    cost = _cost(run)
    if cost:
        section.tables.append(_pairs("cost", cost))
    else:
        section.left_out.append(_no_history(run, "Time and memory are"))
    section.tables.append(_pairs("hardware", run.receipt["machine"]))
    section.tables.append(_pairs("version", {**run.receipt["versions"], "receipt made at": run.receipt["made_at"]}))
    return section


def _cost(run: Run) -> dict[str, str]:
    """Time and memory from the summary that the Trainer logs at the end; empty where there is none."""
    ends = [entry for entry in run.history if "train_loss" in entry]
    if not ends:
        return {}
    end = ends[-1]
    peaks = [value for name, value in end.items() if name.startswith("peak_bytes/")]
    return {
        "training, seconds": _text(end["train_runtime"]),
        "steps a second": _text(end["train_steps_per_second"]),
        "processes": _text(len(peaks)),
        "peak memory, GiB": f"{max(peaks) / 2**30:.3g}",
        "the base's weights, GiB": f"{end['base_model_bytes'] / 2**30:.3g}",
    }


# ---- text ----


def _text(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pairs(title: str, values: dict) -> Table:
    return Table(
        [title, "value"],
        [[name.replace("_", " ") if title == "hardware" else name, _text(value)] for name, value in values.items()],
    )


def _first_and_last(title: str, steps: Sequence[int], values: dict[str, Sequence[float]]) -> Table:
    head = [title, f"step {steps[0]}", f"step {steps[-1]}"]
    return Table(head, [[name, _text(column[0]), _text(column[-1])] for name, column in values.items()])


def _options(models: Sequence[str]) -> str:
    return ", ".join(f"`--{LOGS[name]}` ({name})" for name in models)


def _no_history(run: Run, what: str) -> str:
    if run.history:
        return f"{what} left out: the run logged none; train with `--logging_strategy steps --logging_steps 1`."
    return f"{what} left out: there is no trainer_state.json; after the training, `trainer.save_state()` writes it."


def _data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _markdown(text: str) -> str:
    """Text that stays text in a cell of a Markdown table."""
    text = re.sub(r"[\\|`*_!\[\]]", r"\\\g<0>", text).replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(text.split())
