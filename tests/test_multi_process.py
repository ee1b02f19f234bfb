"""Two CPU processes and one train the same adapter, whatever the launch mode; failures end all; nothing is left."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from datasets import Dataset
from safetensors.torch import load_file

from rfa_llm.cli import unlearn
from rfa_llm.evaluation import answer_losses
from rfa_llm.shifts import SHIFTS

ROOT = Path(__file__).parent.parent
MODES = ["ddp", "fsdp2", "zero2", "zero3"]
SHARDED = {"fsdp2", "zero3"}
# What several processes need on the CPU beside a configuration that is made for GPUs.
ON_CPU = {
    "ddp": ["--use_cpu", "true"],
    "fsdp2": [],
    "zero2": ["--ddp_backend", "gloo"],
    "zero3": ["--ddp_backend", "gloo"],
}
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, a teacher for it, and rows of very different lengths."""
    folder = tmp_path_factory.mktemp("multi_process")
    for name, config in (("model", {}), ("teacher", {"initializer_range": 0.3})):
        tiny_llama(**config).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    draw = random.Random(0)
    for name, number in (("forget", 24), ("retain", 36)):
        rows = []
        for i in range(number):
            words = [f"w{draw.randrange(52)}" for _ in range(draw.choice([1, 2, 5, 40]))]
            rows.append({"question": f"{name} w{i} w{draw.randrange(52)} ?", "answer": " ".join(words)})
        Dataset.from_list(rows).to_json(folder / f"{name}.jsonl")
    # The words that the untrained model finds most likely, and others.
    rows = [{"question": "w0 w1 ?", "answer": f"w{word}"} for word in range(52)]
    losses = answer_losses(tiny_llama(), tiny_tokenizer(), rows)
    by_loss = [rows[word] for word in sorted(range(52), key=lambda word: losses[word])]
    for name, begin in (("familiar", 0), ("holdout", 8)):
        Dataset.from_list(by_loss[begin : begin + 8]).to_json(folder / f"{name}.jsonl")
    return folder


def words(folder: Path, output_dir: Path, **settings) -> list[str]:
    common = {
        "model_name_or_path": folder / "model",
        "forget_dataset": folder / "forget.jsonl",
        "retain_dataset": folder / "retain.jsonl",
        "output_dir": output_dir,
        "dtype": "float32",
        "max_steps": STEPS,
        "warmup_steps": 1,
        "learning_rate": 0.01,
        "lora_r": 4,
        "report_to": "none",
        "disable_tqdm": "true",
        "save_strategy": "no",
    }
    if settings.get("shift") == "ignorant":
        common["teacher"] = folder / "teacher"
    return [str(word) for key, value in {**common, **settings}.items() for word in (f"--{key}", value)]


def one_process(folder: Path, output_dir: Path, **settings) -> Path:
    """The same global batch of 4 forget rows in this process."""
    unlearn.main(words(folder, output_dir, per_device_train_batch_size=4, use_cpu="true", **settings))
    return output_dir


def start(command: list[str], tmp: Path, **environment) -> subprocess.CompletedProcess:
    tmp.mkdir(exist_ok=True)
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "TMPDIR": str(tmp)}
    return subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, **own, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def two_processes(mode: str, folder: Path, output_dir: Path, tmp: Path, **settings) -> Path:
    """The mode's own configuration, which is for GPUs, through `accelerate launch`; in float32 unless `dtype` says
    otherwise."""
    config = ["--config_file", f"configs/accelerate/{mode}.yaml"]
    if "dtype" not in settings:
        config += ["--mixed_precision", "no"]
    port = ["--main_process_port", "0"]
    arguments = words(folder, output_dir, per_device_train_batch_size=2, **settings) + ON_CPU[mode]
    done = start(["accelerate.commands.launch", *config, *port, "tests/multi_process_worker.py", *arguments], tmp)
    assert done.returncode == 0, done.stdout
    for rank in range(2):
        report = json.loads((output_dir / f"process_{rank}.json").read_text())
        assert report["hooks"] == 0
        assert report["held"] == pytest.approx(0.5, abs=0.02) if mode in SHARDED else report["held"] == 1
    return output_dir


def step_logs(output_dir: Path) -> list[dict]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in history if "loss" in entry]
    assert len(logs) == STEPS
    return logs


def assert_same_run(ours: Path, theirs: Path, tolerance: float) -> None:
    """Each logged figure of each step to `tolerance` of itself, the adapter to that of its norm, each matrix to ten.

    Adam makes a large part of a step out of the rounding of an entry that has next to no gradient: on one CPU a single
    entry was off by 2.5e-5 of its matrix's norm, where all losses agreed to 4e-7.
    """
    a, b = (load_file(path / "adapter_model.safetensors") for path in (ours, theirs))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.linalg.norm(a[name] - b[name]) <= 10 * tolerance * torch.linalg.norm(b[name]), name
    ours_whole, theirs_whole = (torch.cat([adapter[name].flatten() for name in a]) for adapter in (a, b))
    assert torch.linalg.norm(ours_whole - theirs_whole) <= tolerance * torch.linalg.norm(theirs_whole)
    for our, their in zip(step_logs(ours), step_logs(theirs), strict=True):
        for name in their:
            if name.startswith(("loss", "residual")):
                # Before the first step the residual is what cached features round otherwise.
                expected = pytest.approx(their[name], rel=tolerance, abs=1e-6)
                assert our[name] == expected, f"{name} of step {their['step']}"


def processes_of(output_dir: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(output_dir) in " ".join(p.info["cmdline"] or [])]


def assert_nothing_left(output_dir: Path, tmp: Path) -> None:
    assert not processes_of(output_dir)
    # torch's launcher leaves its empty log folders.
    assert not [path for path in tmp.rglob("*") if path.is_file()] and not list(output_dir.rglob("*.part*"))


@pytest.mark.parametrize(
    ("mode", "shift"), [("ddp", "local"), ("fsdp2", "ignorant"), ("zero2", "smoothed"), ("zero3", "ignorant")]
)
def test_the_cut_over_processes_changes_nothing(mode, shift, folder, tmp_path):
    # The last block is never called: block 2 is the last aligned one of four.
    settings = {"shift": shift, "blocks": 2, "next_token_weight": 0.0}
    alone = one_process(folder, tmp_path / "alone", **settings)
    tmp = tmp_path / "tmp"
    both = two_processes(mode, folder, tmp_path / "both", tmp, **settings)
    assert_same_run(both, alone, 1e-5)
    assert_nothing_left(both, tmp)


@pytest.mark.parametrize("mode", MODES)
def test_nor_do_accumulation_checkpointing_and_a_resume(mode, folder, tmp_path):
    settings = {"gradient_accumulation_steps": 3, "shift": "mean" if mode == "ddp" else "local"}
    settings["next_token_weight"] = 0.5
    if mode in ("ddp", "zero3"):
        settings["train_sampling_strategy"] = "group_by_length"
    alone = one_process(folder, tmp_path / "alone", **settings)
    settings |= {"gradient_checkpointing": "true", "save_strategy": "steps", "save_steps": 4}
    both = two_processes(mode, folder, tmp_path / "both", tmp_path / "tmp", **settings)
    assert_same_run(both, alone, 1e-5)
    # A known bug of a peer: under checkpointing, blocks whose input needs no gradient are never trained.
    adapter = load_file(both / "adapter_model.safetensors")
    assert all(weight.any() for weight in adapter.values())

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (both / name).rename(tmp_path / name)
    two_processes(mode, folder, both, tmp_path / "tmp", **settings, resume_from_checkpoint=both / "checkpoint-4")
    resumed = load_file(both / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.linalg.norm(resumed[name] - weight) <= 1e-6 * torch.linalg.norm(weight), name
    assert_nothing_left(both, tmp_path / "tmp")
    if mode != "ddp":
        # One process would look for the optimizer's state in vain, and begin a new one.
        with pytest.raises(ValueError, match="^launch: .* was trained with (ZeRO-|FSDP )"):
            one_process(folder, tmp_path / "other", **settings, resume_from_checkpoint=both / "checkpoint-4")


@pytest.mark.parametrize(
    "mode",
    ["fsdp2", "zero3", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.slow)],
)
def test_the_mixed_precision_of_the_configuration_works(mode, folder, tmp_path):
    alone = one_process(folder, tmp_path / "alone")
    both = two_processes(mode, folder, tmp_path / "both", tmp_path / "tmp", dtype="bfloat16")
    for our, their in zip(step_logs(both), step_logs(alone), strict=True):
        assert our["loss_forget"] == pytest.approx(their["loss_forget"], rel=0.05)
    assert all(weight.any() for weight in load_file(both / "adapter_model.safetensors").values())


@pytest.mark.slow
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_shift_under_every_mode(mode, shift, folder, tmp_path):
    alone = one_process(folder, tmp_path / "alone", shift=shift)
    assert_same_run(two_processes(mode, folder, tmp_path / "both", tmp_path / "tmp", shift=shift), alone, 1e-5)


@pytest.mark.parametrize(
    "mode",
    ["fsdp2", "zero3", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "level", ["holdout", *(pytest.param(n, marks=pytest.mark.slow) for n in ("goal", "retrained"))]
)
def test_looks_at_the_answers_and_the_scale_are_the_same_everywhere(level, mode, folder, tmp_path):
    settings = {"stop_at": "calibrated", "calibration_steps": 2, "forget_dataset": folder / "familiar.jsonl"}
    if level == "holdout":
        # Looks run the whole model, steps all but its last block.
        settings |= {"holdout_dataset": folder / "holdout.jsonl", "blocks": 2}
    else:
        settings["shift"] = "ignorant"
    if level == "retrained":
        settings["holdout_dataset"] = folder / "holdout.jsonl"
    alone = one_process(folder, tmp_path / "alone", **settings)
    both = two_processes(mode, folder, tmp_path / "both", tmp_path / "tmp", **settings)
    ours, theirs = (
        [
            (entry["step"], entry["forget_answer_loss"], entry[f"{level}_answer_loss"], entry.get("adapter_scale", 1))
            for entry in json.loads((path / "trainer_state.json").read_text())["log_history"]
            if "forget_answer_loss" in entry
        ]
        for path in (both, alone)
    )
    assert len(ours) > 1 or level != "holdout"
    assert ours[-1][-1] != 1
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-5)
    a, b = (load_file(path / "adapter_model.safetensors") for path in (both, alone))
    for name in a:
        assert torch.linalg.norm(a[name] - b[name]) <= 1e-4 * torch.linalg.norm(b[name]), name


@pytest.mark.parametrize("mode", ["fsdp2", "zero3"])
def test_the_last_good_adapter_is_put_together_from_its_shards(mode, folder, tmp_path):
    settings = {"learning_rate": 1e30, "warmup_steps": 2, "shift": "negate"}
    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        one_process(folder, tmp_path / "alone", **settings)
    with pytest.raises(AssertionError, match="not finite at step 3; .* \\(after step 1\\) is in"):
        two_processes(mode, folder, tmp_path / "both", tmp_path / "tmp", **settings)
    alone, both = (
        load_file(tmp_path / name / "last_good_adapter" / "adapter_model.safetensors") for name in ("alone", "both")
    )
    assert alone.keys() == both.keys()
    assert all(torch.equal(alone[name], both[name]) for name in alone)
    assert any(weight.any() for weight in both.values())


@pytest.mark.parametrize(("mode", "processes"), [("ddp_cpu", 2), ("zero3_cpu", 2), ("own", 1)])
def test_the_command_launches_itself(mode, processes, folder, tmp_path):
    out, tmp = tmp_path / "both", tmp_path / "tmp"
    launch = [mode]
    if mode == "own":
        launch = [shutil.copy("configs/accelerate/ddp_cpu.yaml", tmp_path / "own.yaml"), "--num_processes", "1"]
    arguments = words(folder, out, per_device_train_batch_size=2, max_steps=2, shift="negate")
    done = start(["rfa_llm.cli.main", "unlearn", "--accelerate_config", *map(str, launch), *arguments], tmp)
    assert done.returncode == 0, done.stdout
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    peaks = {name for name in history[-1] if name.startswith("peak_bytes/")}
    assert peaks == {f"peak_bytes/process_{rank}" for rank in range(processes)}
    # Once, by the first process.
    assert done.stdout.count("process 0 on cpu") == done.stdout.count(f"Adapter saved to {out}.") == 1
    assert_nothing_left(out, tmp)
    assert not list(tmp.iterdir())


def test_a_failure_on_one_rank_ends_the_others(folder, tmp_path):
    out, tmp = tmp_path / "both", tmp_path / "tmp"
    config = ["--config_file", "configs/accelerate/ddp_cpu.yaml", "--main_process_port", "0"]
    arguments = words(folder, out, per_device_train_batch_size=2, use_cpu="true", max_steps=100)
    begin = time.monotonic()
    command = ["accelerate.commands.launch", *config, "tests/multi_process_worker.py", *arguments]
    done = start(command, tmp, FAIL_ON_RANK="1")
    assert done.returncode != 0 and time.monotonic() - begin < 60
    assert "the disk of process 1 is full" in done.stdout
    assert_nothing_left(out, tmp)


def test_a_signal_to_the_command_ends_all_processes(folder, tmp_path):
    out = tmp_path / "both"
    arguments = words(
        folder, out, per_device_train_batch_size=2, max_steps=100_000, save_strategy="steps", save_steps=1
    )
    command = [sys.executable, "-m", "rfa_llm.cli.main", "unlearn", "--accelerate_config", "ddp_cpu", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.terminate()
    assert process.wait(timeout=60) != 0
    assert not processes_of(out)


def test_processes_that_are_not_connected_are_refused(folder, tmp_path):
    # Without --use_cpu accelerate would let each of the two train alone.
    config = ["--config_file", "configs/accelerate/ddp_cpu.yaml", "--main_process_port", "0"]
    arguments = words(folder, tmp_path / "both", per_device_train_batch_size=2)
    done = start(["accelerate.commands.launch", *config, "scripts/unlearn.py", *arguments], tmp_path / "tmp")
    assert done.returncode != 0
    assert "2 processes were started, but they are not connected" in done.stdout


def test_an_unknown_accelerate_config_is_named(tmp_path):
    done = start(["rfa_llm.cli.main", "unlearn", "--accelerate_config", "zero9"], tmp_path / "tmp")
    assert done.returncode == 1
    assert "accelerate_config: 'zero9' is neither a file nor one of ddp, ddp_cpu, fsdp2," in done.stdout
