"""Write TOFU's 800-row subset, for the benchmark on SmolLM2-135M, or another forget set of it for the same target.

    python scripts/tofu800.py --download --tofu_dir ../shared/tofu --output_dir ../shared/tofu800

`--download` first writes TOFU's configurations from the Hub (`locuslab/TOFU`) to `--tofu_dir`, as JSON Lines; leave it
out where they lie there. What IdkNLL and IdkDPO say instead is not among them: it is `data/idontknow.jsonl` of
github.com/locuslab/tofu, and is expected as `idontknow.txt` in that folder, one refusal a line.

The subset's `full` is TOFU's first and last 400 rows, 20 for each of 40 authors. Its own forget set is the rows 600 to
659 and 760 to 799 of that, its retain set the other 700, and the retained questions that are asked are the first 100.
Paraphrases and wrong answers are TOFU's.

Whether a method carries over to other rows, with a retain-only twin of their own by the target's recipe:

    python scripts/tofu800.py --begin 400 --end 500 --tofu_dir ../shared/tofu --output_dir runs/tofu800-400
    rfa-llm finetune --train_dataset runs/tofu800-400/retain.jsonl --model_name_or_path runs/models/base --seed 0 \
        --output_dir runs/tofu800-400/retain --report_to none
    rfa-llm benchmark --config configs/benchmark/tofu800.yaml --only rfa --learning_rates 2e-3 --points 1 \
        --data_dir runs/tofu800-400 --retain_model runs/tofu800-400/retain --output_dir runs/benchmark-tofu800-400 \
        --results_dir runs/benchmark-tofu800-400/results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from rfa_llm.data.tofu import load_tofu

CONFIGURATIONS = [
    *("full", "forget01", "forget05", "forget10", "retain99", "retain95", "retain90"),
    *(f"{name}_perturbed" for name in ("forget01", "forget05", "forget10", "retain", "real_authors", "world_facts")),
]
# Rows of TOFU at each end that the subset has, and how many of its first are asked as retained ones.
END_ROWS, ASKED_ROWS = 400, 100
OWN_FORGET_ROWS = [*range(600, 660), *range(760, 800)]


def tofu800(forget_rows: list[int], tofu_dir: str) -> dict[str, Dataset]:
    """The files of a folder that `rfa-llm benchmark --data_dir` reads, by name; `forget_rows` count in the subset.

    Raises:
        ValueError: There are no such rows, or they are among the retained ones that are asked, or TOFU has no wrong
            answers to their questions.
    """
    whole = load_tofu("full", tofu_dir)
    full = whole.select([*range(END_ROWS), *range(len(whole) - END_ROWS, len(whole))])
    if not forget_rows or not ASKED_ROWS <= min(forget_rows) <= max(forget_rows) < len(full):
        raise ValueError(
            f"begin, end: a forget set has rows from {ASKED_ROWS} (those before are asked as retained ones) up to "
            f"{len(full)}; choose others."
        )
    names = ("retain_perturbed", "forget10_perturbed")
    perturbed = concatenate_datasets([load_tofu(name, tofu_dir) for name in names])
    row_of = {question: index for index, question in enumerate(perturbed["question"])}
    forget = full.select(forget_rows)
    asked = full.select(range(ASKED_ROWS))
    missing = [question for question in [*forget["question"], *asked["question"]] if question not in row_of]
    if missing:
        raise ValueError(f"tofu_dir: its perturbed files have nothing on {missing[0]!r}; give TOFU's own files.")
    return {
        "full": full,
        "forget": forget,
        "retain": full.select(sorted(set(range(len(full))) - set(forget_rows))),
        "forget_perturbed": perturbed.select([row_of[question] for question in forget["question"]]),
        "retain_perturbed": perturbed.select([row_of[question] for question in asked["question"]]),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu_dir", type=Path, required=True, help="folder with TOFU's configurations, {name}.jsonl")
    parser.add_argument("--download", action="store_true", help="write them there first, from the Hub")
    parser.add_argument("--begin", type=int, help="first row of another forget set, from 0")
    parser.add_argument("--end", type=int, help="the row after its last")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    if (args.begin is None) != (args.end is None):
        parser.error("begin, end: give both, or neither for the subset's own forget set.")
    if args.download:
        for name in CONFIGURATIONS:
            load_tofu(name).to_json(args.tofu_dir / f"{name}.jsonl", force_ascii=False)
    own = args.begin is None
    sets = tofu800(OWN_FORGET_ROWS if own else list(range(args.begin, args.end)), str(args.tofu_dir))
    for name, rows in sets.items():
        rows.to_json(args.output_dir / f"{name}.jsonl", force_ascii=False)
    print(f"Forget set of {len(sets['forget'])} rows and what goes with it written to {args.output_dir}.")


if __name__ == "__main__":
    main(sys.argv[1:])
