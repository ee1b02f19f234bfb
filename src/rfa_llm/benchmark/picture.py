"""The comparison as a picture: forget quality against model utility, a trajectory for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Forget qualities below it are drawn on it: all of them say "told apart beyond doubt".
FLOOR = 1e-8
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "p", "h", "d", "*")


def check_can_draw() -> None:
    """Check, before hours of training, that the picture can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("the picture needs matplotlib; install it with `pip install rfa-llm[benchmark]`.")


def draw(models: Mapping[str, dict], methods: Mapping[str, Sequence[dict]], path: Path) -> None:
    """Draw the comparison (`trade_off`) and write the picture.

    Args:
        models, methods: as `trade_off` takes them.
        path: where it goes; the suffix says the format, such as .svg or .png.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_can_draw()
    from matplotlib import rc_context

    figure = trade_off(models, methods)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Text stays text in an SVG file, and the same results make the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rfa-llm"}):
        figure.savefig(path, metadata={"Date": None})


def trade_off(models: Mapping[str, dict], methods: Mapping[str, Sequence[dict]]) -> Figure:
    """Forget quality against model utility: the trajectories from the target to each method's last point.

    Methods differ by marker and line style as well as by colour, so that it can be read in black and white. The last
    point has the largest mark.

    Args:
        models: results of "target" and "retain-only".
        methods: each method's results, one a seed; the first is drawn.
    """
    from matplotlib.figure import Figure

    summaries = {name: result["points"][0]["summary"] for name, result in models.items()}
    utility = summaries["target"]["model_utility"]

    def place(summary: Mapping[str, float]) -> tuple[float, float]:
        return summary["model_utility"] / utility, max(FLOOR, summary["forget_quality"])

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, results) in enumerate(methods.items()):
        points = [summaries["target"], *(point["summary"] for point in results[0]["points"])]
        x, y = zip(*(place(summary) for summary in points), strict=True)
        marker = MARKERS[number % len(MARKERS)]
        (line,) = axes.plot(
            x,
            y,
            linestyle=STYLES[number % len(STYLES)],
            marker=marker,
            # The first point is the target's, which has a mark of its own.
            markevery=slice(1, None),
            markersize=4,
            linewidth=2.2 if name.startswith("rfa") else 1.1,
            label=name,
        )
        # Where it ends, or the way could be read either way round.
        axes.plot(x[-1:], y[-1:], marker=marker, markersize=9, markeredgecolor="white", color=line.get_color())
    for name, summary in summaries.items():
        x, y = place(summary)
        axes.plot(x, y, marker="*", markersize=15, color="black", linestyle="none")
        paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(0, 12), ha="center", bbox=paper)
    axes.set_yscale("log")
    axes.set_ylim(FLOOR / 3, 10)
    axes.margins(x=0.1)
    # Utilities that are as good as equal should look it.
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, 0.9), max(right, 1.1))
    axes.axhline(0.05, color="grey", linewidth=0.7, linestyle=":")
    axes.set_xlabel("model utility, as a share of the target's")
    axes.set_ylabel(f"forget quality (KS p-value; below {FLOOR:g} drawn there)")
    axes.grid(alpha=0.3)
    if methods:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
