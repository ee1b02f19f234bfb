from __future__ import annotations

import copy
from statistics import fmean

import pytest
import torch
from conftest import tiny_llama, tiny_lora, tiny_rows

from rfa_llm.checkpoints import newest_whole_checkpoint
from rfa_llm.data.formats import encode

HOLDOUT = tiny_rows(5, first=40)


@pytest.fixture
def knowing(tokenizer, forget, retain):
    """A tiny Llama that has learnt the forget and the retain rows by heart."""
    model = tiny_llama()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows = [torch.tensor([encode(row, tokenizer)["input_ids"]]) for row in [*forget, *retain]]
    for _ in range(15):
        for ids in rows:
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
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
    assert metrics["forget_answer_loss"] == pytest.approx(naive_loss(trainer.model, tokenizer, forget), rel=1e-5)

    steps = trainer.state.global_step
    assert steps < 80 and list(looks(trainer)) == list(range(2, steps + 1, 2))
    assert all((loss >= unseen) == (step == steps) for step, loss in looks(trainer).items())
    if more["save_strategy"] == "no":
        assert newest_whole_checkpoint(trainer.args.output_dir) is None
    else:
        assert newest_whole_checkpoint(trainer.args.output_dir).endswith(f"checkpoint-{steps}")


def test_an_end_before_that_is_said(knowing, make_trainer, caplog):
    with caplog.at_level("WARNING"):
        slowly = {**CONFIG, "max_steps": 5, "learning_rate": 2e-3}
        trainer = make_trainer(slowly, model=knowing, holdout_dataset=HOLDOUT)
        metrics = trainer.train().metrics
    # The last step is looked at whatever its number.
    reached = looks(trainer)[5]
    assert reached != looks(trainer)[4] and metrics["forget_answer_loss"] == reached
    assert f"ended with the forget set's answers at a loss of {reached:.3f} nats a token, below" in caplog.text


def test_the_looks_change_nothing_of_the_training(knowing, make_trainer):
    adapters = []
    for config, holdout in ((CONFIG, HOLDOUT), ({**CONFIG, "stop_at": None}, None)):
        trainer = make_trainer(
            {**config, "max_steps": 5, "learning_rate": 2e-3},
            model=copy.deepcopy(knowing),
            peft_config=tiny_lora(lora_dropout=0.1),
            holdout_dataset=holdout,
        )
        trainer.train()
        adapters.append({name: p for name, p in trainer.model.named_parameters() if "lora_" in name})
    for name, weight in adapters[0].items():
        assert weight.any() and torch.equal(weight, adapters[1][name]), name


def test_nothing_to_forget_is_said_before_the_training(make_trainer, tokenizer):
    # An untrained model knows no row; whichever set it finds less likely is the one to be forgotten.
    one, other = tiny_rows(3, first=0), tiny_rows(3, first=40)
    likely, unlikely = sorted((one, other), key=lambda rows: naive_loss(tiny_llama(), tokenizer, rows))
    trainer = make_trainer(CONFIG, forget_dataset=unlikely, holdout_dataset=likely)
    with pytest.raises(ValueError, match="^holdout_dataset: .* look no more familiar; give rows of"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_diverged_adapter_ends_as_without_looks(knowing, make_trainer):
    trainer = make_trainer(
        {**CONFIG, "calibration_steps": 1, "learning_rate": 1e30}, model=knowing, holdout_dataset=HOLDOUT
    )
    with pytest.raises(FloatingPointError):
        trainer.train()


def test_a_holdout_set_alone_or_missing_or_seen(make_trainer):
    with pytest.raises(ValueError, match="^holdout_dataset, stop_at: got none and 'calibrated'; .* never saw"):
        make_trainer(CONFIG)
    with pytest.raises(ValueError, match="^holdout_dataset, stop_at: got one and None"):
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
