"""TOFU's metrics as modules of the `evaluate` library: `TruthRatio().compute(...)`, without network."""

from __future__ import annotations

import evaluate
from datasets import Features, List, Value

from rfa_llm.evaluation import metrics

CITATION = "Maini et al., 2024, TOFU: A Task of Fictitious Unlearning for LLMs, arXiv 2401.06121"


class AnswerProbability(evaluate.Metric):
    """Mean answer probability. `config_name="normalised"` sets it against wrong answers.

    Inputs of `compute`: `losses`, floats, and in the configuration "normalised" also `wrong_losses`, lists of floats.
    Returns {"answer_probability": float}. See `metrics.answer_probability` and `metrics.normalised_probability`.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"losses": Value("float64")}
        if self.config_name == "normalised":
            features["wrong_losses"] = List(Value("float64"))
        elif self.config_name != "default":
            raise ValueError(
                f"AnswerProbability got config_name={self.config_name!r}; give 'default' or 'normalised'."
            )
        return evaluate.MetricInfo(
            description="exp(-loss) of answers, or p / (p + the wrong answers' p).",
            citation=CITATION,
            inputs_description=self.__doc__,
            features=Features(features),
        )

    def _compute(self, losses: list[float], wrong_losses: list[list[float]] | None = None) -> dict[str, float]:
        if self.config_name == "normalised":
            return {"answer_probability": float(metrics.normalised_probability(losses, wrong_losses).mean())}
        return {"answer_probability": float(metrics.answer_probability(losses).mean())}


class TruthRatio(evaluate.Metric):
    """Truth ratio. `config_name="forget"` scores closeness to 1; "kept", for the other sets, how far it is below 1.

    Inputs of `compute`: `paraphrased_losses`, floats, and `wrong_losses`, lists of floats. Returns
    {"truth_ratio": float, "raw": list of float}; `raw` is what ForgetQuality takes. See `metrics.truth_ratio`.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("forget", "kept"):
            raise ValueError(f"TruthRatio got config_name={self.config_name!r}; give 'forget' or 'kept'.")
        return evaluate.MetricInfo(
            description="exp(-mean loss of wrong answers) / exp(-loss of the paraphrased answer).",
            citation=CITATION,
            inputs_description=self.__doc__,
            features=Features({"paraphrased_losses": Value("float64"), "wrong_losses": List(Value("float64"))}),
        )

    def _compute(self, paraphrased_losses: list[float], wrong_losses: list[list[float]]) -> dict:
        ratios = metrics.truth_ratio(paraphrased_losses, wrong_losses)
        if self.config_name == "forget":
            return {"truth_ratio": metrics.forget_truth_ratio_score(ratios), "raw": ratios.tolist()}
        return {"truth_ratio": metrics.kept_truth_ratio_score(ratios), "raw": ratios.tolist()}


class ForgetQuality(evaluate.Metric):
    """p-value of the Kolmogorov-Smirnov test between two models' truth ratios on the forget set.

    Inputs of `compute`: `predictions`, the unlearned model's raw truth ratios, and `references`, as many of the
    retain-only model. Returns {"forget_quality": float}. See `metrics.forget_quality`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="p-value of a two-sample Kolmogorov-Smirnov test.",
            citation=CITATION,
            inputs_description=self.__doc__,
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"forget_quality": metrics.forget_quality(predictions, references)}


class ModelUtility(evaluate.Metric):
    """Harmonic mean of probability, ROUGE and truth ratio on retain, real authors and world facts.

    Input of `compute`: `predictions`, the nine numbers. Returns {"model_utility": float}. See `metrics.model_utility`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Harmonic mean of nine scores.",
            citation=CITATION,
            inputs_description=self.__doc__,
            features=Features({"predictions": Value("float64")}),
        )

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        return {"model_utility": metrics.model_utility(predictions)}
