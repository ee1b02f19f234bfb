from __future__ import annotations

import copy
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import learn_by_heart, perturb, tiny_llama, tiny_lora, tiny_rows
from peft import IA3Config, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from rfa_llm import calibration
from rfa_llm.calibration import StopWhenCalibrated
from rfa_llm.checkpoints import newest_whole_checkpoint
from rfa_llm.cli.unlearn import stop_report
from rfa_llm.data.formats import encode, prepare
from rfa_llm.evaluation.scores import BrokenModelError, answer_losses

HOLDOUT = tiny_rows(5, first=40)


@pytest.fixture
def knowing(tokenizer, forget, retain):
    """A tiny Llama that has learnt the forget and the retain rows by heart."""
    model = tiny_llama()
    learn_by_heart(model, tokenizer, [*forget, *retain])
    return model


@torch.no_grad()
def naive_loss(model, tokenizer, rows) -> float:
    losses = []
    for row in rows:
        encoded = encode(row, tokenizer)
        ids, start = torch.tensor(encoded["input_ids"]), encoded["answer_start"]
        log_probs = model(ids[None]).logits[0].double().log_softmax(-1)
        losses.append(fmean(-log_probs[t - 1, ids[t]].item() for t in range(start, len(ids))))
    return fmean(losses)


CONFIG = {"stop_at": "calibrated", "calibration_steps": 2, "max_steps": 80, "alpha": 0.5}


def looks(trainer) -> dict[int, float]:
    """The forget set's loss at each look."""
    logs = [log for log in trainer.state.log_history if "forget_answer_loss" in log and "loss" in log]
    return {log["step"]: log["forget_answer_loss"] for log in logs}


@pytest.mark.parametrize(
    "more",
    [
        {"save_strategy": "no", "logging_steps": 7},
        {"save_strategy": "epoch"},
        {"save_strategy": "steps", "save_steps": 60},
    ],
)
def test_the_training_ends_where_forget_answers_look_unseen(more, knowing, make_trainer, tokenizer, forget):
    trainer = make_trainer({**CONFIG, **more}, model=knowing, holdout_dataset=HOLDOUT)
    metrics = trainer.train().metrics
    with trainer.model.disable_adapter():
        unseen = naive_loss(trainer.model, tokenizer, HOLDOUT)
        assert naive_loss(trainer.model, tokenizer, forget) < 0.5 * unseen
    assert metrics["holdout_answer_loss"] == pytest.approx(unseen, rel=1e-5)
    scaled = naive_loss(trainer.model, tokenizer, forget)
    steps = trainer.state.global_step
    assert metrics["forget_answer_loss"] == looks(trainer)[steps] == pytest.approx(scaled, rel=1e-5)

    # The last step went too far; what it went too far was taken back.
    assert steps < 80 and list(looks(trainer)) == list(range(2, steps + 1, 2))
    assert scaled == pytest.approx(unseen, rel=0.02)
    assert all(loss < unseen for step, loss in looks(trainer).items() if step != steps)
    assert 0 < metrics["adapter_scale"] < 1
    with rescale_adapter_scale(trainer.model, 1 / metrics["adapter_scale"]):
        assert naive_loss(trainer.model, tokenizer, forget) > max(unseen, scaled)
    if more["save_strategy"] == "no":
        assert newest_whole_checkpoint(trainer.args.output_dir) is None
    else:
        assert newest_whole_checkpoint(trainer.args.output_dir).endswith(f"checkpoint-{steps}")


def test_an_adapter_that_fell_short_is_made_stronger(knowing, make_trainer, tokenizer, forget, caplog, tmp_path):
    short = {**CONFIG, "max_steps": 5, "learning_rate": 2e-3, "save_strategy": "steps", "save_steps": 5}
    trainer = make_trainer(short, model=knowing, holdout_dataset=HOLDOUT)
    with caplog.at_level("WARNING"):
        metrics = trainer.train().metrics
    assert trainer.state.global_step == 5 and "stop_at" not in caplog.text
    assert 1 < metrics["adapter_scale"] <= 2
    assert metrics["forget_answer_loss"] == pytest.approx(metrics["holdout_answer_loss"], rel=0.02)
    said = stop_report(trainer.state)
    assert f"Ended at step 5 of 5; then the adapter's effect was multiplied by {metrics['adapter_scale']:.3f}" in said
    assert f"holdout_answer_loss, which stands for ignorance, is {metrics['holdout_answer_loss']:.3f}." in said
    # In the weights themselves: whoever loads what was saved has it.
    for saved in (newest_whole_checkpoint(trainer.args.output_dir), str(tmp_path / "saved")):
        if saved.endswith("saved"):
            trainer.save_model(saved)
        loaded = PeftModel.from_pretrained(trainer.model.get_base_model(), saved, adapter_name="loaded")
        loaded.set_adapter("loaded")
        assert naive_loss(loaded, tokenizer, forget) == pytest.approx(metrics["forget_answer_loss"], rel=1e-5)


def test_an_end_far_before_that_is_said(knowing, make_trainer, caplog):
    with caplog.at_level("WARNING"):
        slowly = {**CONFIG, "max_steps": 3, "learning_rate": 2e-3}
        trainer = make_trainer(slowly, model=knowing, holdout_dataset=HOLDOUT)
        metrics = trainer.train().metrics
    # The last step is looked at whatever its number.
    reached = looks(trainer)[3]
    assert reached != looks(trainer)[2] and metrics["forget_answer_loss"] == reached
    assert metrics["adapter_scale"] == 1
    assert f"ended with the forget set's answers at a loss of {reached:.3f} nats a token, where" in caplog.text


@pytest.mark.parametrize("level", ["holdout", "goal"])
def test_the_looks_change_nothing_of_the_training(level, knowing, make_trainer, tmp_path):
    for name, model in (("model", knowing), ("teacher", tiny_llama())):
        model.save_pretrained(tmp_path / name)
    more = {} if level == "holdout" else {"shift": "ignorant", "teacher": str(tmp_path / "teacher")}
    adapters = []
    for stop_at in ("calibrated", None):
        trainer = make_trainer(
            {**CONFIG, "stop_at": stop_at, "max_steps": 3, "learning_rate": 2e-3, **more},
            model=str(tmp_path / "model"),
            peft_config=tiny_lora(lora_dropout=0.1),
            holdout_dataset=HOLDOUT if stop_at and level == "holdout" else None,
        )
        # Too few steps for a scale.
        assert trainer.train().metrics.get("adapter_scale", 1.0) == 1
        adapters.append({name: p for name, p in trainer.model.named_parameters() if "lora_" in name})
    for name, weight in adapters[0].items():
        assert weight.any() and torch.equal(weight, adapters[1][name]), name


class Curve(StopWhenCalibrated):
    """Stands for a model whose forget loss is a function of its adapter's scale."""

    def __init__(self, curve, level):
        super().__init__(None, lambda model: level, "holdout_answer_loss", 1, 1)
        self.curve, self._level = curve, level

    def _loss(self, args, model):
        return self.curve(next(m for m in model.modules() if isinstance(m, LoraLayer)).scaling["default"] / 2)


def too_much(factor):
    if factor > 1.3:
        raise BrokenModelError("NaN")
    return factor


@pytest.mark.parametrize(
    ("curve", "level", "expected"),
    [
        (lambda factor: factor, 1.7, 1.7),
        (lambda factor: factor**3, 0.2, 0.2 ** (1 / 3)),
        # It comes to the level and falls back.
        (lambda factor: 2 - (factor - 1.4) ** 2, 1.95, 1.4 - 0.05**0.5),
        (too_much, 1.2, 1.2),
        (too_much, 1.4, 1),
        (lambda factor: factor, 2.5, 1),
        # There is something beside what is scaled.
        (lambda factor: 2 + factor, 1.5, 1),
    ],
)
def test_the_scale_is_where_the_loss_is_the_level(curve, level, expected):
    model = get_peft_model(tiny_llama(), tiny_lora())
    perturb(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    callback = Curve(curve, level)
    factor = callback._scale(None, model, callback._loss(None, model))
    assert factor == pytest.approx(expected, abs=0.02) if expected != 1 else factor == 1
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (factor if "lora_B" in name else 1))


class StopAt3(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == 3


@pytest.mark.parametrize("before", [True, False])
def test_a_training_that_something_else_ends(before, knowing, make_trainer, tokenizer, forget, caplog):
    config = {**CONFIG, "calibration_steps": 2, "learning_rate": 4e-3}
    callbacks = [StopAt3()] if before else []
    trainer = make_trainer(config, model=knowing, holdout_dataset=HOLDOUT, callbacks=callbacks)
    if not before:
        trainer.add_callback(StopAt3())
    with caplog.at_level("WARNING"):
        metrics = trainer.train().metrics
    assert trainer.state.global_step == 3
    if before:
        assert metrics["adapter_scale"] > 0
        assert metrics["forget_answer_loss"] == pytest.approx(naive_loss(trainer.model, tokenizer, forget), rel=1e-5)
    else:
        assert "something else ended the training at step 3" in caplog.text


@pytest.mark.parametrize("max_steps", [5, 80])
def test_a_run_that_had_ended_is_left_as_it_is(max_steps, knowing, make_trainer):
    config = {**CONFIG, "learning_rate": 4e-3, "save_strategy": "steps", "save_steps": 50, "max_steps": max_steps}
    config["save_steps"] = min(50, max_steps)
    adapters, metrics = [], []
    for resume in (None, True):
        trainer = make_trainer(config, model=copy.deepcopy(knowing), holdout_dataset=HOLDOUT)
        metrics.append(trainer.train(resume_from_checkpoint=resume).metrics)
        adapters.append({name: p for name, p in trainer.model.named_parameters() if "lora_" in name})
        adapters[-1]["steps"] = torch.tensor(trainer.state.global_step)
    for name, weight in adapters[0].items():
        assert torch.equal(weight, adapters[1][name]), name
    for name in ("adapter_scale", "forget_answer_loss", "holdout_answer_loss"):
        assert metrics[0][name] == metrics[1][name]


def test_a_run_that_ended_short_of_its_level_does_not_go_on(knowing, make_trainer):
    config = {**CONFIG, "learning_rate": 4e-3, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = make_trainer(config, model=copy.deepcopy(knowing), holdout_dataset=HOLDOUT)
    assert trainer.train().metrics["forget_answer_loss"] < 0.9 * trainer._holdout_answer_loss(trainer.model)
    longer = make_trainer({**config, "max_steps": 8}, model=copy.deepcopy(knowing), holdout_dataset=HOLDOUT)
    with pytest.raises(ValueError, match="^resume_from_checkpoint: the run had come to its end at step 2, short of"):
        longer.train(resume_from_checkpoint=True)


def test_a_scale_that_did_not_come_back_is_refused(knowing, make_trainer):
    """As under ZeRO-3, whose optimizer puts back the weights that were not scaled."""
    config = {**CONFIG, "learning_rate": 4e-3, "save_strategy": "steps", "save_steps": 50, "max_steps": 50}
    trainer = make_trainer(config, model=copy.deepcopy(knowing), holdout_dataset=HOLDOUT)
    trainer.train()
    (saved,) = Path(trainer.args.output_dir).glob("checkpoint-*/adapter_model.safetensors")
    weights = load_file(saved)
    save_file({name: 0.5 * tensor if "lora_B" in name else tensor for name, tensor in weights.items()}, saved)
    again = make_trainer(config, model=copy.deepcopy(knowing), holdout_dataset=HOLDOUT)
    with pytest.raises(
        ValueError, match="^resume_from_checkpoint: .* does not come back under this launch mode; take"
    ):
        again.train(resume_from_checkpoint=True)


def test_a_look_is_at_rows_from_all_of_a_large_set(knowing, tokenizer, forget, monkeypatch):
    monkeypatch.setattr(calibration, "LOOK_ROWS", 3)
    rows = prepare(forget, tokenizer, "forget_dataset", None)
    losses = answer_losses(knowing, tokenizer, [forget[index] for index in (0, 2, 4)])
    assert calibration.answer_loss(knowing, rows, 4, "") == pytest.approx(fmean(losses), rel=1e-5)


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("style_correction", [True, False])
def test_with_a_teacher_the_level_is_that_of_the_shifted_features(
    style_correction, tokens, knowing, make_trainer, tokenizer, forget, tmp_path
):
    teacher = tiny_llama()
    for name, model in (("model", knowing), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
    config = {"shift": "ignorant", "teacher": str(tmp_path / "teacher"), "style_correction": style_correction}
    trainer = make_trainer({**CONFIG, **config, "forget_tokens": tokens}, model=str(tmp_path / "model"))
    metrics = trainer.train().metrics

    seen, losses = {}, []
    teacher.model.layers[-1].register_forward_hook(lambda module, args, output: seen.update(last=output))
    with torch.no_grad():
        for row in forget:
            encoded = encode(row, tokenizer)
            ids, start = torch.tensor(encoded["input_ids"]), encoded["answer_start"]
            teacher(ids[None])
            goal = seen["last"].reshape(len(ids), -1)
            if style_correction:
                style = trainer._method_state()[-1]
                goal = goal + goal @ style[:-1] + style[-1]
            log_probs = knowing.lm_head(knowing.model.norm(goal)).double().log_softmax(-1)
            losses.append(fmean(-log_probs[t - 1, ids[t]].item() for t in range(start, len(ids))))
    assert metrics["goal_answer_loss"] == pytest.approx(fmean(losses), rel=1e-5)
    assert metrics["forget_answer_loss"] == pytest.approx(fmean(losses), rel=0.02)


def test_a_teacher_and_a_holdout_set_estimate_a_retrained_models_loss(
    knowing, make_trainer, tokenizer, forget, tmp_path
):
    teacher = tiny_llama()
    for name, model in (("model", knowing), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
    # The level reads no features, so the last block need not be aligned.
    config = {"shift": "ignorant", "teacher": str(tmp_path / "teacher"), "blocks": [1, 2], "next_token_weight": 0.0}
    trainer = make_trainer({**CONFIG, **config}, model=str(tmp_path / "model"), holdout_dataset=HOLDOUT)
    metrics = trainer.train().metrics
    added = naive_loss(knowing, tokenizer, HOLDOUT) - naive_loss(teacher, tokenizer, HOLDOUT)
    expected = naive_loss(teacher, tokenizer, forget) + added
    assert abs(added) > 0.05
    assert metrics["retrained_answer_loss"] == pytest.approx(expected, rel=1e-5)
    # Other holdout rows have losses of their own, also where the features are there already.
    rows = tiny_rows(4, first=60)
    other = make_trainer({**CONFIG, **config}, model=str(tmp_path / "model"), holdout_dataset=rows)
    other = make_trainer({**CONFIG, **config}, model=str(tmp_path / "model"), holdout_dataset=rows)
    assert other._teacher.answer_losses[1] == pytest.approx(naive_loss(teacher, tokenizer, rows), rel=1e-5)


def test_what_cannot_be_scaled_or_read_is_refused(make_trainer, saved_llama, tmp_path):
    with pytest.raises(ValueError, match="^stop_at: 'calibrated' scales a LoRA adapter .* or pass a LoraConfig"):
        ia3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        make_trainer(CONFIG, peft_config=ia3, holdout_dataset=HOLDOUT)
    tiny_llama(initializer_range=0.3).save_pretrained(tmp_path / "teacher")
    config = {**CONFIG, "shift": "ignorant", "teacher": str(tmp_path / "teacher")}
    with pytest.raises(ValueError, match="^stop_at: .* but blocks ends with 2 of 4; align block -1 too, or give a"):
        make_trainer({**config, "next_token_weight": 0.0, "blocks": [1, 2]}, model=saved_llama)


def test_a_teacher_that_knows_as_much_is_refused(knowing, make_trainer, tmp_path):
    for name in ("model", "teacher"):
        knowing.save_pretrained(tmp_path / name)
    config = {**CONFIG, "shift": "ignorant", "teacher": str(tmp_path / "teacher")}
    trainer = make_trainer(config, model=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="^stop_at: .* goal_answer_loss, .*; give the teacher from before"):
        trainer.train()


def test_nothing_to_forget_is_said_before_the_training(make_trainer, tokenizer):
    # An untrained model knows no row; whichever set it finds less likely is the one to be forgotten.
    one, other = tiny_rows(3, first=0), tiny_rows(3, first=40)
    likely, unlikely = sorted((one, other), key=lambda rows: naive_loss(tiny_llama(), tokenizer, rows))
    trainer = make_trainer(CONFIG, forget_dataset=unlikely, holdout_dataset=likely)
    with pytest.raises(ValueError, match="^stop_at: .* holdout_answer_loss, .* familiar; give a holdout_"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_diverged_adapter_ends_as_without_looks(knowing, make_trainer):
    trainer = make_trainer(
        {**CONFIG, "calibration_steps": 1, "learning_rate": 1e30}, model=knowing, holdout_dataset=HOLDOUT
    )
    with pytest.raises(FloatingPointError):
        trainer.train()


def test_a_holdout_set_alone_or_missing_or_seen(make_trainer):
    with pytest.raises(ValueError, match="^stop_at: 'calibrated' .*holdout_dataset .* never saw, or the teacher"):
        make_trainer(CONFIG)
    with pytest.raises(ValueError, match="^holdout_dataset: one is given, but stop_at is None"):
        make_trainer({**CONFIG, "stop_at": None}, holdout_dataset=HOLDOUT)
    with pytest.raises(ValueError, match="^1 rows of holdout_dataset are in retain_dataset too, .* row 2 of holdout"):
        make_trainer(CONFIG, holdout_dataset=tiny_rows(3, first=18))
    with pytest.raises(ValueError, match="^stop_at: 'now' is not known; use one of calibrated"):
        make_trainer({**CONFIG, "stop_at": "now"}, holdout_dataset=HOLDOUT)
    with pytest.raises(ValueError, match="^calibration_steps: 0 is not positive"):
        make_trainer({**CONFIG, "calibration_steps": 0}, holdout_dataset=HOLDOUT)


def test_a_checkpoint_of_another_holdout_set_is_refused(knowing, make_trainer):
    config = {**CONFIG, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(config, model=copy.deepcopy(knowing), holdout_dataset=HOLDOUT).train()
    other = make_trainer(config, model=knowing, holdout_dataset=tiny_rows(5, first=45))
    with pytest.raises(ValueError, match="^holdout_dataset: .* resume with the same holdout_dataset"):
        other.train(resume_from_checkpoint=True)
