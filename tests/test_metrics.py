from __future__ import annotations

import json
import math

import pytest

from rfa_llm.evaluation import metrics
from rfa_llm.evaluation.hf_metrics import AnswerProbability, ForgetQuality, ModelUtility, TruthRatio
from rfa_llm.evaluation.log import forget_truth_ratios, read_log, write_log


def test_probabilities_by_hand():
    assert metrics.answer_probability([0.0, math.log(4)]) == pytest.approx([1, 0.25])
    # p = 1/2 against 1/4 + 1/4; p = 1/4 against 1/8.
    normalised = metrics.normalised_probability([math.log(2), math.log(4)], [[math.log(4)] * 2, [math.log(8)]])
    assert normalised == pytest.approx([1 / 2, 2 / 3])


def test_normalised_probability_survives_underflow():
    assert metrics.normalised_probability([2000.0, 5000.0], [[2000.0], [1.0]]) == pytest.approx([0.5, 0.0])


def test_truth_ratio_takes_the_geometric_mean_of_wrong_answers():
    # Wrong answers of probability 1/2 and 1/8: geometric mean 1/4, over a paraphrase of 1/2.
    ratios = metrics.truth_ratio([math.log(2), 1.0], [[math.log(2), math.log(8)], [1.0 - math.log(4)]])
    assert ratios == pytest.approx([0.5, 4.0])


def test_truth_ratio_scores():
    ratios = [0.5, 4.0, 0.0, math.inf, 1.0]
    assert metrics.forget_truth_ratio_score(ratios) == pytest.approx((0.5 + 0.25 + 0 + 0 + 1) / 5)
    assert metrics.kept_truth_ratio_score(ratios) == pytest.approx((0.5 + 0 + 1 + 0 + 0) / 5)


def test_mismatched_lengths_are_refused():
    with pytest.raises(ValueError):
        metrics.truth_ratio([1.0, 2.0], [[1.0]])
    with pytest.raises(ValueError):
        metrics.normalised_probability([1.0], [[1.0], [2.0]])
    with pytest.raises(ValueError):
        metrics.rouge(["a"], [])


def test_rouge_recall_with_stemming():
    # "the cats sat on mats" stems to "the cat sat on mat": all 5 words, in order, of the reference's 6.
    first, second = metrics.rouge(["the cats sat on mats", "mat the on"], ["the cat sat on the mat", "on the mat"])
    assert first["rougeL_recall"] == pytest.approx(5 / 6)
    assert first["rougeL_f1"] == pytest.approx(2 * (5 / 6) / (1 + 5 / 6))
    # The same words out of order: rouge1 finds all, the longest common subsequence is one word.
    assert second["rouge1_recall"] == 1
    assert second["rougeL_recall"] == pytest.approx(1 / 3)


def test_model_utility():
    values = [0.5] * 8 + [0.25]
    assert metrics.model_utility(values) == pytest.approx(9 / (8 * 2 + 4))
    assert metrics.model_utility([0.5] * 8 + [0.0]) == 0
    with pytest.raises(ValueError, match="got 8 values"):
        metrics.model_utility([0.5] * 8)
    with pytest.raises(ValueError, match="got -0.5; a score is at least 0"):
        metrics.model_utility([0.5] * 8 + [-0.5])


def test_forget_quality_by_hand():
    # Of the 20 ways to interleave 3 and 3 samples, 2 separate them wholly.
    assert metrics.forget_quality([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]) == pytest.approx(2 / 20)
    assert metrics.forget_quality([0.1, 0.3, 0.5], [0.5, 0.1, 0.3]) == 1.0
    with pytest.raises(ValueError, match="no truth ratios of one model"):
        metrics.forget_quality([], [0.5])


def test_evaluate_modules_agree_with_the_functions():
    losses, wrong = [0.3, 1.2, 2.0], [[1.0, 2.0], [0.5], [3.0, 1.5, 2.5]]
    ratios = metrics.truth_ratio(losses, wrong).tolist()

    probability = AnswerProbability().compute(losses=losses)["answer_probability"]
    assert probability == pytest.approx(sum(math.exp(-loss) for loss in losses) / 3)
    probability = AnswerProbability("normalised").compute(losses=losses, wrong_losses=wrong)["answer_probability"]
    assert probability == pytest.approx(metrics.normalised_probability(losses, wrong).mean())

    for name, score in (("forget", metrics.forget_truth_ratio_score), ("kept", metrics.kept_truth_ratio_score)):
        result = TruthRatio(name).compute(paraphrased_losses=losses, wrong_losses=wrong)
        assert result["truth_ratio"] == pytest.approx(score(ratios))
        assert result["raw"] == pytest.approx(ratios)

    quality = ForgetQuality()
    for ratio, reference in zip([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], strict=True):
        quality.add(prediction=ratio, reference=reference)
    assert quality.compute()["forget_quality"] == pytest.approx(0.1)
    assert ModelUtility().compute(predictions=[0.5] * 8 + [0.25])["model_utility"] == pytest.approx(0.45)


def test_evaluate_modules_refuse_unknown_configurations():
    with pytest.raises(ValueError, match="'forget' or 'kept'"):
        TruthRatio()
    with pytest.raises(ValueError, match="'default' or 'normalised'"):
        AnswerProbability("normalized")


def published_log(ratios: list[float]) -> dict:
    """A retain log as OpenUnlearning writes it; its indices in the order text sorts them."""
    rows = {str(index): {"score": ratio} for index, ratio in enumerate(ratios)}
    return {
        "forget_quality": {"agg_value": None},
        "forget_truth_ratio": {"agg_value": 0.6, "value_by_index": {key: rows[key] for key in sorted(rows)}},
        "mia_loss": {"agg_value": 0.38, "auc": 0.38},
    }


def test_retain_log_from_file_in_the_order_of_the_forget_set(tmp_path):
    ratios = [0.1 * index for index in range(12)]
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps(published_log(ratios)))
    assert forget_truth_ratios(read_log(path)).tolist() == ratios

    older = {"forget_Truth_Ratio": published_log(ratios)["forget_truth_ratio"]}
    assert forget_truth_ratios(older).tolist() == ratios


def test_retain_log_with_the_parts_of_the_truth_ratio():
    log = {
        "forget_Q_A_PARA_Prob": {
            "agg_value": 0.3,
            "value_by_index": {
                "0": {"prob": 0.5, "avg_loss": math.log(2)},
                "1": {"prob": 0.125, "avg_loss": math.log(8)},
            },
        },
        "forget_Q_A_PERT_Prob": {
            "agg_value": 0.2,
            "value_by_index": {
                "0": {"prob": [0.5, 0.125], "avg_loss": [math.log(2), math.log(8)]},
                "1": {"prob": [0.25, 0.25], "avg_loss": [math.log(4), math.log(4)]},
            },
        },
    }
    assert forget_truth_ratios(log) == pytest.approx([0.5, 2.0])


def test_retain_log_without_truth_ratios_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no truth ratios of the forget set.*model_utility"):
        forget_truth_ratios({"model_utility": {"agg_value": 0.5}})
    with pytest.raises(ValueError, match="not a summary"):
        forget_truth_ratios({"forget_truth_ratio": {"agg_value": 0.5}})


def test_log_round_trip_and_atomic_write(tmp_path):
    path = tmp_path / "runs" / "TOFU_EVAL.json"
    log = {"model_utility": {"agg_value": 0.1 + 0.2}, "a": {"agg_value": 1.0, "value_by_index": {"0": {"é": [1e-30]}}}}
    write_log(log, path)
    assert read_log(path) == log
    with pytest.raises(TypeError):
        write_log({"model_utility": {"agg_value": object()}}, path)
    assert read_log(path) == log
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_read_log_takes_a_figure_that_is_not_known(tmp_path):
    # As OpenUnlearning writes the forget quality without a retain log.
    log = {"forget_quality": {"agg_value": None}, "x": {"agg_value": 1, "value_by_index": {"10": {"score": None}}}}
    write_log(log, tmp_path / "log.json")
    assert read_log(tmp_path / "log.json") == log


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forget_quality: 0.3", "is not JSON"),
        ("[1, 2]", "no evaluation log"),
        ("{}", "no evaluation log"),
        ('{"forget_quality": 0.3}', "'forget_quality' has no 'agg_value'"),
        ('{"forget_quality": {"agg_value": "0.3"}}', "'agg_value' of its entry 'forget_quality' is no number"),
        ('{"x": {"agg_value": 1, "value_by_index": [{}]}}', "entry 'x' .* no object of numbered rows; give the log"),
        ('{"x": {"agg_value": 1, "value_by_index": {"a": {}}}}', "no object of numbered rows"),
        ('{"x": {"agg_value": 1, "value_by_index": {"0": 1}}}', "no object of numbered rows"),
    ],
)
def test_read_log_refuses_other_files(tmp_path, text, message):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_log(path)
