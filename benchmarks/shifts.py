"""Every shift on TOFU's 800-row subset with SmolLM2-135M: unlearn, evaluate, one table.

    python benchmarks/shifts.py --models runs/models --data_dir ../shared/tofu800 --facts_dir ../shared/tofu

Runs `rfa-llm unlearn` (configs/tofu800.yaml) and `rfa-llm evaluate` for each shift and seed, and evaluates the target
and the retain-only model. A run whose result is there is not repeated. Results go to benchmarks/results/tofu800_shifts
(JSON, without any of TOFU's text) and benchmarks/results/tofu800_shifts.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

from rfa_llm.benchmark.environment import environment
from rfa_llm.evaluation import forget_truth_ratios, read_log, summary
from rfa_llm.evaluation.metrics import forget_quality
from rfa_llm.shifts import SHIFTS

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "tofu800_shifts"
RECIPE = ROOT.parent / "configs" / "tofu800.yaml"
# What each run changes of the recipe. The default shift has a second seed, and tries with a stronger retain loss and
# with higher learning rates; the other shifts, to spare two cores, have half of the recipe's steps.
RUNS = {
    "local_seed0": {"shift": "local", "seed": 0, "max_steps": 90},
    "local_seed1": {"shift": "local", "seed": 1, "max_steps": 90},
    "local_alpha8_seed0": {"shift": "local", "seed": 0, "max_steps": 90, "alpha": 8.0},
    "local_alpha8_120_seed0": {"shift": "local", "seed": 0, "max_steps": 120, "alpha": 8.0},
    "local_lr2e-3_60_seed0": {"shift": "local", "seed": 0, "max_steps": 60, "learning_rate": 2e-3},
    "local_lr2e-3_60_seed1": {"shift": "local", "seed": 1, "max_steps": 60, "learning_rate": 2e-3},
    "local_lr3e-3_45_seed0": {"shift": "local", "seed": 0, "max_steps": 45, "learning_rate": 3e-3},
    "local_lr3e-3_45_seed1": {"shift": "local", "seed": 1, "max_steps": 45, "learning_rate": 3e-3},
    **{f"{shift}_seed0": {"shift": shift, "seed": 0, "max_steps": 45} for shift in SHIFTS if shift != "local"},
}


def command(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "rfa_llm.cli.main", *map(str, words)], check=True)


def evaluate(name: str, model: Path, args: argparse.Namespace, *extra: str | Path) -> Path:
    log = args.runs / f"{name}.eval.json"
    if not log.exists():
        command(
            "evaluate",
            *("--model_name_or_path", model),
            *("--data_dir", args.data_dir, "--facts_dir", args.facts_dir),
            *("--forget_config", "forget_perturbed", "--output_file", log, *extra),
        )
    return log


def write_result(name: str, log_file: Path, retain_log: Path, settings: dict, history: list[dict]) -> None:
    """The run's aggregate numbers and truth ratios, without the texts that the log holds."""
    log = read_log(log_file)
    ratios = forget_truth_ratios(log)
    quality = forget_quality(ratios, forget_truth_ratios(read_log(retain_log)))
    result = {
        "settings": settings,
        "summary": {**summary(log), "forget_quality": quality},
        "forget_truth_ratios": ratios.tolist(),
        "history": history,
        **environment(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def run_shift(name: str, changes: dict, retain_log: Path, args: argparse.Namespace) -> None:
    if (RESULTS / f"{name}.json").exists():
        return
    adapter = args.runs / name
    target = args.models / "target"
    if not (adapter / "adapter_config.json").exists():
        sets = {f"{kind}_dataset": args.data_dir / f"{kind}.jsonl" for kind in ("forget", "retain")}
        words = {"model_name_or_path": target, "output_dir": adapter, **sets, **changes}
        if changes["shift"] == "ignorant":
            words["teacher"] = args.models / "base"
        command(
            *("unlearn", "--config", RECIPE),
            *(word for key, value in words.items() for word in (f"--{key}", value)),
        )
    log = evaluate(name, target, args, "--adapter_name_or_path", adapter, "--retain_log", retain_log)
    state = json.loads((adapter / "trainer_state.json").read_text())
    write_result(name, log, retain_log, {**yaml.safe_load(RECIPE.read_text()), **changes}, state["log_history"])


def table() -> str:
    """The rows of the table: target, retain-only, then the shifts by forget quality."""
    results = {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}
    first = [name for name in ("target", "retain-only") if name in results]
    rest = sorted(set(results) - set(first), key=lambda name: (-results[name]["summary"]["forget_quality"], name))
    columns = list(results[first[0]]["summary"])
    target_utility = results["target"]["summary"]["model_utility"]
    lines = [
        f"| model | alpha | learning rate | steps | {' | '.join(columns).replace('_', ' ')} | utility / target's |",
        "| --- |" + " ---: |" * (len(columns) + 4),
    ]
    for name in [*first, *rest]:
        row = results[name]["summary"]
        cells = [f"{row[column]:.3g}" if column == "forget_quality" else f"{row[column]:.3f}" for column in columns]
        settings = [
            str(results[name]["settings"].get(field, "-")) for field in ("alpha", "learning_rate", "max_steps")
        ]
        cells.append(f"{row['model_utility'] / target_utility:.3f}")
        lines.append(f"| {name} | {' | '.join([*settings, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder that scripts/smollm2_tofu.py filled")
    parser.add_argument("--data_dir", type=Path, required=True, help="TOFU's 800-row subset")
    parser.add_argument("--facts_dir", type=Path, required=True, help="folder with real authors and world facts")
    parser.add_argument("--runs", type=Path, default=Path("runs/tofu800"), help="where adapters and logs go")
    parser.add_argument("--only", nargs="*", help="names such as local_seed0; by default all")
    args = parser.parse_args()

    retain_log = evaluate("retain-only", args.models / "retain", args)
    target_log = evaluate("target", args.models / "target", args, "--retain_log", retain_log)
    for name, log in (("retain-only", retain_log), ("target", target_log)):
        if not (RESULTS / f"{name}.json").exists():
            write_result(name, log, retain_log, {}, [])
    for name, changes in RUNS.items():
        if not args.only or name in args.only:
            run_shift(name, changes, retain_log, args)
    caption = (
        "SmolLM2-135M-Instruct fine-tuned on TOFU's 800-row subset, made to forget its 100 forget rows "
        "(`configs/tofu800.yaml`; written by `benchmarks/shifts.py`). Scores by TOFU's definitions; forget quality is "
        "the KS test's p-value against the retain-only model, which no run saw."
    )
    RESULTS.with_suffix(".md").write_text(f"{caption}\n\n{table()}\n")
    print(table())


if __name__ == "__main__":
    main()
