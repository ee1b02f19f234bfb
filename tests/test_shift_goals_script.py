from __future__ import annotations

import json
import sys

import pytest
import shift_goals
from conftest import tiny_llama, tiny_rows, tiny_tokenizer

from rfa_llm.evaluation import answer_losses
from rfa_llm.evaluation.metrics import truth_ratio


def test_the_targets_own_goal_is_what_the_target_scores(tmp_path, monkeypatch):
    models = {"target": tiny_llama(), "base": tiny_llama(initializer_range=0.1)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    # Two wrong answers for the first question, one for each other.
    questions = [
        {**row, "paraphrased_answer": f"{row['answer']} w1", "perturbed_answer": ["w2 w3 w5", "w4"][: 1 + (i == 0)]}
        for i, row in enumerate(tiny_rows(5, first=0))
    ]
    for name, rows in (("forget_perturbed", questions), ("retain", list(tiny_rows(8, first=20)))):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def losses(model, answers):
        rows = [
            {"question": row["question"], "answer": answer} for row, answer in zip(questions, answers, strict=True)
        ]
        return answer_losses(model, tiny_tokenizer(), rows)

    def ratios(model):
        right = losses(model, [row["paraphrased_answer"] for row in questions])
        first, last = (losses(model, [row["perturbed_answer"][place] for row in questions]) for place in (0, -1))
        wrong = [[first[0], last[0]], *([loss] for loss in first[1:])]
        return truth_ratio(right, wrong)

    of_target = ratios(models["target"]).tolist()
    kept = {"value_by_index": {str(i): {"score": ratio} for i, ratio in enumerate(of_target)}, "agg_value": 0.0}
    (tmp_path / "retain-only.json").write_text(json.dumps({"compared_with": {"forget_truth_ratio": kept}}))
    words = {"models": tmp_path, "data_dir": tmp_path, "retain_result": tmp_path / "retain-only.json"}
    words["output"] = tmp_path / "goals.json"
    monkeypatch.setattr(sys, "argv", ["shift_goals.py", *(str(w) for k, v in words.items() for w in (f"--{k}", v))])
    shift_goals.main()

    goals = json.loads((tmp_path / "goals.json").read_text())["goals"]
    assert goals["target"]["forget_truth_ratios"] == pytest.approx(of_target, rel=1e-4)
    assert goals["target"]["forget_quality"] == pytest.approx(1)
    own = losses(models["target"], [row["answer"] for row in questions])
    assert goals["target"]["forget_answer_loss"] == pytest.approx(sum(own) / len(own), rel=1e-4)
    # The base's features, read out by the target's norm and head.
    models["base"].model.norm, models["base"].lm_head = models["target"].model.norm, models["target"].lm_head
    assert goals["ignorant, no style"]["forget_truth_ratios"] == pytest.approx(
        ratios(models["base"]).tolist(), rel=1e-4
    )
    assert len({json.dumps(goal["forget_truth_ratios"]) for goal in goals.values()}) == 5
