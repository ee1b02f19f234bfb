"""`rfa-llm verify`: what it passes, and that each thing that is not what the receipt says fails by its name."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import tiny_llama, tiny_rows, tiny_tokenizer
from datasets import Dataset, concatenate_datasets, load_dataset
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from rfa_llm import RFAConfig, RFATrainer
from rfa_llm.card import Words, has_figures_of, model_card
from rfa_llm.cli import publish as publish_cli
from rfa_llm.cli import verify as verify_cli
from rfa_llm.cli.verify import VerifyArguments, compared, verify
from rfa_llm.receipt import (
    RECEIPT_NAME,
    SALT_NAME,
    adapter_digests,
    as_text,
    new_salt,
    read_adapter_config,
    read_receipt,
    sealed,
    with_card,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a trained adapter, its base and its two sets; trained once, because every test changes a copy."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tiny_rows(6, first=0).to_json(folder / "forget.jsonl")
    tiny_rows(10, first=20).to_json(folder / "retain.jsonl")
    short = {"max_steps": 3, "per_device_train_batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-2}
    args = RFAConfig(output_dir=str(folder / "adapter"), shift="negate", use_cpu=True, report_to="none", **short)
    sets = {"forget_dataset": str(folder / "forget.jsonl"), "retain_dataset": str(folder / "retain.jsonl")}
    trainer = RFATrainer(str(folder / "model"), args, **sets)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    """A trained adapter, with its two sets in files beside its folder."""
    for name in ("forget.jsonl", "retain.jsonl"):
        shutil.copy(trained / name, tmp_path / name)
    return Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))


FIGURES = [f"{name}_answer_loss, {when}" for when in ("before", "after") for name in ("forget", "retain")]


def verified(folder: Path, **given) -> pd.DataFrame:
    return verify(VerifyArguments(folder=str(folder), use_cpu=True, **given))


def failed(folder: Path, **given) -> list[str]:
    checks = verified(folder, **given)
    return checks.loc[~checks["passed"], "check"].tolist()


def unmeasured(checks: pd.DataFrame) -> dict[str, str]:
    """The lines of what was not measured, and what they say."""
    checks = checks[checks["passed"].isna()]
    return dict(zip(checks["check"], checks["found"], strict=True))


def forge(folder: Path, change) -> None:
    """Change the receipt, and make card and hashes of what it says then."""
    receipt = read_receipt(folder)
    change(receipt)
    card = str(model_card(receipt, Words("some rows", "model"), "adapter", read_adapter_config(folder)))
    (folder / "README.md").write_text(card)
    (folder / RECEIPT_NAME).write_text(as_text(with_card(receipt, card)))


def test_all_is_as_the_receipt_says(adapter, forget, tmp_path):
    # In another order, and from where the salt has been put away.
    forget.shuffle(seed=3).to_json(tmp_path / "forget.jsonl")
    shutil.move(adapter / SALT_NAME, tmp_path / "salt")
    given = {"forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl")}
    checks = verify(
        VerifyArguments(folder=str(adapter), use_cpu=True, salt=str(tmp_path / "salt"), tolerance=1e-4, **given)
    )
    assert checks["passed"].all(), checks.to_string()
    figures = FIGURES
    assert checks["check"].tolist() == [
        *("receipt", "model card", "model card's figures", "adapter's weights", "adapter's configuration"),
        *("tokenizer", "base's name", "rows to forget", "receipt's figures"),
        *("rows in the request", "rows to keep", "retain set", "base's weights"),
        *("base's configuration", *figures[:2]),
        *("adapter on its base", *figures[2:]),
    ]


def test_some_rows_of_the_request_are_proved_and_give_no_figure(adapter, forget, tmp_path):
    path = str(tmp_path / "some.jsonl")
    forget.select([4, 1]).to_json(path)
    checks = verified(adapter, forget=path)
    assert checks["passed"].all() and "2 of the 2 given; the request has 6" in checks["found"].tolist()
    forget_why, retain_why = "2 of the request's 6 rows are given", "give the whole set as --retain"
    assert list(unmeasured(checks).items()) == [
        (figure, f"not measured: {forget_why if figure.startswith('forget') else retain_why}") for figure in FIGURES
    ]
    concatenate_datasets([forget.select([4, 1]), tiny_rows(1, first=40)]).to_json(path)
    checks = verified(adapter, forget=path)
    (found,) = checks.loc[~checks["passed"].fillna(True), "found"]
    assert found.startswith("2 of the 3 given; the request has 6; row 2 (counted from 0) is another, or has")


def test_a_foreign_salt_proves_nothing(adapter, tmp_path):
    (tmp_path / "salt").write_text(new_salt())
    given = {"forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl")}
    assert failed(adapter, salt=str(tmp_path / "salt"), **given) == ["rows in the request", "retain set"]


def test_a_row_that_is_given_six_times_is_proved_once(adapter, forget, tmp_path):
    forget.select([4] * 6).to_json(tmp_path / "forget.jsonl")
    checks = verified(adapter, forget=str(tmp_path / "forget.jsonl"))
    assert checks.loc[checks["passed"] == False, ["check", "found"]].values.tolist() == [  # noqa: E712
        ["rows in the request", "1 of the 6 given; the request has 6"]
    ]


def test_another_retain_set(adapter, retain, tmp_path):
    retain.select(range(9)).to_json(tmp_path / "retain.jsonl")
    checks = verified(adapter, retain=str(tmp_path / "retain.jsonl"))
    assert checks.loc[~checks["passed"], "check"].tolist() == ["rows to keep", "retain set"]
    assert unmeasured(checks)["retain_answer_loss, after"] == "not measured: the rows given are not the retain set"


def test_a_base_whose_last_byte_is_another(adapter, saved_llama, tokenizer, tmp_path):
    model = tiny_llama()
    weight = model.lm_head.weight.data
    weight[-1, -1] = weight[-1, -1].nextafter(torch.tensor(1e9))
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    given = {"forget": str(tmp_path / "forget.jsonl")}
    assert failed(adapter, model_name_or_path=str(tmp_path / "other"), **given) == ["base's weights"]
    assert failed(adapter, model_name_or_path=saved_llama, **given) == []


TEMPLATE = "{% for m in messages %}w{{ loop.index }} {{ m['content'] }} </s>{% endfor %}"


def test_the_tokenizer_of_the_run_is_taken_and_not_the_bases(make_trainer, tokenizer, saved_llama, adapter, tmp_path):
    tokenizer.chat_template = TEMPLATE + "{% if add_generation_prompt %}w2 {% endif %}"
    folder = tmp_path / "templated"
    trainer = make_trainer({"output_dir": str(folder)}, model=saved_llama, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    given = {"forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl"), "tolerance": 1e-4}
    assert failed(folder, **given) == []
    (Path(saved_llama) / "tokenizer.json").unlink()
    assert failed(folder, **given) == []
    # Another tokenizer's figures say nothing, so none is compared.
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert failed(folder, **given) == ["tokenizer"]
    # Neither here nor there.
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink()
    sentence = "^model_name_or_path: '.*model' has no tokenizer that can be loaded; put the run's beside the adapter"
    with pytest.raises(ValueError, match=sentence):
        failed(folder, **given)


def test_the_bases_tokenizer_serves_where_the_runs_is_not_there(adapter, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / file).unlink()
    checks = verify(VerifyArguments(folder=str(adapter), use_cpu=True, forget=str(tmp_path / "forget.jsonl")))
    assert checks.loc[~checks["passed"], "check"].tolist() == ["tokenizer"]
    assert "forget_answer_loss, after" in checks["check"].tolist()


ROPE = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize("field", [{"hidden_act": "relu"}, {"rms_norm_eps": 0.5}, {"rope_parameters": ROPE}])
def test_a_base_of_the_same_weights_that_computes_otherwise(field, adapter, saved_llama):
    config = Path(saved_llama) / "config.json"
    # Names and versions are not what a model computes with.
    set_json(config, transformers_version="4.0", architectures=["Other"])
    assert failed(adapter, model_name_or_path=saved_llama) == []
    set_json(config, **field)
    assert failed(adapter, model_name_or_path=saved_llama) == ["base's configuration"]


HUB_CARD = """---
configs:
- config_name: forget10
  data_files: [{split: test, path: forget.jsonl}]
- config_name: retain90
  data_files: [{split: test, path: retain.jsonl}]
---
"""


def test_sets_of_the_hub_are_named_as_for_the_training(adapter, forget, tmp_path, monkeypatch):
    # `datasets` reads a folder as it reads a Hub dataset, without the network.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    repos = {"me/rows": str(tmp_path)}
    monkeypatch.setattr(
        "rfa_llm.data.formats.load_dataset", lambda name, *of, **at: load_dataset(repos[name], *of, **at)
    )
    (tmp_path / "README.md").write_text(HUB_CARD)
    config = {"forget_config": "forget10", "retain_config": "retain90"}
    checks = verified(adapter, forget="me/rows", retain="me/rows", dataset_split="test", **config)
    assert checks["passed"].fillna(False).all(), checks.to_string()
    with pytest.raises(ValueError, match="^forget: 'me/rows' cannot be loaded from the Hub .*train"):
        verified(adapter, forget="me/rows", **config)

    words = ["--base_model", "me/base", "--forgotten", forget[1]["answer"], "--forget_dataset", "me/rows"]
    words += ["--forget_config", "forget10", "--dataset_split", "test"]
    with pytest.raises(ValueError, match="^forgotten: text of row 1 of the forget set is in README.md"):
        publish_cli.main([str(adapter), "me/adapter", *words])


def test_an_adapter_that_was_changed(adapter, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 3 * tensor for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    names = failed(adapter, forget=str(tmp_path / "forget.jsonl"))
    # What it says of the answers is another thing too; the base's is not.
    assert names == ["adapter's weights", "forget_answer_loss, after"]


def set_loss(receipt: dict, when: str, name: str, factor: float) -> None:
    receipt["metrics"][when][name] *= factor


def test_a_figure_that_was_never_measured_is_told_although_every_hash_is_right(adapter, tmp_path):
    given = {"forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl")}
    for when in ("before", "after"):
        for name in ("forget_answer_loss", "retain_answer_loss"):
            forge(adapter, partial(set_loss, when=when, name=name, factor=1.1))
            assert failed(adapter, **given) == [f"{name}, {when}"]
            assert failed(adapter, tolerance=0.2, **given) == []
            forge(adapter, partial(set_loss, when=when, name=name, factor=1 / 1.1))
    assert failed(adapter, **given) == []


def test_numbers_and_figures_that_nothing_stands_behind(adapter, saved_llama):
    forge(adapter, lambda receipt: receipt["forget"].update(rows=1000))
    assert failed(adapter, model_name_or_path=saved_llama) == ["rows to forget"]
    forge(adapter, lambda receipt: receipt["forget"].update(rows=6))
    forge(adapter, lambda receipt: receipt["metrics"]["after"].update(forget_quality=1.0))
    assert failed(adapter, model_name_or_path=saved_llama) == ["receipt's figures"]


def test_a_row_that_nobody_asked_for_hides_no_figure(adapter, tmp_path):
    def hide(receipt):
        receipt["forget"]["row_hashes"].append("0" * 64)
        receipt["forget"]["rows"] += 1
        receipt["metrics"]["after"]["forget_answer_loss"] = 99.0

    forge(adapter, hide)
    checks = verified(
        adapter, forget=str(tmp_path / "forget.jsonl"), retain=str(tmp_path / "retain.jsonl"), tolerance=1e-4
    )
    assert checks["passed"].all()
    why = "not measured: 6 of the request's 7 rows are given"
    assert unmeasured(checks) == {"forget_answer_loss, before": why, "forget_answer_loss, after": why}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            lambda metrics: metrics.clear(),
            "3 steps were trained, and ['forget_answer_loss, before', 'retain_answer_loss, before', "
            "'forget_answer_loss, after', 'retain_answer_loss, after'] are missing",
        ),
        (
            lambda metrics: metrics["after"].pop("retain_answer_loss"),
            "3 steps were trained, and ['retain_answer_loss, after'] are missing",
        ),
        # The card would show it as a model's that never saw the set.
        (
            lambda metrics: metrics.update(retain_only={"forget_quality": 0.99}),
            "no training and no evaluation writes ['retain_only']",
        ),
        (
            lambda metrics: metrics.update(evaluation={"best": {"forget_quality": 0.99}}),
            "no training and no evaluation writes ['best']",
        ),
        (
            lambda metrics: metrics["after"].update(forget_quality=0.99),
            "no training and no evaluation writes ['forget_quality, after']",
        ),
    ],
)
def test_figures_that_are_missing_or_that_nothing_measures(change, found, adapter, saved_llama):
    forge(adapter, lambda receipt: change(receipt["metrics"]))
    checks = verified(adapter, model_name_or_path=saved_llama)
    assert checks.loc[~checks["passed"], ["check", "found"]].values.tolist() == [["receipt's figures", found]]


@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        (r"(\| forget answer loss .*\n)", r"\1| forget quality | 0.01 | 0.99 |\n"),
        # A row of one cell, in Markdown.
        (r"(\| retain answer loss .*\n)", r"\1forget quality after: 0.99\n"),
        (r"\n## Limits", "\n | forget quality |\n | --- |\n | 0.99 |\n\n## Limits"),
        # In a quote, without bars at the ends, in HTML.
        (r"\n## Limits", "\n> | forget quality |\n> | --- |\n> | 0.99 |\n\n## Limits"),
        (r"\n## Limits", "\nforget quality | after\n--- | ---\n0.99 | 1\n\n## Limits"),
        (r"\n## Limits", "\n<TABLE><tr><td>forget quality</td><td>0.99</td></tr></TABLE>\n\n## Limits"),
        (r"\| learning_rate \| .* \|", "| learning_rate | 1.0 |"),
        (r"\| seed \| 42 \|\n", ""),
    ],
)
def test_a_table_of_the_card_that_is_not_the_receipts_is_told_although_its_hash_is_right(
    pattern, new, adapter, saved_llama
):
    replace(adapter / "README.md", pattern, new)
    receipt = with_card(read_receipt(adapter), (adapter / "README.md").read_text())
    (adapter / RECEIPT_NAME).write_text(as_text(receipt))
    assert failed(adapter, model_name_or_path=saved_llama) == ["model card's figures"]


def test_a_receipt_of_another_format_is_refused(adapter):
    forge(adapter, lambda receipt: receipt.update(format=1))
    with pytest.raises(ValueError, match="^folder: .* is of format 1, and this rfa-llm reads format 2; use"):
        verify(VerifyArguments(folder=str(adapter)))


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    """The lowest bit of the last byte, which is of a weight."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def set_json(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def replace(file: Path, pattern: str, new: str) -> None:
    text, number = re.subn(pattern, new, file.read_text())
    assert number
    file.write_text(text)


@pytest.mark.parametrize(
    ("file", "change", "names"),
    [
        ("README.md", append, ["model card"]),
        ("README.md", partial(replace, pattern="Unlearning is approximate", new="It is exact"), ["model card"]),
        ("README.md", partial(replace, pattern=r"loss \| \d", new="loss | 9"), ["model card", "model card's figures"]),
        ("README.md", Path.unlink, ["model card", "model card's figures"]),
        ("adapter_model.safetensors", flip, ["adapter's weights"]),
        ("adapter_model.safetensors", cut, ["adapter's weights", "adapter on its base"]),
        # The path of a folder of the same name is no other base; its weights are held against the receipt.
        ("adapter_config.json", partial(set_json, base_model_name_or_path="once/it/was/here/model"), []),
        ("adapter_config.json", partial(set_json, lora_alpha=9), ["adapter's configuration"]),
        ("adapter_config.json", partial(set_json, more=None), ["adapter's configuration"]),
        ("adapter_config.json", partial(set_json, base_model_name_or_path="me/base"), ["base's name"]),
        ("adapter_config.json", partial(set_json, revision="v2"), ["base's name"]),
        ("tokenizer.json", append, ["tokenizer"]),
        ("tokenizer_config.json", Path.unlink, ["tokenizer"]),
        # One that was not there, and that whoever serves from the folder would use.
        ("chat_template.jinja", lambda file: file.write_text("{{ messages }}"), ["tokenizer"]),
    ],
)
def test_a_change_of_any_file_is_told_by_its_name(file, change, names, adapter, saved_llama):
    change(adapter / file)
    assert failed(adapter, model_name_or_path=saved_llama) == names


def leaves(value, path=()):
    """The path of every value in nested dicts and lists."""
    if isinstance(value, (dict, list)) and value:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def test_a_change_of_anything_in_the_receipt_is_told(adapter):
    text = (adapter / RECEIPT_NAME).read_text()
    paths = list(leaves(json.loads(text)))
    assert ("metrics", "after", "forget_answer_loss") in paths and ("card",) in paths and ("sha256",) in paths
    for *above, last in paths:
        receipt = json.loads(text)
        place = receipt
        for key in above:
            place = place[key]
        place[last] = "something else"
        (adapter / RECEIPT_NAME).write_text(json.dumps(receipt))
        with pytest.raises(ValueError, match="is not what its own hash says; give the file as it was written"):
            failed(adapter)


LOSS = '"forget_answer_loss"'
FALSE = '"metrics": {"after": {"forget_answer_loss": 99.0}}'


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        # JSON keeps the second of two keys, and whoever reads the file sees the first.
        (lambda text: text.replace("{", f"{{\n  {FALSE},", 1), r"is no receipt \(.*it has the key 'metrics' twice"),
        (lambda text: text.replace(LOSS, f"{LOSS}: 99.0, {LOSS}"), "is no receipt"),
        (lambda text: text.replace(LOSS, f'"forget\\u005fanswer_loss": 99.0, {LOSS}'), "is no receipt"),
        (lambda text: " " + text, "is not laid out as a receipt is"),
        (lambda text: text.replace("\n", "\r\n"), "is not laid out as a receipt is"),
        (lambda text: json.dumps(json.loads(text), indent=1), "is not laid out as a receipt is"),
        (lambda text: "[" * 100_000, "is no receipt"),
    ],
)
def test_bytes_that_no_hash_covers_are_told(change, sentence, adapter):
    file = adapter / RECEIPT_NAME
    file.write_bytes(change(file.read_text()).encode())
    with pytest.raises(ValueError, match=f"^folder: .*{RECEIPT_NAME} {sentence}.* as it was written"):
        failed(adapter)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("metrics", None, "metrics is None"),
        ("metrics", [], "metrics is []"),
        ("metrics.before", [], "metrics.before is []"),
        ("metrics.after.forget_answer_loss", "99", "metrics.after.forget_answer_loss is '99'"),
        ("metrics.evaluation", {"after": {"model_utility": None}}, "metrics.evaluation.after.model_utility is None"),
        ("card", 5, "card is 5"),
        ("adapter", {}, "adapter.weights is missing"),
        ("base_model", {}, "base_model.name is missing"),
        ("base_model.revision", 2, "base_model.revision is 2"),
        ("base_model.quantization", {}, "base_model.quantization.quant_method is missing"),
        ("settings", {}, "settings.steps is missing"),
        ("settings.max_length", "20", "settings.max_length is '20'"),
        ("forget", {}, "forget.rows is missing"),
        ("forget.row_hashes", ["a", {}], "forget.row_hashes is {}"),
        ("retain", [{"rows": 10}], "retain is [{'rows': 10}]"),
    ],
)
def test_a_receipt_that_lacks_what_is_read_is_none(path, value, said, adapter):
    receipt = read_receipt(adapter)
    *above, last = path.split(".")
    place = receipt
    for key in above:
        place = place[key]
    place[last] = value
    (adapter / RECEIPT_NAME).write_text(as_text(sealed(receipt)))
    sentence = f"{adapter / RECEIPT_NAME} is no receipt ({said}); give the file as it was written."
    with pytest.raises(ValueError, match=f"^folder: {re.escape(sentence)}$"):
        failed(adapter)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("adapter_config.json", lambda file: file.write_text("{"), "no adapter's configuration (Expecting"),
        ("adapter_config.json", lambda file: file.write_text("[]"), "(all of it is [])"),
        ("adapter_config.json", lambda file: file.write_text("{}"), "(base_model_name_or_path is missing)"),
        ("adapter_config.json", partial(set_json, revision=7), "(revision is 7)"),
        ("adapter_config.json", partial(replace, pattern=r"^\{", new='{"r": 64,'), "(it has the key 'r' twice)"),
        ("adapter_config.json", Path.unlink, "has no adapter_config.json; give the folder"),
        ("adapter_model.safetensors", Path.unlink, "has no adapter_model.safetensors; give the folder"),
    ],
)
def test_files_of_no_adapter_end_the_checks_with_their_list(file, change, said, adapter):
    change(adapter / file)
    checks = verified(adapter)
    assert checks.loc[~checks["passed"], "check"].tolist() == ["adapter's files"]
    assert said in checks.loc[~checks["passed"], "found"].item()
    assert unmeasured(checks) == dict.fromkeys(FIGURES, "not measured: the adapter cannot be read")


@pytest.mark.parametrize("change", [{"peft_type": "FOO"}, {"r": "x"}, {"lora_alpha": "x"}, {"target_modules": 5}])
def test_a_configuration_that_peft_cannot_read_is_told_by_its_name(change, adapter, saved_llama):
    set_json(adapter / "adapter_config.json", **change)
    # Nothing is loaded: there is no such base.
    checks = verified(adapter, model_name_or_path="no/where")
    assert checks.loc[~checks["passed"], "check"].tolist() == ["adapter's configuration"]
    why = "not measured: the adapter's configuration is not the receipt's"
    assert unmeasured(checks) == dict.fromkeys(FIGURES, why)
    words = ["--forgotten", "some rows", "--base_model", "me/base"]
    with pytest.raises(ValueError, match=f"^folder: the adapter in .* is not the one of its {RECEIPT_NAME}"):
        publish_cli.main([str(adapter), "me/adapter", *words])
    # Nor is it one where the receipt was made for it.
    receipt = {**read_receipt(adapter), "adapter": adapter_digests(adapter)}
    (adapter / RECEIPT_NAME).write_text(as_text(sealed(receipt)))
    assert failed(adapter, model_name_or_path=saved_llama) == ["adapter on its base"]


def test_a_base_of_another_name_is_not_loaded(adapter):
    set_json(adapter / "adapter_config.json", base_model_name_or_path="no/where")
    assert failed(adapter) == ["base's name"]


def test_a_base_that_does_not_load_is_told_by_its_name(adapter, saved_llama, tmp_path):
    given = {"model_name_or_path": saved_llama, "forget": str(tmp_path / "forget.jsonl")}
    cut(Path(saved_llama) / "model.safetensors")
    checks = verified(adapter, **given)
    assert checks.loc[~checks["passed"], "check"].tolist() == ["base's weights"]
    assert unmeasured(checks) == dict.fromkeys(FIGURES, "not measured: the base does not load")
    # Weights of other sizes than the configuration says.
    tiny_llama().save_pretrained(saved_llama)
    set_json(Path(saved_llama) / "config.json", vocab_size=7)
    assert failed(adapter, **given) == ["base's weights"]
    tiny_llama().save_pretrained(saved_llama)
    assert failed(adapter, **given) == []
    forge(adapter, lambda receipt: receipt["base_model"].update(dtype="float1"))
    assert failed(adapter, **given) == ["base's weights"]


def test_a_card_whose_front_matter_is_broken_has_no_figures(adapter):
    receipt = read_receipt(adapter)
    card = (adapter / "README.md").read_text()
    assert has_figures_of(card, receipt)
    assert not has_figures_of(card.replace("---\n", "---\n{\n", 1), receipt)
    assert not has_figures_of(card.replace("---\n", "---\nmodel-index:\n- name: a\n  results: text\n", 1), receipt)
    # Nor has one of another base, or where a figure is too large to be printed.
    named = {**receipt, "base_model": {**receipt["base_model"], "name": "me/base"}}
    base = re.search(r"base_model: (.*)\n", card)[1]
    assert not has_figures_of(card, named)
    assert has_figures_of(card.replace(f"base_model: {base}\n", "base_model: me/base\n"), named)
    receipt["metrics"]["after"]["forget_answer_loss"] = 10**400
    assert not has_figures_of(card, receipt)


def test_an_evaluation_is_held_against_the_published_one(adapter, tmp_path):
    log = tmp_path / "log.json"
    log.write_text(json.dumps({"forget_Q_A_Prob": {"agg_value": 0.30}, "model_utility": {"agg_value": 0.5}}))
    with pytest.raises(ValueError, match="^log: the receipt in .* has no evaluation"):
        failed(adapter, log=str(log))

    def publish(receipt):
        receipt["metrics"]["evaluation"] = {
            "after": {"forget_prob": 0.29, "model_utility": 0.6, "privleak": 0.1},
            "before": {"forget_prob": 0.9, "model_utility": 0.5},
            "retain_only": {"forget_prob": 0.31, "model_utility": 0.4},
        }

    forge(adapter, publish)
    checks = verified(adapter, log=str(log))
    assert checks.loc[~checks["passed"], "check"].tolist() == ["model_utility, evaluation after"]
    # A figure that was published and is not measured again is no proof.
    why = {line: found for line, found in unmeasured(checks).items() if "evaluation" in line}
    assert why == {
        "privleak, evaluation after": "not measured: the new log has none",
        "forget_prob, evaluation before": "not measured: give a new log as --before_log",
        "model_utility, evaluation before": "not measured: give a new log as --before_log",
        "forget_prob, evaluation retain_only": "not measured: give a new log as --retain_log",
        "model_utility, evaluation retain_only": "not measured: give a new log as --retain_log",
    }
    assert failed(adapter, before_log=str(log)) == ["forget_prob, evaluation before"]
    assert failed(adapter, retain_log=str(log)) == ["model_utility, evaluation retain_only"]


@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}])
def test_a_quantized_base_is_loaded_as_it_was(bits, make_trainer, tokenizer, forget, tmp_path):
    path = str(tmp_path / "wide")
    tiny_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    trainer = make_trainer(model=path, quantization_config=BitsAndBytesConfig(**bits))
    trainer.train()
    trainer.save_model()
    forget.to_json(tmp_path / "forget.jsonl")
    assert failed(tmp_path / "adapter", forget=str(tmp_path / "forget.jsonl")) == []
    # The same checkpoint without the quantization is another base.
    forge(tmp_path / "adapter", lambda receipt: receipt["base_model"].update(quantization=None))
    assert "base's weights" in failed(tmp_path / "adapter")


def test_rows_that_the_training_had_cut_are_cut_again(make_trainer, saved_llama, tmp_path):
    rows = Dataset.from_list(
        [{"question": "w1 ?", "answer": " ".join(f"w{i + k}" for k in range(40))} for i in (1, 2)]
    )
    trainer = make_trainer({"max_length": 20}, model=saved_llama, forget_dataset=rows)
    trainer.train()
    trainer.save_model()
    rows.to_json(tmp_path / "forget.jsonl")
    assert failed(tmp_path / "adapter", forget=str(tmp_path / "forget.jsonl"), tolerance=1e-4) == []


def test_the_command_lists_the_checks_and_fails_with_the_names(adapter, tmp_path, capsys):
    verify_cli.main([str(adapter), "--use_cpu", "true"])
    printed = capsys.readouterr().out
    assert printed.count("ok  ") == 12 and "FAIL" not in printed and "base's weights" in printed
    assert re.findall("^--    (.*?) +not measured: give", printed, re.M) == FIGURES
    tiny_rows(2, first=40).to_json(tmp_path / "foreign.jsonl")
    with pytest.raises(ValueError, match="^forget, retain: .* the receipt was made of: rows in the request; give"):
        verify_cli.main([str(adapter), "--use_cpu", "true", "--forget", str(tmp_path / "foreign.jsonl")])
    assert "FAIL  rows in the request" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "^folder: none is given; give it as `rfa-llm verify FOLDER`"),
        (["nowhere"], f"^folder: 'nowhere' has no {RECEIPT_NAME}"),
        (["ADAPTER", "--forget", "nowhere.jsonl"], "^forget is 'nowhere.jsonl', but there is no such file"),
        (["ADAPTER", "--forget", "x.jsonl", "--salt", "nowhere"], "^salt: 'nowhere' is no file with 64"),
        (["ADAPTER", "--tolerance", "-1"], "^tolerance: -1.0 is not 0 or more"),
        (["ADAPTER", "--batch_size", "0"], "^batch_size: 0 must be 1 or more"),
        (["ADAPTER", "--model_name_or_path", "no/where"], "^model_name_or_path: 'no/where' cannot be loaded; pass"),
    ],
)
def test_bad_input_is_named(words, sentence, adapter):
    with pytest.raises(ValueError, match=sentence):
        verify_cli.main([str(adapter) if word == "ADAPTER" else word for word in words])


def test_close_is_absolute_for_small_figures_and_a_share_of_large_ones():
    published = {"small": 0.01, "large": 100.0}
    assert [passed for _, passed, _ in compared("x", {"small": 0.02, "large": 101.0}, published, 0.015)] == [
        True,
        True,
    ]
    assert [passed for _, passed, _ in compared("x", {"small": 0.03, "large": 102.0}, published, 0.015)] == [False] * 2
    assert compared("x", {}, published, 0.015) == []
    # One that was left out of the receipt is told.
    assert compared("x", {"other": 0.5}, published, 0.015) == [("other, x", None, "0.5, and the receipt has none")]


@pytest.mark.parametrize(
    ("found", "published", "close"),
    [(0.0509, 0.031, False), (1e-12, 0.0199, False), (0.0, 1e-9, False), (1.01e-12, 1e-12, True), (0.98, 0.99, True)],
)
def test_p_values_are_compared_by_their_size(found, published, close):
    quality = {"forget_quality": published, "forget_prob": published}
    checks = compared("after", dict.fromkeys(quality, found), quality, 0.02)
    assert [passed for _, passed, _ in checks] == [close, True]
