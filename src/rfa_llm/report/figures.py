"""The figures of a report, each as the text of an SVG image that needs no font and nothing from outside."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

try:
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
except ImportError as error:
    raise ImportError("a report needs matplotlib; install it with `pip install rfa-llm[report]`.") from error

from rfa_llm.benchmark.picture import trade_off

# Black, vermilion and blue of Okabe and Ito, told apart with every kind of colour vision; the lines differ too.
LINES = {
    "target": {"color": "#000000", "linestyle": ":"},
    "unlearned": {"color": "#d55e00", "linestyle": "-", "linewidth": 2.4},
    "retain-only": {"color": "#0072b2", "linestyle": "--"},
}
# Truth ratios beyond are drawn on these bounds.
RATIO_BOUNDS = (1e-3, 1e3)


def losses(steps: Sequence[int], forget: Sequence[float], retain: Sequence[float]) -> str:
    """The two losses against the step."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, values, name in zip(figure.subplots(1, 2), (forget, retain), ("forget", "retain"), strict=True):
        # A single point would make no line.
        axes.plot(steps, values, color="black", linewidth=1.2, marker="o" if len(steps) < 30 else None, markersize=4)
        axes.set_title(f"{name} loss")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (ratio of squared norms)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    return _svg(figure)


def residual_maps(steps: Sequence[int], maps: Mapping[str, tuple[Sequence[int], np.ndarray]]) -> str:
    """A heat map for each set: aligned blocks against steps.

    Args:
        steps: the logged steps.
        maps: set -> blocks and their values `[blocks, steps]` (`rfa_llm.report.runs.residuals`).
    """
    rows = max(len(blocks) for blocks, _ in maps.values())
    figure = Figure(figsize=(4.5 * len(maps), 2.3 + 0.07 * rows), layout="constrained")
    for axes, (name, (blocks, values)) in zip(
        figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True
    ):
        # What is logged at a step is the mean since the last log. One image: a path for each cell would be megabytes.
        mesh = axes.pcolormesh(
            [0, *steps], np.arange(len(blocks) + 1), values, cmap="cividis", rasterized=True, vmin=0
        )
        shown = range(0, len(blocks), -(-len(blocks) // 12))
        axes.set_yticks([place + 0.5 for place in shown], [str(blocks[place]) for place in shown])
        axes.set_title(f"{name} set")
        axes.set_xlabel("step")
        axes.set_ylabel("decoder block")
        figure.colorbar(mesh, ax=axes, label="residual (ratio of norms)")
    return _svg(figure)


def truth_ratio_distributions(ratios: Mapping[str, np.ndarray], location: float | None) -> str:
    """The empirical distribution of each model's truth ratios.

    Args:
        ratios: "target", "unlearned", "retain-only" -> raw truth ratios, each of shape (questions,).
        location: the ratio where unlearned and retain-only are furthest apart, to be marked.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    drawn = {name: np.sort(np.clip(values, *RATIO_BOUNDS)) for name, values in ratios.items()}
    for name, values in drawn.items():
        axes.ecdf(values, label=name, **LINES[name])
    if location is not None:
        place = float(np.clip(location, *RATIO_BOUNDS))
        shares = [np.searchsorted(drawn[name], place, side="right") / len(drawn[name]) for name in drawn]
        ends = [share for name, share in zip(drawn, shares, strict=True) if name != "target"]
        label = f"KS distance, {abs(ends[0] - ends[1]):.3f}"
        axes.plot([place, place], ends, color="grey", linewidth=4, solid_capstyle="butt", label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("truth ratio of a forget question (wrong answers over the right one; log scale)")
    axes.set_ylabel("share of questions at or below")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def quality_and_utility(models: Mapping[str, dict[str, float]], runs: Mapping[str, dict[str, float]]) -> str:
    """Forget quality against model utility, drawn as the benchmark draws it.

    Args:
        models: "target" and "retain-only" -> the summary of its log, with forget quality and model utility.
        runs: run -> that of its unlearned model.
    """

    def result(summary: dict[str, float]) -> dict:
        return {"points": [{"summary": summary}]}

    with style.context("seaborn-v0_8-colorblind"):
        figure = trade_off(
            {name: result(summary) for name, summary in models.items()},
            # matplotlib would take what stands between two signs for a formula.
            {name.replace("$", r"\$"): [result(summary)] for name, summary in runs.items()},
        )
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """The same text for the same figure, with letters as outlines."""
    file = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "rfa-llm"}):
        figure.savefig(file, format="svg", dpi=150, metadata={"Date": None})
    return file.getvalue()
