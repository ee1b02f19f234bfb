"""benchmarks/speed.py: every method runs on a tiny shape, its batches are the trainer's, and its sums are right."""

import math

import pytest
import speed
import torch
from gpu import StepClock
from memory import shape_config
from transformers import AutoModelForCausalLM

TASK = {"shape": "tiny", "tokens": 16, "pairs": 2, "rows": 6, "warmup": 3, "steps": 5}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the figures here are those of a CPU run")


@pytest.fixture(scope="module")
def runs() -> dict[str, dict]:
    return {method: speed.measure({**TASK, "method": method}) for method in speed.METHODS}


def test_every_method_is_measured_from_the_second_epoch_on(runs):
    for run in runs.values():
        assert len(run["seconds_per_step"]) == 2 and all(seconds > 0 for seconds in run["seconds_per_step"])
        assert run["seconds_in_all"] > sum(run["seconds_per_step"])
        assert run["positions_of_first_step"] == 4 * 16


def test_operations_are_those_that_the_method_needs(runs):
    flops = {method: run["flops_of_first_step"] for method, run in runs.items()}
    # The adapter is as large as the model at this size, so methods on LoRA need more than full fine-tuning.
    assert flops["floor"] < flops["rfa"] < flops["rfa_default_blocks"] < flops["npo"]
    assert flops["rfa"] == flops["rfa_random_order"] < flops["rfa_without_cache"]
    # The blocks' linear layers there and back, and attention's two products over all 16 positions of 64 numbers, each
    # with a gradient for both of its factors; two blocks of five, on 64 tokens.
    config = shape_config("tiny")
    linear = 64 * (64 * 2 + 32 * 2 + 160 * 3)
    assert config.hidden_size == 64 and config.intermediate_size == 160
    assert flops["floor"] == 64 * 2 * (linear * 4 + 2 * 16 * 64 * 2 * 3)


def test_the_batches_of_loops_are_those_of_trainers(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape_config("tiny"))
    task = {**TASK, "method": "rfa"}
    ours = list(speed.the_trainers_batches(task, model))
    seen = []
    trainer = speed.make_trainer(task, model, str(tmp_path), StepClock(torch.device("cpu")))
    compute_loss = trainer.compute_loss

    def keep(model, inputs, **kwargs):
        seen.append(inputs["input_ids"])
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = keep
    trainer.train()
    assert len(ours) == len(seen) == 5
    for a, b in zip(ours, seen, strict=True):
        assert torch.equal(a["input_ids"], b)


def test_the_exponent_is_the_slope_of_the_logarithms():
    assert speed.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert speed.exponent([10, 100], [math.sqrt(10), 10]) == pytest.approx(0.5)
