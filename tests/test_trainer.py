from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from conftest import perturb, ridge_regression, tiny_llama, tiny_lora, tiny_rows
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from rfa_llm.blocks import lora_placement
from rfa_llm.checkpoints import METHOD_STATE_NAME, newest_whole_checkpoint
from rfa_llm.memory import peak_bytes
from rfa_llm.residuals import capture
from rfa_llm.shifts import SHIFTS, random_directions

ALIGNED = [1, 2]
LOGGED = {"loss_forget", "loss_retain"} | {
    f"residual_{set_}/block_{b}" for set_ in ("forget", "retain") for b in ALIGNED
}


def halve(reference, block):
    return -0.5 * reference


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def step_logs(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "loss" in log]


def record_batches(trainer) -> list[dict]:
    """The batches the trainer draws from now on, in their order."""
    batches, collate = [], trainer.data_collator

    def recording(pairs):
        batches.append(collate(pairs))
        return batches[-1]

    trainer.data_collator = recording
    return batches


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def hidden_states(model, row, mask=None) -> list[torch.Tensor]:
    """A row `[tokens]` through a model without an adapter, `[tokens, hidden]` an aligned block, in float64."""
    model = model.double().eval()
    positions = torch.arange(len(row))[None]
    states = model(row[None], attention_mask=mask, position_ids=positions, output_hidden_states=True).hidden_states
    return [states[block + 1][0] for block in ALIGNED]


def retain_features(model, rows, batch) -> list[torch.Tensor]:
    features = [hidden_states(model, torch.tensor(row["input_ids"])) for row in rows]
    starts = [0 if batch == "all" else row["answer_start"] - 1 for row in rows]
    return [torch.cat([f[i][s:] for f, s in zip(features, starts, strict=True)]) for i in range(len(ALIGNED))]


def expected_targets(shift, row, trainer, teacher):
    """Where the features of a forget row go, h⁰ + S, from the definition of each shift."""
    model = tiny_llama()
    h0 = hidden_states(model, row)
    mean_rows = [trainer.train_dataset.retain[i] for i in range(4)]
    if shift is halve:
        return [h / 2 for h in h0]
    if shift == "negate":
        return [h - 0.7 * h for h in h0]
    if shift == "mean":
        features = retain_features(model, mean_rows, "all")
        return [f.mean(0).expand_as(h) for f, h in zip(features, h0, strict=True)]
    if shift == "random":
        directions = random_directions(2, 32, seed=42).double()
        return [h + 0.7 * h.norm(dim=-1, keepdim=True) * u for h, u in zip(h0, directions, strict=True)]
    if shift == "ignorant":
        ours, theirs = (retain_features(m, mean_rows, "answer") for m in (model, teacher))
        styles = [ridge_regression(x, y - x) for x, y in zip(theirs, ours, strict=True)]
        return [h + style(h) for h, style in zip(hidden_states(teacher, row), styles, strict=True)]
    if shift == "smoothed":
        # Rotary embeddings are linear, so smaller queries are a higher temperature.
        for block in model.model.layers:
            block.self_attn.q_proj.weight.data /= 3.0
        return hidden_states(model, row)
    n = len(row)
    visible = [[k <= q and (q - k < 2 or k < 1) for k in range(n)] for q in range(n)]
    model.set_attn_implementation("eager")
    return hidden_states(model, row, torch.where(torch.tensor(visible), 0.0, -1e30).double()[None, None])


@pytest.mark.parametrize("shift", [*SHIFTS, halve])
def test_short_runs_log_what_the_formulas_say(shift, make_trainer, saved_llama, tmp_path):
    teacher = tiny_llama(initializer_range=0.1)
    teacher.save_pretrained(tmp_path / "teacher")
    config = {
        "blocks": ALIGNED,
        "mean_rows": 4,
        "shift_scale": 0.7,
        "alpha": 3.0,
        "beta": 0.5,
        "next_token_weight": 0.0,
    }
    config |= {"local_window": 2, "local_sinks": 1, "smoothing_temperature": 3.0}
    if shift is halve:
        trainer = make_trainer(config, model=saved_llama, shift=halve)
    else:
        config |= {"shift": shift} | ({"teacher": str(tmp_path / "teacher")} if shift == "ignorant" else {})
        trainer = make_trainer(config, model=saved_llama)
    batches = record_batches(trainer)
    trainer.train()

    logs = step_logs(trainer)
    assert len(logs) == 3
    for log in logs:
        assert LOGGED <= log.keys()
        assert log["loss"] == pytest.approx(3.0 * log["loss_retain"] + 0.5 * log["loss_forget"], rel=1e-4)
    assert all(log["residual_forget/block_2"] > 0 and log["residual_retain/block_2"] > 0 for log in logs[1:])

    batch, ratios = batches[0], [[], []]
    for i in range(2):  # the forget rows
        row = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        counts = batch["token_mask"][i][: len(row)]
        targets = expected_targets(shift, row, trainer, teacher)
        for block, (h0, target) in enumerate(zip(hidden_states(tiny_llama(), row), targets, strict=True)):
            ratios[block] += ((target - h0).square().sum(-1) / h0.square().sum(-1))[counts].tolist()
    assert logs[0]["loss_forget"] == pytest.approx(sum(sum(r) / len(r) for r in ratios) / 2, rel=1e-3)
    for name in LOGGED - {"loss_forget"}:
        # Not quite 0, because cached features come from batches of another shape.
        assert logs[0][name] == pytest.approx(0, abs=2e-6), name


def test_the_next_token_term_is_the_divergence_of_what_is_read_out(make_trainer, saved_llama):
    def rolled(reference, block):
        return -0.5 * reference.roll(1, dims=-1)

    config = {"blocks": [1, 3], "alpha": 3.0, "beta": 0.5, "next_token_weight": 0.25}
    trainer = make_trainer(config, model=saved_llama, shift=rolled)
    features_alone = make_trainer({**config, "next_token_weight": 0.0}, model=saved_llama, shift=rolled)
    features_alone.train()
    batches = record_batches(trainer)
    trainer.train()
    for log in step_logs(trainer):
        assert log["loss"] == pytest.approx(3.0 * log["loss_retain"] + 0.5 * log["loss_forget"], rel=1e-4)
    first, last = step_logs(trainer)[0], step_logs(trainer)[-1]
    of_features = step_logs(features_alone)[0]["loss_forget"]
    assert first["loss_forget"] == pytest.approx(of_features + 0.25 * first["next_token_forget"], rel=1e-4)
    assert first["next_token_retain"] == pytest.approx(0, abs=1e-6) and last["next_token_retain"] > 1e-5

    model, batch, divergences = tiny_llama().double().eval(), batches[0], []
    for i in range(2):  # the forget rows
        row = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        with torch.no_grad(), capture([model.model.layers[3]]) as features:
            logits = model(row[None]).logits[0]
        last_block = features[0][0]
        goal = last_block + rolled(last_block, 3)
        goal = model.lm_head(model.model.norm(goal)).log_softmax(-1)
        divergence = (goal.exp() * (goal - logits.log_softmax(-1))).sum(-1)
        divergences += divergence[batch["token_mask"][i][: len(row)]].tolist()
    assert first["next_token_forget"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)


def test_a_log_of_several_steps_is_their_mean(make_trainer):
    config = {"blocks": ALIGNED, "max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    each = make_trainer(config)
    each.train()
    every_third = make_trainer({**config, "logging_steps": 3})
    every_third.train()
    each = step_logs(each)
    log = step_logs(every_third)[0]
    assert len(each) == 5 and len(step_logs(every_third)) == 1
    for name in (*LOGGED, "loss"):
        assert log[name] == pytest.approx(sum(log[name] for log in each[:3]) / 3, rel=1e-4)
    # The steps after the last log are in the summary at the end.
    rest = next(log for log in every_third.state.log_history if "train_runtime" in log)
    for name in LOGGED:
        assert rest[name] == pytest.approx(sum(log[name] for log in each[3:]) / 2, rel=1e-4)


@pytest.mark.parametrize("shift", ["negate", "mean"])
def test_training_moves_the_forget_set_alone_and_no_base_weight(shift, make_trainer):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    config = {"shift": shift, "blocks": [1, 3], "max_steps": 60, "per_device_train_batch_size": 6}
    trainer = make_trainer({**config, "alpha": 1.0}, model=model, peft_config=tiny_lora(r=16, lora_alpha=16))
    trainer.train()
    logs = step_logs(trainer)
    assert logs[-1]["loss_forget"] < 0.5 * logs[0]["loss_forget"]
    assert logs[-1]["loss_retain"] < 0.25 * max(log["loss_retain"] for log in logs)
    assert logs[-1]["residual_forget/block_3"] > 3 * logs[-1]["residual_retain/block_3"]
    after = {name.replace("base_layer.", ""): p for name, p in trainer.model.get_base_model().state_dict().items()}
    for name, weight in before.items():
        assert weight.numpy().tobytes() == after[name].numpy().tobytes(), name


def test_accumulated_gradients_are_those_of_the_whole_batch(make_trainer):
    def first_step(per_device, accumulation):
        keep = KeepGradients()
        config = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        config |= {"max_steps": 1, "blocks": ALIGNED, "max_grad_norm": 0.0, "optim": "sgd"}
        trainer = make_trainer(config, callbacks=[keep])
        perturb(trainer.model)
        trainer.train()
        return keep.gradients, adapter(trainer.model), step_logs(trainer)[0]

    lengths = {len(row["answer"]) for row in tiny_rows(6, first=0)}
    assert max(lengths) > 5 * min(lengths)
    (gradients, weights, log), (gradients3, weights3, log3) = first_step(6, 1), first_step(2, 3)
    for name in gradients:
        torch.testing.assert_close(gradients3[name], gradients[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights3[name], weights[name], rtol=1e-4, atol=1e-5)
    for name in (*LOGGED, "loss"):
        assert log3[name] == pytest.approx(log[name], rel=1e-4)


def test_what_is_saved_is_a_plain_adapter(make_trainer, tokenizer):
    trainer = make_trainer({"blocks": ALIGNED})
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_llama(), trainer.args.output_dir)
    ids = torch.arange(3, 15).view(2, 6)
    trainer.model.eval()
    assert torch.equal(loaded.eval()(ids).logits, trainer.model(ids).logits)
    assert not torch.allclose(loaded(ids).logits, tiny_llama()(ids).logits)
    saved = load_file(Path(trainer.args.output_dir) / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved) and len(saved) == 2 * 3 * 7  # 3 blocks of 7 linear layers


@pytest.mark.parametrize("order", ["random", "group_by_length"])
@pytest.mark.parametrize("step", [3, 4], ids=["between epochs", "within an epoch"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(step, order, make_trainer):
    config = {"shift": "random", "blocks": ALIGNED, "max_steps": 8, "save_strategy": "steps", "save_steps": step}
    config["train_sampling_strategy"] = order
    lora = tiny_lora(lora_dropout=0.2)  # the state of the random generator counts too

    def run(checkpoint=None):
        trainer = make_trainer({**config, "overwrite_output_dir": True}, peft_config=lora)
        batches = record_batches(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, batches

    whole, whole_batches = run()
    checkpoint = Path(whole.args.output_dir) / f"checkpoint-{step}"
    kept = checkpoint.with_name("kept")
    shutil.copytree(checkpoint, kept)
    resumed, batches = run(str(kept))
    for ours, theirs in zip(batches[: 8 - step], whole_batches[step:8], strict=True):  # one is fetched ahead
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert same(adapter(resumed.model), adapter(whole.model))
    for ours, theirs in zip(step_logs(resumed), step_logs(whole), strict=True):
        assert {name: ours[name] for name in LOGGED} == {name: theirs[name] for name in LOGGED}

    state = load_file(kept / "rfa_state.safetensors")
    assert torch.equal(state["vectors"], random_directions(2, 32, seed=42))
    with safe_open(kept / "rfa_state.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file({"vectors": -state["vectors"]}, kept / "rfa_state.safetensors", metadata=metadata)
    other, _ = run(str(kept))
    assert torch.equal(other._shift_vectors, -state["vectors"])
    assert not same(adapter(other.model), adapter(whole.model))


def test_a_checkpoint_of_another_run_is_refused_by_name(make_trainer, forget, retain):
    config = {"shift": "random", "max_steps": 2, "save_strategy": "steps", "save_steps": 2, "alpha": 4.0}
    trainer = make_trainer(config)
    trainer.train()
    checkpoint = str(Path(trainer.args.output_dir) / "checkpoint-2")
    tuned = tiny_llama()
    tuned.model.layers[2].mlp.up_proj.weight.data += 0.01
    others = {
        "base_model": ({}, {"model": tuned}),
        "forget_dataset": ({}, {"forget_dataset": forget.select(range(5))}),
        "retain_dataset": ({}, {"retain_dataset": retain.select(range(9))}),
        "shift": ({"shift": "mean"}, {}),
        "blocks": ({"blocks": [0, 3]}, {}),
        "alpha": ({"alpha": 3.0}, {}),
        "rows_a_step": ({"gradient_accumulation_steps": 2}, {}),
        "peft_config": ({}, {"peft_config": tiny_lora(lora_alpha=4)}),
        "seed": ({"seed": 7}, {}),
        # A resumed Trainer would keep the old one and say nothing.
        "learning_rate": ({"learning_rate": 0.5}, {}),
        "weight_decay": ({"weight_decay": 0.5}, {}),
        "adam_beta2": ({"adam_beta2": 0.95}, {}),
        "bf16": ({"bf16": True}, {}),
    }
    for field, (changed, kwargs) in others.items():
        with pytest.raises(ValueError, match=f"^{field}: .*checkpoint-2' was trained with .* but this run has"):
            make_trainer({**config, **changed}, **kwargs).train(resume_from_checkpoint=checkpoint)
    again = make_trainer({**config, "max_steps": 3})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_a_checkpoint_of_another_teacher_of_the_same_name_is_refused(make_trainer, saved_llama, tmp_path):
    config = {"shift": None, "teacher": str(tmp_path / "teacher")}
    config |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    tiny_llama(initializer_range=0.1).save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(config, model=saved_llama)
    assert trainer.args.shift == "ignorant"
    trainer.train()
    checkpoint = str(Path(trainer.args.output_dir) / "checkpoint-2")
    make_trainer({**config, "max_steps": 3}, model=saved_llama).train(resume_from_checkpoint=checkpoint)
    tiny_llama(initializer_range=0.3).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="^teacher: .*checkpoint-2' was trained with .*teacher .* but this run has"):
        make_trainer({**config, "max_steps": 3}, model=saved_llama).train(resume_from_checkpoint=checkpoint)


def test_the_teacher_is_loaded_from_where_the_model_is(make_trainer, saved_llama, tmp_path):
    repo = tmp_path / "hub" / "models--us--base"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    tiny_llama(initializer_range=0.1).save_pretrained(repo / "snapshots" / ("a" * 40))
    config = {"shift": "ignorant", "teacher": "us/base", "max_steps": 1}
    # The revision is the model's, and the teacher's repository has none of this name.
    place = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True, "revision": "of-the-model"}
    trainer = make_trainer({**config, "model_init_kwargs": place}, model=saved_llama)
    trainer.train()
    assert trainer.state.log_history[0]["loss_forget"] > 0
    with pytest.raises(ValueError, match="^teacher: 'us/base' is no model"):
        make_trainer(config, model=saved_llama)


def test_the_newest_checkpoint_is_the_one_that_was_written_last(tmp_path):
    """A run that began anew in the same folder has the lower step numbers."""
    for age, step in enumerate((2, 10, 4)):
        mark = tmp_path / f"checkpoint-{step}" / METHOD_STATE_NAME
        mark.parent.mkdir()
        mark.touch()
        os.utime(mark, (1e9 - age, 1e9 - age))
    assert newest_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_a_checkpoint_of_sharded_optimizers_is_refused_without_them(make_trainer, monkeypatch):
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(config)
    # The state of ZeRO and FSDP lies in files of their own, in the place of which the Trainer would start anew.
    monkeypatch.setitem(trainer._fingerprint, "launch", "ZeRO-2 on 2 processes")
    trainer.train()
    with pytest.raises(ValueError, match="^launch: .* trained with ZeRO-2 on 2 processes, but this run has the whole"):
        make_trainer(config).train(resume_from_checkpoint=True)


def test_a_half_written_checkpoint_is_passed_over(make_trainer):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer = make_trainer(config)
    folder = Path(trainer.args.output_dir)
    with pytest.raises(ValueError, match="^resume_from_checkpoint: True, but .* holds no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-6")
    (folder / "checkpoint-6" / "rfa_state.safetensors").unlink()
    with pytest.raises(ValueError, match="^resume_from_checkpoint: .*checkpoint-6' is no whole checkpoint"):
        make_trainer(config).train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    resumed = make_trainer({**config, "max_steps": 5})
    resumed.train(resume_from_checkpoint=True)
    assert [log["step"] for log in step_logs(resumed)] == [1, 2, 3, 4, 5]


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(make_trainer, monkeypatch):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(config)
    trainer.train()
    folder = trainer.args.output_dir
    again = make_trainer(config)

    def stop(output_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", stop)
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert newest_whole_checkpoint(folder) == f"{folder}/checkpoint-2"


def test_the_memory_of_a_run_is_reported(make_trainer):
    model = tiny_llama()
    weights = 4 * sum(p.numel() for p in model.parameters())
    metrics = make_trainer(model=model).train().metrics
    assert metrics["base_model_bytes"] == weights
    assert metrics["peak_bytes/process_0"] == pytest.approx(peak_bytes(torch.device("cpu")), rel=0.01)
    assert metrics["peak_bytes/process_0"] > psutil.Process().memory_info().rss / 2


def test_every_forget_row_comes_once_an_epoch_and_no_retain_row_twice_before_all_came_once(make_trainer, retain):
    trainer = make_trainer({"max_steps": 6})
    batches = record_batches(trainer)
    trainer.train()
    forget = [batch["index"][batch["is_forget"]].tolist() for batch in batches]
    assert sorted(sum(forget[:3], [])) == sorted(sum(forget[3:], [])) == list(range(6))
    partners = [batch["index"][~batch["is_forget"]].tolist() for batch in batches]
    first, second = sum(partners[:3], []), sum(partners[3:], [])
    assert len(set(first)) == 6 and set(first) | set(second) == set(range(10))


@pytest.mark.parametrize("given_as", ["path", "loaded", "adapted"])
@pytest.mark.parametrize("config", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_every_adapted_block_is_trained(given_as, config, make_trainer, saved_llama):
    model = saved_llama if given_as == "path" else tiny_llama()
    if given_as == "adapted":
        model = get_peft_model(model, tiny_lora(**lora_placement(model, 2)))
    trainer = make_trainer({"blocks": ALIGNED, **config}, model=model)
    before = adapter(trainer.model)
    trainer.train()
    weights = adapter(trainer.model)
    assert len(weights) == 2 * 3 * 7
    assert all(weight.any() for weight in weights.values())
    assert not any(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_leaves_no_hook(use_reentrant, make_trainer):
    kwargs = {"use_reentrant": use_reentrant}
    trainer = make_trainer({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs, "max_steps": 1})
    for _ in range(2):
        before = adapter(trainer.model)
        trainer.train()
        assert not any(module._forward_hooks for module in trainer.model.modules())
        after = adapter(trainer.model)
        assert all(after[name].any() and not torch.equal(after[name], before[name]) for name in after if "_B" in name)


def test_an_adapter_that_comes_with_the_model_goes_on_from_where_it_is(make_trainer):
    model = tiny_llama()
    model = get_peft_model(model, tiny_lora(**lora_placement(model, 2)))
    perturb(model)
    trainer = make_trainer({"blocks": ALIGNED, "max_steps": 1}, model=model)
    trainer.train()
    assert step_logs(trainer)[0]["residual_forget/block_1"] > 1e-3
    assert step_logs(trainer)[0]["loss_retain"] > 0


def test_a_model_that_checkpoints_already_is_trained_as_well(make_trainer):
    model = tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    trainer = make_trainer({"blocks": ALIGNED}, model=model)
    trainer.train()
    assert all(weight.any() for weight in adapter(trainer.model).values())


def test_the_default_blocks_and_adapter(make_trainer):
    trainer = make_trainer(model=tiny_llama(num_hidden_layers=6))
    assert trainer.aligned == [2, 3, 4, 5]
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.layers_to_transform) == (32, 64, list(range(6)))


def test_an_adapter_config_is_not_changed_by_the_model_it_meets(make_trainer):
    config = tiny_lora()
    make_trainer(model=tiny_llama(num_hidden_layers=2), peft_config=config)
    trainer = make_trainer(model=tiny_llama(num_hidden_layers=4), peft_config=config)
    assert len(adapter(trainer.model)) == 2 * 4 * 7
