"""The evaluation on the way changes nothing of the training; trackers get every figure under its name; the picture."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_llama, tiny_lora, tiny_rows, tiny_tokenizer
from datasets import Dataset
from peft import get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from trl import TrlParser

from rfa_llm import RFAConfig, TofuEvaluationCallback, evaluate_tofu
from rfa_llm.callbacks import draw_residuals
from rfa_llm.evaluation import answer_losses, summary

ROOT = Path(__file__).parent.parent
SHORT = {"max_new_tokens": 4, "batch_size": 4}


def question_sets() -> dict[str, Dataset]:
    def rows(first: int, paraphrased: bool) -> Dataset:
        plain = tiny_rows(3, first)
        more = {"paraphrased_answer": [f"w{first + i} {row['answer']}" for i, row in enumerate(plain)]}
        for name, values in (more if paraphrased else {}).items():
            plain = plain.add_column(name, values)
        return plain.add_column("perturbed_answer", [[f"w{first} w1", "w2"], ["w3"], ["w4 w5 w6", "w7"]])

    paraphrased = {"forget": 0, "retain": 20}
    return {name: rows(first, True) for name, first in paraphrased.items()} | {
        name: rows(first, False) for name, first in {"real_authors": 40, "world_facts": 45}.items()
    }


@pytest.fixture(scope="module")
def retain_log() -> dict:
    return evaluate_tofu(tiny_llama(), tiny_tokenizer(), question_sets(), **SHORT)


def figures(trainer) -> dict[int, dict]:
    """What the callback has logged, by step."""
    logs = [log for log in trainer.state.log_history if "tofu/model_utility" in log]
    assert len({log["step"] for log in logs}) == len(logs)
    return {
        log["step"]: {name.removeprefix("tofu/"): value for name, value in log.items() if name.startswith("tofu/")}
        for log in logs
    }


def random_state() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


CONFIG = {"max_steps": 6, "logging_steps": 2, "lr_scheduler_type": "constant"}


def test_the_evaluation_is_logged_and_changes_nothing_of_the_training(make_trainer, retain_log):
    adapters, logs, generators = [], [], []
    for evaluates in (True, False):
        # The dropout draws from the random generator.
        trainer = make_trainer(CONFIG, peft_config=tiny_lora(lora_dropout=0.1))
        if evaluates:
            sets = question_sets()
            trainer.add_callback(TofuEvaluationCallback(trainer, sets, steps=3, retain_log=retain_log, **SHORT))
        trainer.train()
        generators.append(random_state())
        adapters.append({name: p.detach() for name, p in trainer.model.named_parameters() if "lora_" in name})
        own = ("loss", "loss_forget", "residual_forget/block_3", "residual_retain/block_3", "grad_norm", "step")
        logs.append([[log[name] for name in own] for log in trainer.state.log_history if "loss" in log])
        assert trainer.model.training and all(module.training for module in trainer.model.modules())
        assert all(p.requires_grad == ("lora_" in name) for name, p in trainer.model.named_parameters())
        if not evaluates:
            assert not figures(trainer)
            continue
        logged = figures(trainer)
        # The last step is one of every two logged ones too, and of every three evaluated ones.
        assert list(logged) == [3, 6]
        expected = summary(evaluate_tofu(trainer.model, tiny_tokenizer(), sets, retain_log=retain_log, **SHORT))
        assert "forget_quality" in expected and logged[6] == expected != logged[3]
    for name, weight in adapters[0].items():
        assert weight.any() and torch.equal(weight, adapters[1][name]), name
    assert [log[-1] for log in logs[0]] == [2, 4, 6] and logs[0] == logs[1]
    assert generators[0] == generators[1]


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.parametrize(("max_steps", "stop", "steps"), [(5, 99, [2, 4, 5]), (9, 5, [2, 4, 5]), (9, 4, [2, 4])])
def test_the_end_is_evaluated_once_whatever_ends_the_training(max_steps, stop, steps, make_trainer):
    trainer = make_trainer({**CONFIG, "max_steps": max_steps})
    trainer.add_callback(TofuEvaluationCallback(trainer, question_sets(), steps=2, **SHORT))
    trainer.add_callback(StopAt(stop))
    trainer.train()
    assert list(figures(trainer)) == steps
    # Without a retain log there is nothing to compare with.
    assert not any("forget_quality" in of_step for of_step in figures(trainer).values())


def test_speed_in_the_log_of_each_step_is_no_end(make_trainer):
    trainer = make_trainer({**CONFIG, "max_steps": 3, "include_num_input_tokens_seen": "all"})
    trainer.add_callback(TofuEvaluationCallback(trainer, question_sets(), steps=2, **SHORT))
    trainer.train()
    assert all("train_runtime" in log for log in trainer.state.log_history if "loss" in log)
    assert list(figures(trainer)) == [2, 3]


class StopAfterAll(TrainerCallback):
    """Ends a training at the last event of an epoch that callbacks see."""

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_an_end_after_every_other_event_is_evaluated_while_the_trackers_are_open(make_trainer):
    trainer = make_trainer({**CONFIG, "save_strategy": "epoch", "report_to": "tensorboard"})
    trainer.add_callback(TofuEvaluationCallback(trainer, question_sets(), steps=2, **SHORT))
    trainer.add_callback(StopAfterAll())
    trainer.train()
    # An epoch has three steps.
    assert list(figures(trainer)) == [2, 3]
    scalars = scalars_of(trainer)
    assert scalars["train/tofu/model_utility"] == pytest.approx(
        {step: of_step["model_utility"] for step, of_step in figures(trainer).items()}, rel=1e-6
    )


def test_an_evaluation_leaves_the_calibrations_look_to_the_log_of_the_step(make_trainer):
    # The answers that the untrained model finds less likely are the holdout set.
    sets = [tiny_rows(3, first=0), tiny_rows(3, first=40)]
    likely, unlikely = sorted(
        sets, key=lambda rows: np.mean(answer_losses(tiny_llama(), tiny_tokenizer(), list(rows)))
    )
    config = {"stop_at": "calibrated", "calibration_steps": 1, "max_steps": 2, "learning_rate": 1e-4}
    trainer = make_trainer(config, forget_dataset=likely, holdout_dataset=unlikely)
    trainer.add_callback(TofuEvaluationCallback(trainer, question_sets(), steps=1, **SHORT))
    trainer.train()
    assert list(figures(trainer)) == [1, 2]
    looks = [log for log in trainer.state.log_history if "forget_answer_loss" in log and "train_runtime" not in log]
    assert [log["step"] for log in looks] == [1, 2] and all("loss" in log for log in looks)


def test_an_evaluation_thaws_no_weight_of_the_adapter():
    model = get_peft_model(tiny_llama(), tiny_lora(target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    log = evaluate_tofu(model, tiny_tokenizer(), question_sets(), **SHORT)
    # The pass that takes the adapter off did run.
    assert "forget_Q_A_perplexity" in log
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_diverged_adapter_ends_as_without_evaluations(make_trainer, caplog):
    trainer = make_trainer({"learning_rate": 1e30})
    trainer.add_callback(TofuEvaluationCallback(trainer, question_sets(), steps=1, **SHORT))
    with caplog.at_level("WARNING"), pytest.raises(FloatingPointError):
        trainer.train()
    assert (Path(trainer.args.output_dir) / "last_good_adapter").exists()
    assert "No TOFU figures of step 1: the model's loss on row" in caplog.text


def test_bad_input_is_named_before_the_training(make_trainer, retain_log):
    trainer, sets = make_trainer(), question_sets()
    with pytest.raises(ValueError, match="^steps: 0 is not positive; give the number of steps between"):
        TofuEvaluationCallback(trainer, sets, steps=0)
    with pytest.raises(ValueError, match="^the question set 'retain' is missing"):
        TofuEvaluationCallback(trainer, {"forget": sets["forget"]}, steps=1)
    with pytest.raises(ValueError, match="^retain_log: 'nowhere.json' is no file; give a log of"):
        TofuEvaluationCallback(trainer, sets, steps=1, retain_log="nowhere.json")
    with pytest.raises(ValueError, match="^retain_log has 3 truth ratios but the forget set has 2"):
        TofuEvaluationCallback(
            trainer, {**sets, "forget": sets["forget"].select([0, 2])}, steps=1, retain_log=retain_log
        )


def scalars_of(trainer) -> dict[str, dict[int, float]]:
    """What TensorBoard has: tag -> step -> value."""
    # One file: nothing has come after the writer was closed.
    (file,) = Path(trainer.args.output_dir, "runs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_figure_under_its_name(make_trainer, retain_log):
    trainer = make_trainer({"report_to": "tensorboard", "blocks": [1, 3]})
    trainer.add_callback(TofuEvaluationCallback(trainer, question_sets(), steps=2, retain_log=retain_log, **SHORT))
    trainer.train()
    read = scalars_of(trainer)
    every_step = ["loss_forget", "loss_retain"]
    every_step += [f"residual_{name}/block_{block}" for name in ("forget", "retain") for block in (1, 3)]
    sometimes = [f"tofu/{name}" for name in summary(retain_log)] + ["tofu/forget_quality"]
    for names, steps in ((every_step, [1, 2, 3]), (sometimes, [2, 3])):
        for name in names:
            logged = {log["step"]: log[name] for log in trainer.state.log_history if name in log}
            assert read[f"train/{name}"] == pytest.approx(logged, rel=1e-6) and list(logged) == steps, name


@pytest.mark.parametrize(("words", "space"), [([], False), (["--trackio_static_space_id", "me/runs"], "me/runs")])
def test_a_push_takes_a_tracked_run_along_only_where_it_is_named(words, space, tmp_path):
    # None, transformers' default, would make a public Space of the run.
    (args,) = TrlParser((RFAConfig,)).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--use_cpu", "true", *words]
    )
    assert args.trackio_static_space_id == space


def test_the_picture_shows_the_figures_of_the_log():
    history = [{"step": s, "residual_forget/block_1": s / 10, "residual_retain/block_1": s / 100} for s in (1, 2)]
    history += [{"step": 2, "tofu/model_utility": 0.5}]
    history += [{"step": 3, "residual_forget/block_1": 0.3, "residual_forget/block_3": 0.7}]
    forget, retain = draw_residuals(history).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in forget.get_lines()}
    assert lines == {"block 1": [[1, 0.1], [2, 0.2], [3, 0.3]], "block 3": [[3, 0.7]]}
    assert [line.get_xydata().tolist() for line in retain.get_lines()] == [[[1, 0.01], [2, 0.02]]]
    assert forget.get_ylim() == retain.get_ylim() and forget.get_ylim()[0] == 0
    assert forget.get_title() == "forget set" and retain.get_title() == "retain set"
    assert forget.get_xlabel() == retain.get_xlabel() == "training step" and "R_b" in forget.get_ylabel()
    # The branch residual is not measured on the retain set.
    (alone,) = draw_residuals(history[-1:]).axes
    assert alone.get_title() == "forget set"
    with pytest.raises(
        ValueError, match="^history: none of its 1 entries has residuals; .* with logging_steps at most"
    ):
        draw_residuals([{"step": 2, "tofu/model_utility": 0.5}])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero3"])
def test_two_processes_log_the_figures_of_one(mode, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (("forget", tiny_rows(8, 0)), ("retain", tiny_rows(10, 20))):
        rows.to_json(tmp_path / f"{name}.jsonl")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    worker = ["tests/callbacks_worker.py", str(tmp_path)]
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{mode}.yaml"]
    launch += ["--mixed_precision", "no", "--main_process_port", "0"]
    for command in ([*worker, "alone", "4"], [*launch, *worker, "both", "2"]):
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
    alone, both = (
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("alone", "both")
    )
    assert [log["step"] for log in both] == [log["step"] for log in alone] == [1, 2, 2, 3, 3, 3]
    assert sum("tofu/model_utility" in log for log in both) == 2
    for ours, theirs in zip(both, alone, strict=True):
        for name in theirs:
            if name.startswith(("tofu/", "loss", "residual_")):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
