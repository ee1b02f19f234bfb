"""The demo: cut down to a few steps, on a model of one's own, and whole, with the bounds that it promises."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from rfa_llm.cli import demo
from rfa_llm.evaluation import read_log, summary

CHECK = Path(__file__).parent.parent / "scripts" / "check_demo.py"


def run_demo(*words: str) -> None:
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    try:
        demo.main([*words, "--max_steps", "3", "--max_new_tokens", "8", "--use_cpu", "true"])
    finally:
        # Or what other tests of this process listen to were silent.
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        datasets.enable_progress_bars()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a demo cut down to 3 steps a training."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    run_demo("--output_dir", str(folder))
    return folder


def check_demo(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, CHECK, folder], capture_output=True, text=True, timeout=60)


def test_a_demo_leaves_data_models_adapter_and_figures(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results["summaries"]) == ["target", "unlearned", "retain-only"]
    for name, figures in results["summaries"].items():
        assert figures == summary(read_log(finished / f"{name}.json"))
        assert ("forget_quality" in figures) == (name != "retain-only")
    assert results["seconds"] > 0 and results["versions"]["torch"] == torch.__version__
    assert results["settings"]["rfa"]["shift"] == "local"

    # What a report draws: each step's losses and residuals.
    history = TrainerState.load_from_json(str(finished / "adapter" / "trainer_state.json")).log_history
    assert [entry["step"] for entry in history if "residual_retain/block_3" in entry] == [1, 2, 3]

    row = json.loads((finished / "data" / "forget.jsonl").read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(finished / "target")
    ids = tokenizer(row["answer"], return_tensors="pt").input_ids
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids[0]) == row["answer"]
    with torch.no_grad():
        before, base = (
            AutoModelForCausalLM.from_pretrained(finished / name)(ids).logits for name in ("target", "base")
        )
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(finished / "target"), finished / "adapter"
        )
        after = model(ids).logits
    assert not torch.allclose(before, base) and not torch.allclose(before, after)


def test_a_finished_demo_is_not_written_over(finished):
    with pytest.raises(ValueError, match="output_dir: .* is not empty; .*--overwrite_output_dir"):
        run_demo("--output_dir", str(finished))


def test_a_model_of_ones_own_forgets_without_any_training_of_models(finished, tmp_path, capsys):
    words = ["--output_dir", str(tmp_path), "--model", str(finished / "target"), "--data_dir", str(finished / "data")]
    run_demo(*words, "--teacher", str(finished / "base"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["rfa"]["shift"] == "ignorant"
    assert list(results["summaries"]) == ["target", "unlearned"]
    assert not any("forget_quality" in figures for figures in results["summaries"].values())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter",
        "results.json",
        "target.json",
        "unlearned.json",
    ]
    assert "retain-only" not in capsys.readouterr().out
    # The same folder again, now with a model to compare with.
    run_demo(*words, "--retain_model", str(finished / "retain"), "--overwrite_output_dir", "true")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["rfa"]["shift"] == "local"
    retain_only = json.loads((finished / "results.json").read_text())["summaries"]["retain-only"]
    assert results["summaries"]["retain-only"] == pytest.approx(retain_only)
    assert "forget_quality" in results["summaries"]["unlearned"]
    # What is mistyped costs nothing of it.
    salt = (tmp_path / "adapter" / "_forget_salt.txt").read_text()
    with pytest.raises(ValueError, match="^model: 'typo'"):
        run_demo(*words[:2], "--model", "typo", *words[4:], "--overwrite_output_dir", "true")
    assert (tmp_path / "adapter" / "_forget_salt.txt").read_text() == salt and (tmp_path / "results.json").exists()
    # Without one to compare with, no figures of the one before are left.
    run_demo(*words, "--overwrite_output_dir", "true")
    assert not (tmp_path / "retain-only.json").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "m"], "data_dir: model is given but not its data"),
        (["--data_dir", "d"], "model: data_dir is given but no model"),
        (["--retain_model", "r"], "model: retain_model is given but no model"),
        (["--model", "m", "--data_dir", "nowhere"], "data_dir 'nowhere' has no forget_perturbed.jsonl"),
        (["--model", "m", "--data_dir", "d", "--shift", "ignorant"], "teacher: shift='ignorant' needs"),
        (["--model", "m", "--data_dir", "d", "--shift", "local", "--teacher", "t"], "teacher: 't' is asked by shift="),
    ],
)
def test_what_does_not_fit_together_is_named_before_anything_is_written(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_demo("--output_dir", str(tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_a_retain_model_that_is_not_there_ends_it_before_the_training(finished, tmp_path):
    words = ["--model", str(finished / "target"), "--data_dir", str(finished / "data")]
    with pytest.raises(ValueError, match="^retain_model: 'typo'"):
        run_demo("--output_dir", str(tmp_path / "out"), *words, "--retain_model", "typo")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "forget_prob, model_utility, code",
    [(0.25, 0.77, 0), (0.259, 0.761, 0), (0.27, 0.8, 1), (0.1, 0.75, 1), (float("nan"), 0.8, 1)],
)
def test_check_demo_fails_where_a_bound_is_broken(forget_prob, model_utility, code, tmp_path):
    summaries = {
        "target": {"forget_prob": 0.9, "model_utility": 0.8},
        "unlearned": {"forget_prob": forget_prob, "model_utility": model_utility},
        "retain-only": {"forget_prob": 0.2, "model_utility": 0.8},
    }
    (tmp_path / "results.json").write_text(json.dumps({"summaries": summaries}))
    result = check_demo(tmp_path)
    assert result.returncode == code, result.stderr
    assert f"{forget_prob / 0.2:.3f} (at most 1.3)" in result.stdout
    assert f"{model_utility / 0.8:.3f} (at least 0.95)" in result.stdout
    assert ("BROKEN" in result.stdout) == bool(code)


def test_check_demo_names_what_is_missing(tmp_path):
    result = check_demo(tmp_path)
    assert result.returncode == 1 and "results.json is not there" in result.stderr
    (tmp_path / "results.json").write_text(json.dumps({"summaries": {"target": {}, "unlearned": {}}}))
    result = check_demo(tmp_path)
    assert result.returncode == 1 and "no retain-only model" in result.stderr


def test_the_whole_demo_keeps_its_bounds(tmp_path):
    """About two minutes on two cores."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "rfa_llm.cli.main", "demo", "--output_dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stderr[-2000:]
    assert str(folder / "adapter") in result.stdout and "retain-only" in result.stdout
    check = check_demo(folder)
    assert check.returncode == 0, check.stdout + check.stderr
    summaries = json.loads((folder / "results.json").read_text())["summaries"]
    assert summaries["target"]["forget_prob"] > 0.8
    assert summaries["retain-only"]["forget_prob"] < 0.3
