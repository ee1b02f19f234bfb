"""The comparison as numbers: which learning rate, which step, mean and spread over seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, harmonic_mean, median

# Columns of the table, beside forget quality and utility: name, and the column of a summary.
COLUMNS = {
    "forget prob": "forget_prob",
    "truth ratio": "forget_truth_ratio",
    "forget ROUGE": "forget_rouge",
    "extraction strength": "extraction_strength",
    "PrivLeak": "privleak",
    "repetition": "repetition_4",
}


def strength(summary: Mapping[str, float], target_utility: float) -> float:
    """How good a point is in both ways: the harmonic mean of forget quality and of utility over the target's.

    Utility counts up to the target's. It looks at the retain-only model, so it may rank points and learning rates in
    a report, and nothing that RFA itself decides.

    Args:
        summary: with `forget_quality` and `model_utility`.
        target_utility: the target's.

    Returns:
        a number in [0, 1].
    """
    return harmonic_mean([summary["forget_quality"], min(1.0, summary["model_utility"] / target_utility)])


def at_best_learning_rate(results: Sequence[dict], target_utility: float) -> list[dict]:
    """The results of a method at the learning rate whose run has the best point on its trajectory (`strength`).

    The rates are compared on one seed, the one that has run with most of them: a rate with more seeds would have more
    draws.

    Args:
        results: result files of one method.
        target_utility: the target's model utility.
    """
    rates = Counter(one["run"]["seed"] for one in results)
    seed = max(sorted(rates), key=rates.get)
    best = max(
        (one for one in results if one["run"]["seed"] == seed),
        key=lambda one: max(strength(point["summary"], target_utility) for point in one["points"]),
    )
    return [one for one in results if one["run"]["learning_rate"] == best["run"]["learning_rate"]]


def best_step(results: Sequence[dict], target_utility: float) -> int:
    """The step at which a method's runs, one a seed, are best on average (`strength`)."""
    first = max(one["points"][0]["step"] for one in results)
    steps = sorted({point["step"] for one in results for point in one["points"] if point["step"] >= first})
    return max(steps, key=lambda step: fmean(strength(at(one, step)["summary"], target_utility) for one in results))


def at(result: dict, step: int) -> dict:
    """A result's point at a step: the last one up to it, for a run that stopped by itself stays as it is."""
    return [point for point in result["points"] if point["step"] <= step][-1]


def table(models: Mapping[str, dict], methods: Mapping[str, Sequence[dict]]) -> str:
    """The comparison as a Markdown table.

    Args:
        models: results of "target" and "retain-only".
        methods: each method's results at its chosen learning rate, one a seed.

    Returns:
        a row for each model, and two for each method: its best step, and its last. Forget quality is the median over
        seeds, all else the mean; where there are several seeds, the least and the greatest value stand behind.
    """
    target_utility = models["target"]["points"][0]["summary"]["model_utility"]
    headings = ["method", "learning rate", "step", "seeds", "forget quality", "utility", "utility / target's"]
    lines = [
        "| " + " | ".join([*headings, *COLUMNS, "computed in"]) + " |",
        "| --- |" + " ---: |" * (len(headings) + len(COLUMNS) - 1) + " --- |",
    ]
    for name, result in models.items():
        lines.append(_row([name, "-", "-", "-"], [result["points"][0]["summary"]], target_utility, [result]))
    chosen = []
    for name, results in methods.items():
        best = best_step(results, target_utility)
        points = {"best": [at(one, best) for one in results], "last": [one["points"][-1] for one in results]}
        for which, taken in points.items():
            summaries = [one["summary"] for one in taken]
            score = fmean(strength(one, target_utility) for one in summaries)
            steps = _cell([one["step"] for one in taken], "{:g}", fmean)
            head = [f"{name}, {which} step", f"{results[0]['run']['learning_rate']:g}", steps, str(len(results))]
            chosen.append((which, -score, _row(head, summaries, target_utility, results)))
    return "\n".join([*lines, *(row for *_, row in sorted(chosen))]) + "\n"


def _row(
    head: list[str], summaries: Sequence[Mapping[str, float]], target_utility: float, results: Sequence[dict]
) -> str:
    utilities = [one["model_utility"] for one in summaries]
    cells = [
        _cell([one["forget_quality"] for one in summaries], "{:.2g}", median),
        _cell(utilities, "{:.3f}", fmean),
        _cell([utility / target_utility for utility in utilities], "{:.3f}", fmean),
    ]
    for column in COLUMNS.values():
        # A retain-only model's own log has no PrivLeak, nor has that of a run without holdout rows.
        everywhere = all(column in one for one in summaries)
        cells.append(_cell([one[column] for one in summaries], "{:.3f}", fmean) if everywhere else "-")
    return "| " + " | ".join([*head, *cells, _computed_in(results)]) + " |"


def _computed_in(results: Sequence[dict]) -> str:
    """Dtype and processor: scores of one model differ between them."""
    machines = {f"{one['dtype']}, {one['machine']['accelerator'] or one['machine']['cpu']}" for one in results}
    return "; ".join(sorted(machines))


def _cell(values: Sequence[float], form: str, middle) -> str:
    shown = form.format(middle(values))
    if min(values) == max(values):
        return shown
    return f"{shown} ({form.format(min(values))} to {form.format(max(values))})"
