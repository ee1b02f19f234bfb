from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import second_retain_only
from conftest import tiny_llama, tiny_rows, tiny_tokenizer
from scipy.stats import ks_2samp

from rfa_llm.evaluation import answer_losses
from rfa_llm.evaluation.metrics import truth_ratio


def test_a_second_retain_only_model_is_scored_against_the_first(tmp_path, monkeypatch):
    tokenizer, rows, holdout = tiny_tokenizer(), list(tiny_rows(5, first=0)), list(tiny_rows(2, first=60))
    model = tiny_llama(initializer_range=0.2)
    questions = [{**row, "paraphrased_answer": f"{row['answer']} w1", "perturbed_answer": ["w2 w3"]} for row in rows]
    asked = ("forget_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    for name, some in (*((name, questions) for name in asked), ("full", rows), ("new", [*rows, *holdout])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))

    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    first = [0.01 * (1 + i) for i in range(len(rows))]
    kept = {"forget_truth_ratio": {"value_by_index": {str(i): {"score": one} for i, one in enumerate(first)}}}
    (tmp_path / "retain-only.json").write_text(json.dumps({"compared_with": kept}))
    words = {"model": tmp_path / "model", "seed": 1, "data_dir": tmp_path, "facts_dir": tmp_path}
    words |= {"full": tmp_path / "full.jsonl", "holdout_dataset": tmp_path / "new.jsonl"}
    words |= {"retain_result": tmp_path / "retain-only.json", "output": tmp_path / "second.json"}
    line = ["second_retain_only.py", *(str(word) for name, value in words.items() for word in (f"--{name}", value))]
    monkeypatch.setattr(sys, "argv", line)
    second_retain_only.main()

    found = json.loads((tmp_path / "second.json").read_text())
    right = answer_losses(model, tokenizer, [{**q, "answer": q["paraphrased_answer"]} for q in questions])
    wrong = answer_losses(model, tokenizer, [{**q, "answer": q["perturbed_answer"][0]} for q in questions])
    ratios = truth_ratio(right, [[one] for one in wrong])
    assert found["forget_truth_ratios"] == pytest.approx(ratios.tolist(), rel=1e-4)
    quality = ks_2samp(first, ratios).pvalue
    assert found["summary"]["forget_quality"] == pytest.approx(quality)
    assert quality < 0.9
    # Each question's two logarithms may change places.
    ours, theirs = (logs - logs.mean() for logs in (np.log(ratios), np.log(first)))
    swaps = np.array(list(itertools.product([False, True], repeat=len(rows))))
    apart = np.where(swaps, theirs, ours).std(axis=1) - np.where(swaps, ours, theirs).std(axis=1)
    tail = min(np.mean(apart >= apart[0] - 1e-9), np.mean(apart <= apart[0] + 1e-9))
    assert found["p_of_the_deviation"] == pytest.approx(min(1, 2 * tail))
    # Half of the new rows, and none that the models know.
    known = answer_losses(model, tokenizer, rows)
    aucs = [np.mean([one < unseen for one in known]) for unseen in answer_losses(model, tokenizer, holdout)]
    assert found["summary"]["mia_loss"] in [pytest.approx(auc) for auc in aucs]
