from __future__ import annotations

import json
import sys
from statistics import fmean

import pytest
import strengths
from conftest import learn_by_heart, perturb, tiny_llama, tiny_lora, tiny_rows, tiny_tokenizer
from peft import get_peft_model
from peft.helpers import rescale_adapter_scale

from rfa_llm.evaluation import answer_losses
from rfa_llm.evaluation.metrics import truth_ratio


def test_the_adapter_is_scaled_to_the_estimate_of_ignorance(tmp_path, monkeypatch):
    tokenizer, rows, holdout = tiny_tokenizer(), list(tiny_rows(5, first=0)), list(tiny_rows(4, first=60))
    base, target = tiny_llama(), tiny_llama()
    learn_by_heart(target, tokenizer, rows)
    for name, model in (("base", base), ("target", target)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    questions = [{**row, "paraphrased_answer": f"{row['answer']} w1", "perturbed_answer": ["w2 w3"]} for row in rows]
    for name, some in (("forget_perturbed", questions), ("full", rows), ("new", [*rows, *holdout])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))
    ratios = {str(i): {"score": 0.5 + i} for i in range(len(rows))}
    kept = {"forget_truth_ratio": {"value_by_index": ratios, "agg_value": 0.0}}
    (tmp_path / "retain-only.json").write_text(json.dumps({"compared_with": kept}))

    def loss(model, rows):
        return fmean(answer_losses(model, tokenizer, rows))

    level = loss(base, rows) + loss(target, holdout) - loss(base, holdout)
    model = get_peft_model(target, tiny_lora()).eval()
    # Noise makes the answers unlikely: as much of it as lies half of the way.
    for scale in (0.01 * 1.3**n for n in range(30)):
        perturb(model, scale)
        with rescale_adapter_scale(model, 2.0):
            enough = loss(model, rows) > level
        if enough:
            break
    assert loss(model, rows) < level
    model.save_pretrained(tmp_path / "adapter")

    words = {"models": tmp_path, "adapter": tmp_path / "adapter", "data_dir": tmp_path}
    words |= {"holdout_dataset": tmp_path / "new.jsonl", "full": tmp_path / "full.jsonl"}
    words |= {"retain_result": tmp_path / "retain-only.json", "output": tmp_path / "strengths.json"}
    monkeypatch.setattr(sys, "argv", ["strengths.py", *(str(w) for k, v in words.items() for w in (f"--{k}", v))])
    strengths.main()

    found = json.loads((tmp_path / "strengths.json").read_text())
    assert found["retrained_answer_loss"] == pytest.approx(level, rel=1e-4)
    scaled = found["scaled"]
    assert 1 < scaled["factor"] < 2
    assert scaled["forget_answer_loss"] == pytest.approx(level, rel=0.05)
    with rescale_adapter_scale(model, scaled["factor"]):
        right = answer_losses(model, tokenizer, [{**q, "answer": q["paraphrased_answer"]} for q in questions])
        wrong = answer_losses(model, tokenizer, [{**q, "answer": q["perturbed_answer"][0]} for q in questions])
    assert scaled["forget_truth_ratios"] == pytest.approx(truth_ratio(right, [[one] for one in wrong]), rel=1e-4)
