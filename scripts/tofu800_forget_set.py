"""Make another forget set of TOFU's 800-row subset, for the same target, to see whether a method carries over.

    python scripts/tofu800_forget_set.py --begin 400 --end 500 --data_dir ../shared/tofu800 --tofu_dir ../shared/tofu \
        --output_dir runs/tofu800-400
    rfa-llm finetune --train_dataset runs/tofu800-400/retain.jsonl --model_name_or_path runs/models/base --seed 0 \
        --output_dir runs/tofu800-400/retain --report_to none
    rfa-llm benchmark --config configs/benchmark/tofu800.yaml --only rfa --learning_rates 2e-3 --points 1 \
        --data_dir runs/tofu800-400 --retain_model runs/tofu800-400/retain --output_dir runs/benchmark-tofu800-400 \
        --results_dir runs/benchmark-tofu800-400/results

The forget set is rows `begin` to `end` of full.jsonl, 20 for each author, and the retain set the others. Its questions
with paraphrases and wrong answers are TOFU's; those of the retain set are the subset's own. The second command trains
the retain-only twin by the target's recipe.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from rfa_llm.data.tofu import load_tofu


def forget_set(begin: int, end: int, data_dir: str, tofu_dir: str) -> dict[str, Dataset]:
    """The sets of a folder that `rfa-llm benchmark --data_dir` reads, by name.

    Raises:
        ValueError: The rows are not there, a question of theirs has no wrong answers in TOFU, or one that the retain
            set is asked is among them.
    """
    full, asked = load_tofu("full", data_dir), load_tofu("retain_perturbed", data_dir)
    if not 0 <= begin < end <= len(full):
        raise ValueError(f"begin, end: {begin} and {end} are no rows of the {len(full)} in {data_dir}; mend them.")
    forget = full.select(range(begin, end))
    names = ("retain_perturbed", "forget10_perturbed")
    perturbed = concatenate_datasets([load_tofu(name, tofu_dir) for name in names])
    row_of = {question: index for index, question in enumerate(perturbed["question"])}
    missing = [question for question in forget["question"] if question not in row_of]
    if missing:
        raise ValueError(
            f"begin, end: {len(missing)} of the rows from {begin} to {end} have no wrong answers; mend them."
        )
    if set(forget["question"]) & set(asked["question"]):
        raise ValueError(f"begin, end: rows from {begin} to {end} are asked as retained ones; choose others.")
    return {
        "forget": forget,
        "retain": full.select([*range(begin), *range(end, len(full))]),
        "forget_perturbed": perturbed.select([row_of[question] for question in forget["question"]]),
        "retain_perturbed": asked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--begin", type=int, required=True, help="first row of the forget set, from 0")
    parser.add_argument("--end", type=int, required=True, help="the row after its last")
    parser.add_argument("--data_dir", required=True, help="folder with full.jsonl and retain_perturbed.jsonl")
    parser.add_argument("--tofu_dir", required=True, help="folder with TOFU's files")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    sets = forget_set(args.begin, args.end, args.data_dir, args.tofu_dir)
    for name, rows in sets.items():
        rows.to_json(args.output_dir / f"{name}.jsonl", force_ascii=False)
    print(f"Forget set of {len(sets['forget'])} rows and what goes with it written to {args.output_dir}.")


if __name__ == "__main__":
    main()
