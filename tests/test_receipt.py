"""The receipt: what it proves with the salt, what it hides without, and that what is saved is what it says."""

import json
import os
import re
import stat

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import perturb, tiny_llama, tiny_lora, tiny_rows, tiny_tokenizer
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rfa_llm import receipt as receipt_module
from rfa_llm.checkpoints import base_config_digest, base_model_digest
from rfa_llm.cli.verify import VerifyArguments, verify
from rfa_llm.data.formats import prepare
from rfa_llm.evaluation import answer_losses
from rfa_llm.receipt import (
    RECEIPT_NAME,
    SALT_NAME,
    adapter_digests,
    answer_figures,
    as_text,
    figure_rows,
    new_salt,
    read_adapter_config,
    read_receipt,
    read_salt,
    row_hash,
    sealed,
    set_hash,
)


@pytest.fixture
def saved(make_trainer, tmp_path):
    """A trainer that has trained and saved, and its folder."""
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    return trainer, tmp_path / "adapter"


def test_the_base_digest_is_over_every_byte_and_knows_no_adapter():
    model = tiny_llama()
    digest = base_model_digest(model)
    assert base_model_digest(tiny_llama()) == digest
    wrapped = get_peft_model(tiny_llama(), tiny_lora(target_modules="all-linear"))
    assert base_model_digest(wrapped) == digest
    assert base_model_digest(tiny_llama().bfloat16()) != digest
    # The very last value of one matrix, by the least that float32 can say.
    weight = model.model.layers[2].mlp.down_proj.weight.data
    weight[-1, -1] = weight[-1, -1].nextafter(weight.new_tensor(1e9))
    assert base_model_digest(model) != digest


TUNERS = {
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "vera": VeraConfig(r=2, target_modules=["q_proj"]),
    "modules_to_save": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 4]}),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("name", TUNERS)
def test_the_base_digest_is_without_all_that_is_the_adapters_whether_it_trains_or_not(name):
    digest = base_model_digest(tiny_llama())
    model = get_peft_model(tiny_llama(), TUNERS[name])
    assert base_model_digest(model) == digest
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert base_model_digest(model) == digest
    # And with all that is the base's, also where it trains.
    model.get_base_model().model.norm.weight.requires_grad_(True)
    assert base_model_digest(model) == digest
    weight = model.get_base_model().model.norm.weight.data
    weight[-1] = weight[-1].nextafter(weight.new_tensor(1e9))
    assert base_model_digest(model) != digest


@pytest.mark.parametrize("kind", ["frozen lora_A", "vera"])
def test_an_adapter_that_trains_in_part_belongs_to_its_base(kind, make_trainer, saved_llama, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(saved_llama)
    if kind == "vera":
        model = get_peft_model(base, VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    else:
        model = get_peft_model(base, tiny_lora(target_modules=["q_proj"]))
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in parameter_name)
    trainer = make_trainer(model=model)
    trainer.train()
    trainer.save_model()
    # It may have been trained elsewhere.
    assert not read_receipt(tmp_path / "adapter")["settings"]["new_adapter"]
    checks = verify(VerifyArguments(folder=str(tmp_path / "adapter"), use_cpu=True))
    assert checks["passed"].all(), checks.to_string()


def test_each_training_has_figures_of_its_own(saved):
    trainer, folder = saved
    first, first_card = read_receipt(folder), (folder / "README.md").read_text()
    # As many steps as the first, and an adapter that has moved on.
    trainer.train()
    trainer.save_model()
    second = read_receipt(folder)
    assert second["metrics"]["before"] == first["metrics"]["before"]
    assert second["metrics"]["after"] != first["metrics"]["after"]
    assert first["settings"]["steps"] == second["settings"]["steps"] == 3
    assert first["settings"]["new_adapter"] and "that was not new" not in first_card
    assert not second["settings"]["new_adapter"] and "that was not new" in (folder / "README.md").read_text()
    # And so has what was changed after the training.
    perturb(trainer.model, scale=0.5)
    trainer.save_model()
    third = read_receipt(folder)["metrics"]
    losses = answer_losses(PeftModel.from_pretrained(tiny_llama(), folder), tiny_tokenizer(), list(tiny_rows(6, 0)))
    assert third["after"]["forget_answer_loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert third["before"] == first["metrics"]["before"] and third["after"] != second["metrics"]["after"]


def test_what_a_training_went_on_from_is_said(make_trainer, tmp_path):
    def said(trainer, name) -> tuple[int, bool]:
        trainer.save_model(str(tmp_path / name))
        settings = read_receipt(tmp_path / name)["settings"]
        return settings["steps"], settings["new_adapter"]

    short = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(short)
    assert said(trainer, "untrained") == (0, True)
    trainer.train()
    resumed = make_trainer({"max_steps": 2})
    resumed._load_from_checkpoint(str(tmp_path / "adapter" / "checkpoint-1"))
    assert said(resumed, "taken") == (0, False)
    resumed = make_trainer({"max_steps": 2})
    resumed.train(resume_from_checkpoint=str(tmp_path / "adapter" / "checkpoint-1"))
    assert said(resumed, "resumed") == (2, True)


def test_a_run_that_goes_on_in_its_folder_keeps_the_salt(make_trainer, tmp_path):
    # Rows of a receipt that was published are proved by it.
    config = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(config)
    trainer.train()
    trainer.save_model()
    salt = read_salt(tmp_path / "adapter" / SALT_NAME)
    resumed = make_trainer({**config, "resume_from_checkpoint": "true"})
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert read_salt(tmp_path / "adapter" / SALT_NAME) == salt
    make_trainer({**config, "overwrite_output_dir": True}).save_model()
    assert read_salt(tmp_path / "adapter" / SALT_NAME) != salt


def test_a_receipt_says_what_the_launch_and_the_caller_chose(make_trainer, saved_llama, tmp_path, monkeypatch):
    # What an earlier test chose would stand.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model = AutoModelForCausalLM.from_pretrained(saved_llama)
    model = get_peft_model(model, tiny_lora(target_modules=["q_proj"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    make_trainer(model=model, optimizers=(optimizer, None)).save_model()
    settings = read_receipt(tmp_path / "adapter")["settings"]
    assert settings["mixed_precision"] == "bf16" and "bf16" not in settings
    assert [settings[name] for name in ("optim", "learning_rate", "weight_decay")] == ["given"] * 3
    # Made by the Trainer, for an optimizer that was given.
    assert settings["lr_scheduler_type"] == "constant_with_warmup" and settings["warmup_steps"] == 0


def test_a_revision_is_said_where_it_was_chosen(make_trainer, saved_llama, tmp_path):
    make_trainer({"model_init_kwargs": {"revision": "v2"}}, model=saved_llama).save_model()
    folder = tmp_path / "adapter"
    assert read_receipt(folder)["base_model"]["revision"] == "v2" == read_adapter_config(folder)["revision"]
    assert 'AutoModelForCausalLM.from_pretrained(base, revision="v2"' in (folder / "README.md").read_text()


def test_a_model_without_a_name_is_in_memory(saved, saved_llama):
    _, folder = saved
    assert read_receipt(folder)["base_model"]["name"] == "in memory"
    assert 'base = "in memory"' in (folder / "README.md").read_text()
    with pytest.raises(
        ValueError, match="^model_name_or_path: none is given, and the adapter's base was .* in memory"
    ):
        verify(VerifyArguments(folder=str(folder), use_cpu=True))
    checks = verify(VerifyArguments(folder=str(folder), use_cpu=True, model_name_or_path=saved_llama))
    assert checks["passed"].all(), checks.to_string()


def test_a_receipt_says_what_was_saved(saved, forget, retain, tokenizer):
    trainer, folder = saved
    receipt = read_receipt(folder)
    assert receipt["adapter"] == adapter_digests(folder)
    assert receipt["base_model"]["weights"] == base_model_digest(tiny_llama())
    assert receipt["base_model"]["config"] == base_config_digest(tiny_llama().config)
    assert receipt["method"] == "rfa" and receipt["settings"]["steps"] == 3
    assert receipt["settings"]["seed"] == 42 and receipt["settings"]["shift"] == "negate"
    assert receipt["versions"]["peft"] and receipt["made_at"].endswith("+00:00")
    assert receipt["machine"]["cores"] == os.cpu_count() and receipt["machine"]["device"] == "cpu"
    # By hand, over all rows, because there are fewer than it would sample.
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    for name, rows in (("forget", forget), ("retain", retain)):
        for when, one in (("before", tiny_llama()), ("after", model)):
            losses = answer_losses(one, tokenizer, list(rows))
            expected = pytest.approx(sum(losses) / len(losses), rel=1e-4)
            assert receipt["metrics"][when][f"{name}_answer_loss"] == expected
    assert receipt["metrics"]["before"] != receipt["metrics"]["after"]


def test_a_row_is_proved_with_the_salt_and_not_without(saved, forget, retain):
    _, folder = saved
    receipt, salt = read_receipt(folder), read_salt(folder / SALT_NAME)
    assert receipt["forget"] == {"rows": 6, "row_hashes": sorted(row_hash(row, salt) for row in forget)}
    # As somebody else may hold it: columns in another order, and one more.
    row = {"id": 7, "answer": forget[2]["answer"], "question": forget[2]["question"]}
    assert row_hash(row, salt) in receipt["forget"]["row_hashes"]
    assert row_hash({**row, "answer": "w1"}, salt) not in receipt["forget"]["row_hashes"]
    assert row_hash(row, new_salt()) not in receipt["forget"]["row_hashes"]
    assert receipt["retain"] == {"rows": 10, "hash": set_hash(retain.shuffle(seed=0), salt)}
    assert salt not in (folder / RECEIPT_NAME).read_text()
    assert stat.S_IMODE((folder / SALT_NAME).stat().st_mode) == 0o600


def test_two_runs_have_two_salts_and_a_run_one(saved, make_trainer, tmp_path):
    trainer, folder = saved
    salt = read_salt(folder / SALT_NAME)
    trainer.save_model(str(tmp_path / "again"))
    assert read_salt(tmp_path / "again" / SALT_NAME) == salt
    other = make_trainer({"output_dir": str(tmp_path / "other")})
    other.save_model()
    assert read_salt(tmp_path / "other" / SALT_NAME) != salt
    # It has not trained, so nothing is known of before and after.
    assert read_receipt(tmp_path / "other")["metrics"] == {}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "source": "x"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "source": "x"},
        {"text": "a", "source": "x"},
    ],
)
def test_rows_of_every_format_have_a_hash_of_their_content_alone(row):
    salt = new_salt()
    bare = {name: value for name, value in row.items() if name != "source"}
    assert row_hash(row, salt) == row_hash(Dataset.from_list([bare])[0], salt)


def test_the_other_rows_of_its_set_do_not_change_a_rows_hash():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    called = {"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    named = {"role": "user", "content": "a", "name": "Ada"}
    alone = Dataset.from_list([{"messages": turns}])
    among = Dataset.from_list([{"messages": turns}, {"messages": [named, turns[1]]}, {"messages": [turns[0], called]}])
    # What it is about: the same row, and yet other keys.
    assert among[0]["messages"] != alone[0]["messages"] == turns
    salt = new_salt()
    assert row_hash(among[0], salt) == row_hash(alone[0], salt) == row_hash({"messages": turns}, salt)
    # A name that is there counts, and so does a deeper one.
    assert len({row_hash(row, salt) for row in among}) == 3
    two = {**called, "tool_calls": [{"function": {"name": "f", "arguments": {"y": 2}}}]}
    rows = Dataset.from_list([{"messages": [turns[0], called]}, {"messages": [turns[0], two]}])
    assert row_hash(rows[0], salt) == row_hash({"messages": [turns[0], called]}, salt) != row_hash(rows[1], salt)


@pytest.mark.parametrize("relative", [False, True])
def test_no_path_of_this_machine_is_in_it(relative, make_trainer, saved_llama, tmp_path, monkeypatch):
    # Of the same shape, but another model.
    teacher = tmp_path / "clinic" / "teacher"
    tiny_llama(initializer_range=0.3).save_pretrained(teacher)
    monkeypatch.chdir(tmp_path)
    given = "clinic/teacher" if relative else str(teacher)
    make_trainer({"shift": "ignorant", "teacher": given}, model=saved_llama).save_model()
    for name in (RECEIPT_NAME, "README.md"):
        text = (tmp_path / "adapter" / name).read_text()
        assert str(tmp_path) not in text and "clinic" not in text
    receipt = read_receipt(tmp_path / "adapter")
    assert receipt["base_model"]["name"] == "model"
    assert re.fullmatch(r"teacher \(sha256:[0-9a-f]{16}\)", receipt["settings"]["teacher"])


def test_a_changed_receipt_is_told(saved):
    _, folder = saved
    receipt = json.loads((folder / RECEIPT_NAME).read_text())
    receipt["metrics"]["after"]["forget_answer_loss"] = 99.0
    (folder / RECEIPT_NAME).write_text(json.dumps(receipt))
    with pytest.raises(ValueError, match="is not what its own hash says"):
        read_receipt(folder)
    (folder / RECEIPT_NAME).write_text(as_text(sealed(receipt)))
    assert read_receipt(folder)["metrics"]["after"]["forget_answer_loss"] == 99.0
    (folder / RECEIPT_NAME).write_text("[]")
    with pytest.raises(ValueError, match="is no receipt"):
        read_receipt(folder)
    (folder / RECEIPT_NAME).unlink()
    with pytest.raises(ValueError, match=f"^folder: .* has no {RECEIPT_NAME}; give"):
        read_receipt(folder)


def test_an_adapter_is_known_by_its_weights_and_not_by_where_its_base_lies(saved):
    _, folder = saved
    digests = adapter_digests(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "me/base"}))
    assert adapter_digests(folder) == digests
    for name in config.keys() - {"base_model_name_or_path", "revision"}:
        (folder / "adapter_config.json").write_text(json.dumps({**config, name: "something else"}))
        assert adapter_digests(folder)["config"] != digests["config"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values())).mul_(1.001)
    save_file(weights, folder / "adapter_model.safetensors")
    assert adapter_digests(folder)["weights"] != digests["weights"]


def test_a_salt_that_is_none(tmp_path):
    (tmp_path / "salt").write_text("pepper")
    (tmp_path / "binary").write_bytes(b"\xff" * 64)
    for name in ("salt", "binary", "nowhere"):
        with pytest.raises(ValueError, match="^salt: .* is no file with 64 hexadecimal digits"):
            read_salt(tmp_path / name)


def test_the_saved_adapter_carries_our_card(saved, saved_llama):
    _, folder = saved
    card = (folder / "README.md").read_text()
    assert "still knows it" in card and "merge it into the base" in card
    assert "[More Information Needed]" not in card
    # And stays a plain adapter.
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_llama), folder)


def test_checkpoints_have_no_receipt(make_trainer, tmp_path):
    make_trainer({"save_strategy": "steps", "save_steps": 3}).train()
    names = [path.name for path in (tmp_path / "adapter" / "checkpoint-3").iterdir()]
    assert RECEIPT_NAME not in names and SALT_NAME not in names


def test_of_a_large_set_a_sample_is_scored(tokenizer, monkeypatch):
    rows = tiny_rows(9, first=0)
    monkeypatch.setattr(receipt_module, "FIGURE_ROWS", 3)
    salt = new_salt()
    lowest = sorted(rows, key=lambda row: row_hash(row, salt))[:3]
    losses = answer_losses(tiny_llama(), tokenizer, lowest)
    # The order of the rows does not choose among them.
    for given in (rows, rows.shuffle(seed=1)):
        encoded = prepare(given, tokenizer, "forget_dataset", None)
        figures = answer_figures(tiny_llama(), {"forget": figure_rows(given, encoded, salt)}, batch_size=2)
        assert figures == {"forget_answer_loss": pytest.approx(sum(losses) / 3, rel=1e-5)}
