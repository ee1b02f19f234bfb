"""The tables of docs/benchmark.md that say whether RFA carries over to other forget sets, from the committed results.

    python benchmarks/carry_over.py

Prints, for each way to stop, a row for each forget set and each dtype and machine that it was computed in: the median
of the forget quality and the mean of all else over the seeds, with the least and the greatest. Utility is over the
mean of all the target's scorings, since the question sets that it is of are the same for all four forget sets. Below
them, for the text of that page, it prints how far each run is from its retain-only model in four membership attacks
and in the logarithms of the truth ratios.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import scipy.stats

RESULTS = Path(__file__).parent / "results"
# Where the runs of 100 steps of each forget set are, by learning rate.
FORGET_SETS = {
    0.002: {
        "the subset's own": ["tofu800_calibrated", "tofu800_seeds", "tofu800"],
        "400 to 499": ["tofu800_rows_400_calibrated", "tofu800_rows_400_seeds"],
        "500 to 599": ["tofu800_rows_500", "tofu800_rows_500_seeds"],
        "660 to 759": ["tofu800_rows_660", "tofu800_rows_660_seeds"],
    },
    0.0006: {
        "the subset's own": ["tofu800", "tofu800_rate"],
        "400 to 499": ["tofu800_rows_400_rate"],
        "500 to 599": ["tofu800_rows_500_rate"],
        "660 to 759": ["tofu800_rows_660_rate"],
    },
}
# Runs of before the calibrated stop scaled the adapter.
UNSCALED = ("rfa_calibrated", "tofu800")
METHODS = {
    ("teacher_holdout_calibrated", 0.002): 'With a teacher, holdout rows and `stop_at="calibrated"`',
    ("teacher_calibrated", 0.002): 'With a teacher and `stop_at="calibrated"`',
    ("teacher_calibrated", 0.0006): 'With a teacher and `stop_at="calibrated"`, at a learning rate of 6e-4',
    ("rfa", 0.002): "By default, without a teacher",
    ("rfa", 0.0006): "Without a teacher, at a learning rate of 6e-4",
    ("rfa_calibrated", 0.002): 'Without a teacher, `stop_at="calibrated"`',
}
COLUMNS = [
    *("forget rows", "computed in", "seeds", "forget quality", "utility / target's", "extraction strength"),
    *("forget probability", "forget ROUGE", "min-k++", "PrivLeak", "retain ROUGE"),
]
# After the retain-only model's.
BESIDE_RETAIN_ONLY = ("extraction_strength", "forget_prob", "forget_rouge", "mia_min_k_plus_plus")
ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def computed_in(result: dict) -> str:
    return f"{result['dtype']}, {result['machine']['accelerator'] or 'CPU'}"


def last(result: dict) -> dict:
    return result["points"][-1]["summary"]


def spread(values: Sequence[float], digits: str, middle: Callable = mean) -> str:
    text = format(middle(values), digits)
    return f"{text} ({min(values):{digits}} to {max(values):{digits}})" if len(values) > 1 else text


def target_utilities() -> set[float]:
    """Of the target's scorings beside these runs; one of them may lie in several folders."""
    folders = [folder for folders in FORGET_SETS[0.002].values() for folder in folders]
    return {last(read(RESULTS / folder / "target.json"))["model_utility"] for folder in folders}


def runs(method: str, rate: float, folder: str) -> dict[str, list[dict]]:
    """A method's results at a learning rate in a folder, by what they were computed in."""
    found: dict[str, list[dict]] = {}
    if (method, folder) == UNSCALED:
        return found
    for file in sorted((RESULTS / folder).glob(f"{method}_lr{rate}_seed*.json")):
        result = read(file)
        found.setdefault(computed_in(result), []).append(result)
    return found


def table(method: str, rate: float, target: float) -> list[str]:
    """A method's rows, and what all its runs come to together, as lines of Markdown."""
    lines = [f"{METHODS[method, rate]}:", "", f"| {' | '.join(COLUMNS)} |", "| --- | --- | ---: |" + " --- |" * 8]
    medians, all_shares = [], []
    for rows, folders in FORGET_SETS[rate].items():
        of_set = []
        for folder in folders:
            retain_only = last(read(RESULTS / folder / "retain-only.json"))
            for where, results in runs(method, rate, folder).items():
                scores = [last(result) for result in results]
                qualities = [score["forget_quality"] for score in scores]
                shares = [score["model_utility"] / target for score in scores]
                of_set += qualities
                all_shares += shares
                cells = [
                    f"{rows} ([table](../benchmarks/results/{folder}/table.md))",
                    where,
                    str(len(scores)),
                    spread(qualities, ".2g", median),
                    spread(shares, ".3f"),
                ]
                for name in BESIDE_RETAIN_ONLY:
                    cells.append(f"{spread([score[name] for score in scores], '.3f')}; {retain_only[name]:.3f}")
                for name, digits in (("privleak", ".0f"), ("retain_rouge", ".3f")):
                    cells.append(spread([score[name] for score in scores], digits))
                lines.append(f"| {' | '.join(cells)} |")
        medians.append(format(median(of_set), ".2g") if of_set else "not run")
    error = stdev(all_shares) / len(all_shares) ** 0.5
    return [
        *lines,
        "",
        f"All {len(all_shares)} runs: median forget quality {', '.join(medians)}; utility {mean(all_shares):.3f} of",
        f"the target's in the mean (standard error {error:.3f}).",
        "",
    ]


def tables() -> str:
    """The tables, and what the retain-only models come to, as Markdown."""
    of_target = target_utilities()
    target = mean(of_target)
    lines = [line for method, rate in METHODS for line in table(method, rate, target)]
    # A retain-only model is another one for each set; one scoring of each.
    retrained = []
    for rows, (folder, *_) in FORGET_SETS[0.002].items():
        result = read(RESULTS / folder / "retain-only.json")
        retrained.append(f"{rows} {last(result)['model_utility'] / target:.3f}")
    return "\n".join(
        [
            *lines,
            f"The retain-only models' utility over the target's: {', '.join(retrained)}.",
            f"The target's own, in {len(of_target)} scorings: {min(of_target):.3f} to {max(of_target):.3f}, "
            f"{target:.4f} in the mean.",
        ]
    )


def spread_test(ratios: Sequence[float], retain_ratios: Sequence[float]) -> float:
    """The p-value of a permutation test, question by question, that the logarithms of two models' truth ratios have
    one standard deviation: the Kolmogorov-Smirnov test is slow to see that they have not."""
    return scipy.stats.permutation_test(
        # Their means may differ.
        [logs - logs.mean() for logs in (np.log(ratios), np.log(retain_ratios))],
        lambda ours, theirs, axis: np.std(ours, axis) - np.std(theirs, axis),
        permutation_type="samples",
        vectorized=True,
        rng=0,
    ).pvalue


def differences(runs: Iterable[tuple[str, dict, dict]]) -> str:
    """Each run minus its retain-only model: the attacks' AUC, and mean and standard deviation of the logarithms of the
    forget set's truth ratios, with `spread_test`, as Markdown.

    Args:
        runs: name, result, and the retain-only model's result.
    """
    columns = ("run", *ATTACKS, "log truth ratio, mean", "deviation", "p of the deviation")
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]

    def figures(point: dict) -> list[float]:
        logs = np.log(point["forget_truth_ratios"])
        return [*(point["summary"][name] for name in ATTACKS), logs.mean(), logs.std(ddof=1)]

    passing, told_apart = 0, 0
    for name, result, retain_only in runs:
        ours, theirs = result["points"][-1], retain_only["points"][-1]
        cells = [f"{one - other:+.3f}" for one, other in zip(figures(ours), figures(theirs), strict=True)]
        p = spread_test(ours["forget_truth_ratios"], theirs["forget_truth_ratios"])
        lines.append(f"| {name} | {' | '.join(cells)} | {p:.2g} |")
        passes = ours["summary"]["forget_quality"] >= 0.05
        passing, told_apart = passing + passes, told_apart + (passes and p < 0.05)
    lines += [
        "",
        f"Of {passing} runs with a forget quality of 0.05 or more {told_apart} differ in the deviation (p < 0.05).",
    ]
    return "\n".join(lines)


def of_forget_sets() -> Iterable[tuple[str, dict, dict]]:
    """All runs of `tables`, as `differences` takes them."""
    for method, rate in METHODS:
        for folder in (folder for folders in FORGET_SETS[rate].values() for folder in folders):
            retain_only = read(RESULTS / folder / "retain-only.json")
            for result in (one for results in runs(method, rate, folder).values() for one in results):
                seed = result["run"]["seed"]
                yield f"{folder}: {method}, {rate}, seed {seed}, {computed_in(result)}", result, retain_only


if __name__ == "__main__":
    print(tables())
    print(f"\n{differences(of_forget_sets())}")
