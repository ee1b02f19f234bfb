"""benchmarks/gpu.py on the CPU: it runs, its figures hang together, and its comparison with float32 finds mistakes."""

import json
import math
import statistics

import gpu
import memory
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the figures here are those of a CPU run")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    gpu.main(["--shapes", "tiny", "--rows", "2", "--tokens", "32", "--steps", "2", "--output", str(output)])
    return json.loads(output.read_text())


@pytest.mark.parametrize("index", [0, 1])
def test_figures_of_a_run_hang_together(result, index):
    run = result["runs"][index]
    assert run["quantization"] == ["none", "nf4"][index]
    assert run["tokens_per_step"] == 2 * 2 * 32
    assert len(run["seconds_per_step"]) == 2
    median = statistics.median(run["seconds_per_step"])
    assert run["tokens_per_second"] == pytest.approx(128 / median)
    achieved = sum(run["flops_per_step"].values()) / median
    assert run["model_flops_utilization"] == pytest.approx(achieved / result["peak_flops"])
    assert 0 < run["model_flops_utilization"] < 1
    # The first step's adapter does nothing yet; the later ones' does.
    assert run["loss_retain"][0] == 0 < run["loss_retain"][1]
    assert len(run["loss_forget"]) == gpu.WARMUP + 2
    assert all(math.isfinite(loss) for loss in run["loss_forget"])


def test_a_cpu_run_says_what_it_is(result):
    assert result["device"] == "CPU"
    assert "no GPU figure" in result["note"]


@pytest.mark.parametrize("index", [0, 1])
def test_bf16_and_nf4_agree_with_float32(result, index):
    check = result["checks"][index]
    assert check["quantization"] == ["none", "nf4"][index]
    assert check["relative_errors"].keys() == gpu.BOUNDS.keys()
    for name, error in check["relative_errors"].items():
        # Not 0, or the reference would be the same run.
        assert 0 < error < gpu.BOUNDS[name]
    # A residual of some size, so that the comparison is about more than rounding.
    assert 0.1 < check["float32_losses"]["loss_retain"] < 1


def test_comparison_finds_a_weight_that_is_a_tenth_too_large(monkeypatch):
    build, built = gpu.build_model, []

    def build_wrong(*args):
        model = build(*args)
        if built:
            model.model.layers[2].mlp.down_proj.weight.data *= 1.1
        built.append(model)
        return model

    monkeypatch.setattr(gpu, "build_model", build_wrong)
    assert gpu.check("none", CPU, "bf16")["relative_errors"]["gradient"] > gpu.BOUNDS["gradient"]


def test_flops_are_those_that_pytorch_counts(tmp_path):
    config = memory.shape_config("tiny")
    trainer = gpu.build_trainer(
        gpu.build_model(config, "none", CPU), str(tmp_path), 2, 32, 1, TrainerCallback(), bf16=True, use_cpu=True
    )
    # The counter knows attention by its matrix products, not by the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.train()
    # What the first block's backward pass leaves out: 128 tokens, 2 h (a + 2k + 3r).
    left_out = 128 * 2 * 64 * (64 + 2 * 32 + 3 * 32)
    count = memory.count_parameters(config)
    assert counter.get_total_flops() == sum(gpu.step_flops(config, count, 2, 32).values()) - left_out


def test_a_gpu_of_unknown_peak_rate_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU of tomorrow")
    with pytest.raises(ValueError, match="'A GPU of tomorrow'; give --peak_tflops"):
        gpu.peak_flops(torch.device("cuda:0"))
