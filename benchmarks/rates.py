"""The tables of README.md and docs/benchmark.md that compare RFA with its rivals, from the committed results.

    python benchmarks/rates.py

Prints first each method at the learning rate with the best point of those that have run, at its last step; then every
run, with its best point beside the last step. Utility is over the mean of the target's scorings
(`carry_over.target_utilities`). Below them it prints how far each run is from the retain-only model
(`carry_over.differences`).
"""

from __future__ import annotations

from functools import cache
from statistics import mean, median

from carry_over import RESULTS, computed_in, differences, last, read, spread, target_utilities

from rfa_llm.benchmark.table import at_best_learning_rate, strength

# Runs of the same rows and steps, scored at the last step alone; the calibrated one in results/tofu800 is of before it
# scaled the adapter.
LAST_STEP_ALONE = ["tofu800_calibrated", "tofu800_seeds"]
CALIBRATED = {
    "rfa_calibrated": 'RFA, `stop_at="calibrated"`',
    "teacher_calibrated": 'RFA with a teacher, `stop_at="calibrated"`',
    "teacher_holdout_calibrated": 'RFA with a teacher and holdout rows, `stop_at="calibrated"`',
}
METHODS = {
    "rfa": "RFA",
    "rfa_calibrated": 'RFA, `stop_at="calibrated"`, before it scaled',
    "teacher_alpha_2": "RFA, teacher, α = 2",
    "teacher_alpha_4": "RFA, teacher, α = 4",
    "grad_ascent": "gradient ascent",
    "grad_diff": "gradient difference",
    "kl": "KL minimization",
    "kl_all_tokens": "KL minimization, all tokens",
    "npo": "NPO",
    "simnpo": "SimNPO",
    "idk_nll": "IdkNLL",
    "idk_dpo": "IdkDPO",
    "rmu": "RMU",
    "rmu_steering_130": "RMU, steering coefficient 130",
    "undial": "UNDIAL",
    "circuit_breaker": "circuit breakers",
    "circuit_breaker_weight_100": "circuit breakers, forget weight 100",
    "asu": "ASU",
}
LAST_STEP = {
    "extraction strength": ("extraction_strength", ".3f"),
    "forget probability": ("forget_prob", ".3f"),
    "forget ROUGE": ("forget_rouge", ".3f"),
    "min-k++": ("mia_min_k_plus_plus", ".2f"),
    "PrivLeak": ("privleak", ".0f"),
    "retain ROUGE": ("retain_rouge", ".3f"),
}


def found(method: str, *folders: str) -> list[dict]:
    """A method's results in some folders, of all its rates and seeds."""
    files = [file for folder in folders for file in sorted((RESULTS / folder).glob(f"{method}_lr*_seed*.json"))]
    return [result for result in map(read, files) if result["run"]["method"] == method]


@cache
def target() -> float:
    """The target's utility."""
    return mean(target_utilities())


def share(summary: dict) -> float:
    """A point's utility over the target's."""
    return summary["model_utility"] / target()


def best_point(result: dict) -> dict:
    return max(result["points"], key=lambda point: strength(point["summary"], target()))


def at_last_step(results: list[dict]) -> list[str]:
    """Cells of `LAST_STEP`; over several runs the mean, with the least and the greatest."""
    scores = [last(result) for result in results]
    return [
        # The retain-only model's own log has no PrivLeak.
        spread([score[name] for score in scores], digits) if all(name in score for score in scores) else "-"
        for name, digits in LAST_STEP.values()
    ]


def models() -> dict[str, list[dict]]:
    return {name: [read(RESULTS / "tofu800" / f"{name}.json")] for name in ("target", "retain-only")}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows])


def at_best_rates() -> str:
    """Each method at the learning rate whose run has the best point, at its last step; the nearest to the retain-only
    model first."""
    chosen = {label: found(name, *LAST_STEP_ALONE) for name, label in CALIBRATED.items()}
    for name, label in METHODS.items():
        if name.startswith("teacher") or name in CALIBRATED:
            continue
        rate = at_best_learning_rate(found(name, "tofu800"), target())[0]["run"]["learning_rate"]
        runs = found(name, "tofu800", *LAST_STEP_ALONE)
        chosen[label] = [run for run in runs if run["run"]["learning_rate"] == rate]
    rows = []
    for label, runs in [*models().items(), *sorted(chosen.items(), key=lambda one: _place(one[1]))]:
        qualities = [last(run).get("forget_quality", 1.0) for run in runs]
        rate = f"{runs[0]['run']['learning_rate']:g}" if "run" in runs[0] else "-"
        shares = [share(last(run)) for run in runs]
        rows.append(
            [label, rate, str(len(runs)), spread(qualities, ".2g", median), spread(shares, ".3f"), *at_last_step(runs)]
        )
    head = ["model", "learning rate", "runs", "forget quality", "utility / target's", *LAST_STEP]
    return markdown(head, rows)


def _place(runs: list[dict]) -> tuple[float, float]:
    return -median(last(run)["forget_quality"] for run in runs), -mean(share(last(run)) for run in runs)


def all_runs() -> list[tuple[str, dict]]:
    return [(label, run) for name, label in METHODS.items() for run in found(name, "tofu800")]


def every_rate() -> str:
    """Every run in results/tofu800, the nearest to the retain-only model at its last step first."""
    rows = []
    for name, (model,) in models().items():
        quality = last(model).get("forget_quality", 1.0)
        rows.append([name, "-", "-", computed_in(model), f"{quality:.2g}, {share(last(model)):.3f}", ""])
        rows[-1] += at_last_step([model])
    for label, run in sorted(all_runs(), key=lambda one: _place([one[1]])):
        point = best_point(run)
        shown = [
            f"{one['summary']['forget_quality']:.2g}, {share(one['summary']):.3f}"
            for one in (run["points"][-1], point)
        ]
        which = "the last" if point is run["points"][-1] else f"{point['step']}: {shown[1]}"
        head = [label, f"{run['run']['learning_rate']:g}", str(run["run"]["seed"]), computed_in(run)]
        rows.append([*head, shown[0], which, *at_last_step([run])])
    head = ["", "learning rate", "seed", "computed in", "last step: forget quality, utility / target's"]
    head += ["best point (step: forget quality, utility / target's)", *LAST_STEP]
    return markdown(head, rows)


if __name__ == "__main__":
    retain_only = read(RESULTS / "tofu800" / "retain-only.json")
    runs = [
        (f"{label}, {run['run']['learning_rate']:g}, seed {run['run']['seed']}", run, retain_only)
        for label, run in all_runs()
    ]
    print(at_best_rates(), every_rate(), differences(runs), sep="\n\n")
