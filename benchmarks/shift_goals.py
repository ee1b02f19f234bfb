"""Where a shift leads, before any training: what the target says where its last block's features are `h⁰ + S`.

    python benchmarks/shift_goals.py --models runs/models --data_dir runs/tofu800-400 \
        --retain_result benchmarks/results/tofu800_rows_400/retain-only.json \
        --output benchmarks/results/shift_goals_rows_400.json

A training comes to the goal at best. The paraphrased and wrong answers of the forget set's questions are scored on the
goal's features, which gives truth ratios, and with a retain-only model's the forget quality; the true answers give the
loss. `ignorant` is taken with no style correction, with the mean difference alone, and with `fit_style`'s maps, fitted
on 256 retain rows spread over the set, where a training takes the first. The data folder is as scripts/tofu800.py
makes it, `--models` as scripts/smollm2_tofu.py does.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import correlation, fmean, stdev

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rfa_llm import RFAConfig
from rfa_llm.benchmark.environment import environment
from rfa_llm.blocks import find_blocks
from rfa_llm.data.formats import prepare, spread
from rfa_llm.data.tofu import load_tofu
from rfa_llm.evaluation import forget_truth_ratios, write_log
from rfa_llm.evaluation.metrics import answer_probability, forget_quality, truth_ratio
from rfa_llm.feature_cache import FeatureRows, batches, row_features
from rfa_llm.reference import fit_style, local_mask
from rfa_llm.residuals import block_features, readout_loss


def last_features(model: PreTrainedModel, rows: Dataset, pad_token_id: int, desc: str, local: bool = False):
    """The last block's features at each row's answer positions, a list of `[n, hidden]`."""
    blocks = find_blocks(model)

    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
        if not local:
            return block_features(model, [blocks[-1]], input_ids=input_ids, attention_mask=attention_mask)
        mask = local_mask(model, attention_mask, RFAConfig.local_window, RFAConfig.local_sinks)
        positions = torch.arange(input_ids.shape[1]).expand(len(input_ids), -1)
        return block_features(model, [blocks[-1]], input_ids=input_ids, attention_mask=mask, position_ids=positions)

    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    padded = batches([rows[index] for index in order], "answer", pad_token_id, 16, desc)
    features = FeatureRows(row_features(run, padded, [0], torch.device("cpu")), [0])
    place = {index: position for position, index in enumerate(order)}
    return [features.row(place[index])[0] for index in range(len(rows))]


def losses(model: PreTrainedModel, rows: Dataset, goals: list[torch.Tensor]) -> list[float]:
    """Mean loss of each row's answer on the goal's features, nats per token."""
    blocks = find_blocks(model)
    return [readout_loss(model, blocks, goal, row) for row, goal in zip(rows, goals, strict=True)]


def answer_rows(questions: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, list[int]]:
    """The questions' true answers, then the paraphrased and then all wrong ones, encoded; and how many wrong ones each
    question has."""
    pairs = [
        {"question": q["question"], "answer": q[which]}
        for which in ("answer", "paraphrased_answer")
        for q in questions
    ]
    wrong_counts = [len(wrong) for wrong in questions["perturbed_answer"]]
    pairs += [{"question": q["question"], "answer": wrong} for q in questions for wrong in q["perturbed_answer"]]
    return prepare(Dataset.from_list(pairs), tokenizer, "data_dir", None), wrong_counts


def answer_figures(found: list[float], wrong_counts: list[int], retain_ratios: np.ndarray) -> dict:
    """What the losses of `answer_rows` say: truth ratios against a retain-only model's, and the true answers' loss."""
    number = len(wrong_counts)
    wrong_ends = 2 * number + np.cumsum(wrong_counts)
    wrong = [found[end - count : end] for count, end in zip(wrong_counts, wrong_ends, strict=True)]
    ratios = truth_ratio(found[number : 2 * number], wrong)
    logs = np.log(ratios).tolist()
    return {
        "forget_quality": forget_quality(ratios, retain_ratios),
        "mean_log_truth_ratio": fmean(logs),
        "deviation_of_log_truth_ratio": stdev(logs),
        "forget_answer_loss": fmean(found[:number]),
        "forget_prob": float(answer_probability(found[:number]).mean()),
        "forget_truth_ratios": ratios.tolist(),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with base and target")
    parser.add_argument("--data_dir", required=True, help="folder with forget_perturbed.jsonl and retain.jsonl")
    parser.add_argument(
        "--retain_result", type=Path, required=True, help="a retain-only model's result of the benchmark"
    )
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.models / "target")
    target, base = (
        AutoModelForCausalLM.from_pretrained(args.models / n, dtype="auto").eval() for n in ("target", "base")
    )
    questions = load_tofu("forget_perturbed", args.data_dir)
    rows, wrong_counts = answer_rows(questions, tokenizer)
    retain = prepare(spread(load_tofu("retain", args.data_dir), RFAConfig.mean_rows), tokenizer, "data_dir", None)

    features = partial(last_features, pad_token_id=tokenizer.pad_token_id)
    ours = features(target, rows, desc="Target on the answers")
    near = features(target, rows, desc="Target, local", local=True)
    theirs = features(base, rows, desc="Base on the answers")
    x, y = (torch.cat(features(m, retain, desc="Retain set")) for m in (base, target))
    style, mean = fit_style([([x], [y])])[0], (y - x).float().mean(0)
    goals = {
        "target": ours,
        "local": near,
        "ignorant, no style": theirs,
        "ignorant, mean difference": [h + mean for h in theirs],
        "ignorant": [h + h.float() @ style[:-1] + style[-1] for h in theirs],
    }

    compared_with = json.loads(args.retain_result.read_text(encoding="utf-8"))["compared_with"]
    retain_ratios = forget_truth_ratios(compared_with)
    results = {}
    for name, goal in goals.items():
        figures = answer_figures(losses(target, rows, goal), wrong_counts, retain_ratios)
        logs = np.log(figures["forget_truth_ratios"]).tolist()
        alike = correlation(logs, np.log(retain_ratios).tolist())
        results[name] = {**figures, "correlation_of_log_truth_ratios": alike}
        print(name, {key: round(value, 4) for key, value in results[name].items() if key != "forget_truth_ratios"})
    logs = np.log(retain_ratios).tolist()
    own = {"mean_log_truth_ratio": fmean(logs), "deviation_of_log_truth_ratio": stdev(logs)}
    dtype = str(target.dtype).removeprefix("torch.")
    write_log({"goals": results, "retain-only": own, "dtype": dtype, **environment()}, args.output)


if __name__ == "__main__":
    main()
