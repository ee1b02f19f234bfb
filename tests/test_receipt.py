"""The receipt: what it proves with the salt, what it hides without, and that what is saved is what it says."""

import json
import os
import stat

import pytest
from conftest import tiny_llama, tiny_lora, tiny_rows
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rfa_llm import receipt as receipt_module
from rfa_llm.checkpoints import base_model_digest
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


def test_each_training_has_figures_of_its_own(saved):
    trainer, folder = saved
    first = read_receipt(folder)["metrics"]
    # As many steps as the first, and an adapter that has moved on.
    trainer.train()
    trainer.save_model()
    second = read_receipt(folder)["metrics"]
    assert second["before"] == first["before"] and second["after"] != first["after"]


def test_a_receipt_says_what_was_saved(saved, forget, retain, tokenizer):
    trainer, folder = saved
    receipt = read_receipt(folder)
    assert receipt["adapter"] == adapter_digests(folder)
    assert receipt["base_model"]["weights"] == base_model_digest(tiny_llama())
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


def test_no_path_of_this_machine_is_in_it(make_trainer, saved_llama, tmp_path):
    # Of the same shape, but another model.
    teacher = tmp_path / "teacher"
    tiny_llama(initializer_range=0.3).save_pretrained(teacher)
    make_trainer({"shift": "ignorant", "teacher": str(teacher)}, model=saved_llama).save_model()
    for name in (RECEIPT_NAME, "README.md"):
        assert str(tmp_path) not in (tmp_path / "adapter" / name).read_text()
    receipt = read_receipt(tmp_path / "adapter")
    assert receipt["base_model"]["name"] == "model" and receipt["settings"]["teacher"] == "teacher"


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
    for name in ("salt", "nowhere"):
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
