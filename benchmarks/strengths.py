"""What another level of the calibrated stop would come to, for a run that is finished.

    python benchmarks/strengths.py --models runs/models --data_dir runs/tofu800-660 \
        --adapter runs/bench-660/runs/teacher_calibrated_lr0.002_seed0 \
        --holdout_dataset ../shared/tofu/retain90.jsonl --full ../shared/tofu800/full.jsonl \
        --retain_result benchmarks/results/tofu800_rows_660/retain-only.json \
        --output benchmarks/results/strengths_rows_660.json

The run's adapter is scaled until the forget set's answers are as unlikely as for a model that was fine-tuned without
them, by `RFATrainer`'s estimate from a teacher and rows that neither it nor the target saw; with `--retain_only` what
such a model really has stands beside it. The rows are 100 others than a run of the benchmark calibrates by (those that
it scores the attacks on). At that strength the paraphrased and wrong answers give the truth ratios and the forget
quality, and with `--facts_dir` all question sets are asked. `--models` is as scripts/smollm2_tofu.py makes it, the
data folder as scripts/tofu800.py does.

A rival's adapter can be scaled as well, also back, where it went too far:

    python benchmarks/strengths.py --models runs/models --data_dir ../shared/tofu800 --facts_dir ../shared/tofu \
        --adapter runs/benchmark-tofu800/runs/npo_lr0.002_seed1 \
        --holdout_dataset ../shared/tofu/retain90.jsonl --full ../shared/tofu800/full.jsonl \
        --retain_result benchmarks/results/tofu800/retain-only.json --output benchmarks/results/strengths_npo.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from scipy.optimize import brentq
from shift_goals import answer_figures, answer_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rfa_llm.benchmark.environment import environment
from rfa_llm.benchmark.sets import unseen
from rfa_llm.data.formats import load_rows, prepare
from rfa_llm.data.tofu import load_question_sets, load_tofu
from rfa_llm.evaluation import evaluate_tofu, forget_truth_ratios, summary, write_log
from rfa_llm.evaluation.scores import encoded_answer_scores

HOLDOUT_ROWS = 100


def losses(model: PreTrainedModel, rows: Dataset, desc: str) -> list[float]:
    """Mean loss of each row's answer, nats per token."""
    return [score.loss for score in encoded_answer_scores(model, list(rows), 16, desc)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with base and target")
    parser.add_argument("--retain_only", help="a retain-only model of these rows")
    parser.add_argument("--adapter", required=True, help="the adapter of a finished run")
    parser.add_argument("--data_dir", required=True, help="folder with forget_perturbed.jsonl")
    parser.add_argument("--facts_dir", help="folder of real authors and world facts, to ask all question sets")
    parser.add_argument("--holdout_dataset", required=True, help="rows of which those that `--full` has not are used")
    parser.add_argument("--full", required=True, help="what the target was fine-tuned on")
    parser.add_argument("--retain_result", type=Path, required=True, help="the retain-only model's result")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.models / "target")
    questions = load_tofu("forget_perturbed", args.data_dir)
    full = load_rows(args.full, "full")
    new = unseen(load_rows(args.holdout_dataset, "holdout_dataset"), full, full)
    new = new.shuffle(seed=0, keep_in_memory=True).select(range(min(HOLDOUT_ROWS, len(new))))
    (rows, wrong_counts), holdout = answer_rows(questions, tokenizer), prepare(new, tokenizer, "holdout_dataset", None)
    answers = rows.select(range(len(questions)))

    def load(model: str | Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()

    base, target = load(args.models / "base"), load(args.models / "target")
    found = {
        "base_forget_loss": fmean(losses(base, answers, "Base, forget set")),
        "base_holdout_loss": fmean(losses(base, holdout, "Base, holdout set")),
        "target_holdout_loss": fmean(losses(target, holdout, "Target, holdout set")),
    }
    del base
    added = found["target_holdout_loss"] - found["base_holdout_loss"]
    found["retrained_answer_loss"] = found["base_forget_loss"] + added
    if args.retain_only is not None:
        found["retain_only_forget_loss"] = fmean(losses(load(args.retain_only), answers, "Retain-only, forget set"))
    print({name: round(value, 3) for name, value in found.items()}, flush=True)

    retain_log = json.loads(args.retain_result.read_text("utf-8"))["compared_with"]
    retain_ratios = forget_truth_ratios(retain_log)
    logs = np.log(retain_ratios).tolist()
    own = {"mean_log_truth_ratio": fmean(logs), "deviation_of_log_truth_ratio": stdev(logs)}
    model = PeftModel.from_pretrained(target, args.adapter).eval()

    def beyond(factor: float) -> float:
        with rescale_adapter_scale(model, factor):
            return fmean(losses(model, answers, f"Scaled by {factor:.3f}")) - found["retrained_answer_loss"]

    factor = brentq(beyond, *((1.0, 2.0) if beyond(1.0) < 0 else (0.0, 1.0)), xtol=0.02)
    with rescale_adapter_scale(model, factor):
        of_rows = losses(model, rows, f"Scaled by {factor:.3f}, all answers")
    scaled = {"factor": factor, **answer_figures(of_rows, wrong_counts, retain_ratios)}
    print({name: round(value, 3) for name, value in scaled.items() if name != "forget_truth_ratios"}, flush=True)
    if args.facts_dir is not None:
        sets = load_question_sets(args.data_dir, args.facts_dir, "forget_perturbed", "retain_perturbed")
        with rescale_adapter_scale(model, factor):
            scaled["summary"] = summary(evaluate_tofu(model, tokenizer, sets, retain_log=retain_log))
        print({name: round(value, 3) for name, value in scaled["summary"].items()})
    dtype = str(target.dtype).removeprefix("torch.")
    write_log({**found, "retain-only": own, "scaled": scaled, "dtype": dtype, **environment()}, args.output)


if __name__ == "__main__":
    main()
