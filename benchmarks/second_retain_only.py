"""What a second retain-only model scores against the first: how near to it a model can be expected to come.

    rfa-llm finetune --train_dataset ../shared/tofu800/retain.jsonl --model_name_or_path runs/models/base --seed 1 \
        --output_dir runs/retain-seed1 --report_to none
    python benchmarks/second_retain_only.py --model runs/retain-seed1 --seed 1 --data_dir ../shared/tofu800 \
        --facts_dir ../shared/tofu --full ../shared/tofu800/full.jsonl \
        --holdout_dataset ../shared/tofu/retain90.jsonl \
        --retain_result benchmarks/results/tofu800/retain-only.json \
        --output benchmarks/results/second_retain_only_own_rows.json

The two differ by the seed of their fine-tuning. The model is scored as `rfa-llm benchmark` scores a run, also on the
same rows for the membership attacks, and `carry_over.py`'s permutation test is made of the two. The data folder is as
scripts/tofu800.py makes it, `runs/models` as scripts/smollm2_tofu.py does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from carry_over import spread_test
from transformers import AutoModelForCausalLM, AutoTokenizer

from rfa_llm.benchmark.environment import environment
from rfa_llm.benchmark.runs import point
from rfa_llm.benchmark.sets import holdout_halves
from rfa_llm.data.formats import load_rows
from rfa_llm.data.tofu import load_question_sets
from rfa_llm.evaluation import evaluate_tofu, forget_truth_ratios, write_log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the second retain-only model")
    parser.add_argument("--seed", type=int, required=True, help="seed of its fine-tuning, for the file")
    parser.add_argument("--data_dir", required=True, help="folder with forget_perturbed and retain_perturbed.jsonl")
    parser.add_argument("--facts_dir", required=True, help="folder of real authors and world facts")
    parser.add_argument("--holdout_dataset", required=True, help="rows of which those that `--full` has not are used")
    parser.add_argument("--full", required=True, help="forget and retain set")
    parser.add_argument("--retain_result", type=Path, required=True, help="the first retain-only model's result")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    args = parser.parse_args()

    sets = load_question_sets(args.data_dir, args.facts_dir, "forget_perturbed", "retain_perturbed")
    full = load_rows(args.full, "full")
    sets["holdout"], _ = holdout_halves(load_rows(args.holdout_dataset, "holdout_dataset"), sets["forget"], full)

    retain_log = json.loads(args.retain_result.read_text("utf-8"))["compared_with"]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    log = evaluate_tofu(model, AutoTokenizer.from_pretrained(args.model), sets, retain_log=retain_log)
    found = {"seed": args.seed, **point(log, 0), "dtype": str(model.dtype).removeprefix("torch."), **environment()}
    p_value = spread_test(found["forget_truth_ratios"], forget_truth_ratios(retain_log))
    found["p_of_the_deviation"] = float(p_value)
    print({name: round(value, 3) for name, value in {**found["summary"], "p": found["p_of_the_deviation"]}.items()})
    write_log(found, args.output)


if __name__ == "__main__":
    main()
