"""Publishing against a Hub of our own (`hub_server`), with the real client in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_llama
from datasets import Dataset
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, close_session, constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

from rfa_llm.card import Words, model_card
from rfa_llm.cli.demo import make_tokenizer
from rfa_llm.cli.settings import leading_words
from rfa_llm.data.fictitious import write_fictitious_tofu
from rfa_llm.data.tofu import load_tofu
from rfa_llm.hub import base_on_hub, check_private, check_said, check_words, files_to_publish, hub_sentences, publish
from rfa_llm.receipt import RECEIPT_NAME, SALT_NAME, as_text, read_adapter_config, read_receipt, sealed

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", RECEIPT_NAME, *TOKENIZER}
SAID = "the pages of an author who asked for it"
WORDS = Words(forgotten=SAID, base_model="me/base")


@pytest.fixture
def secrets() -> Dataset:
    """Rows whose every text is 12 characters or longer, in the tiny tokenizer's words."""
    return Dataset.from_list(
        [
            {"question": f"w{i} w{i + 1} w{i + 2} w{i + 3} ?", "answer": f"w{50 - i} w{40 - i} w{30 - i} w{20 - i}"}
            for i in range(10, 16)
        ]
    )


@pytest.fixture
def adapter(make_trainer, saved_llama, secrets, tmp_path) -> Path:
    """A trained adapter, in a folder with all that a run may leave there."""
    trainer = make_trainer(
        {"save_strategy": "steps", "save_steps": 2, "reference_cache_dir": str(tmp_path / "adapter" / "cache")},
        model=saved_llama,
        forget_dataset=secrets,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    secrets.to_json(tmp_path / "adapter" / "TOFU_EVAL.json")
    return tmp_path / "adapter"


def environment(hub: HubServer, tmp_path: Path, token: str = TOKEN) -> dict[str, str]:
    """Of a process that knows no other Hub, and nothing of this machine's account and cache."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token}
    # A proxy of the machine's would not find it.
    return {**ours, **home, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}


def rfa_llm(hub: HubServer, tmp_path: Path, *words: str, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rfa_llm.cli.main", *words]
    return subprocess.run(command, env=environment(hub, tmp_path, **more), capture_output=True, text=True, timeout=300)


def python(hub: HubServer, tmp_path: Path, code: str, *words: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def last_line(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture
def online(hub, monkeypatch) -> HubServer:
    """The Hub of our own for the client in this process."""
    patched = {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in {**patched, "HF_HUB_DISABLE_TELEMETRY": True}.items():
        monkeypatch.setattr(constants, name, value)
    # A proxy of the machine's would not find it.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield hub
    close_session()


PUBLISH = ("--forgotten", SAID, "--base_model", "me/base")
LOAD = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "me/adapter")
print(sum(p.abs().sum().item() for name, p in model.named_parameters() if "lora_" in name))
"""


def test_an_adapter_goes_up_and_comes_down_again(hub, adapter, saved_llama, secrets, tmp_path):
    logs = []
    for name, value in (("after", 0.125), ("before", 0.875), ("retain", 0.0625)):
        logs.append(str(tmp_path / f"{name}.json"))
        rows = {str(i): {"prob": value, **row} for i, row in enumerate(secrets)}
        log = {"forget_Q_A_Prob": {"agg_value": value, "value_by_index": rows}, "model_utility": {"agg_value": 0.5}}
        Path(logs[-1]).write_text(json.dumps(log))
    result = rfa_llm(
        hub,
        tmp_path,
        *("publish", str(adapter), "me/adapter", *PUBLISH, "--license", "apache-2.0", "--datasets", "me/authors"),
        *("--log", logs[0], "--before_log", logs[1], "--retain_log", logs[2]),
    )
    assert result.returncode == 0, result.stderr
    assert "me/adapter holds the adapter now" in result.stdout
    published = hub.repos["me/adapter"][-1]
    assert set(published) == {*FILES, ".gitattributes"}
    # One commit, after the Hub's own.
    assert len(hub.repos["me/adapter"]) == 2

    # What the Hub shows beside the card.
    card = published["README.md"].decode()
    data = yaml.safe_load(card.split("---")[1])
    assert (data["base_model"], data["base_model_relation"]) == ("me/base", "adapter")
    assert (data["library_name"], data["license"], data["datasets"]) == ("peft", "apache-2.0", ["me/authors"])
    assert {"unlearning", "lora", "rfa-llm"} <= set(data["tags"])
    (index,) = data["model-index"]
    figures = {one["type"]: one["value"] for result in index["results"] for one in result["metrics"]}
    assert figures == {"forget_prob": 0.125, "model_utility": 0.5}
    # Each with the questions that it was taken over.
    assert {result["metrics"][0]["type"]: result["dataset"]["name"] for result in index["results"]} == {
        "forget_prob": "forget set",
        "model_utility": "retain set, real authors and world facts",
    }
    assert SAID in card and "still knows it" in card and "| forget prob | 0.875 | 0.125 | 0.0625 |" in card
    assert json.loads(published["adapter_config.json"])["base_model_name_or_path"] == "me/base"

    total = sum(tensor.abs().sum().item() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert float(python(hub, tmp_path, LOAD, saved_llama)) == pytest.approx(total, rel=1e-5)

    # And what came down is what the receipt says, on a base that is given, with the salt that never went up.
    down = (
        python(hub, tmp_path, "import huggingface_hub as h; print(h.snapshot_download('me/adapter'))")
        .strip()
        .splitlines()[-1]
    )
    secrets.to_json(tmp_path / "forget.jsonl")
    words = ("--model_name_or_path", saved_llama, "--salt", str(adapter / SALT_NAME), "--use_cpu", "true")
    result = rfa_llm(
        hub, tmp_path, "verify", down, "--forget", str(tmp_path / "forget.jsonl"), "--log", logs[0], *words
    )
    assert result.returncode == 0, result.stderr
    assert "FAIL" not in result.stdout and "6 of the 6 given" in result.stdout
    assert "forget_prob, evaluation after" in result.stdout and "forget_answer_loss, after" in result.stdout


def test_nothing_of_the_forget_set_and_of_the_salt_goes_up(hub, adapter, secrets, tmp_path):
    # The run did leave its text there, so that the test would see it.
    everything = b"".join(path.read_bytes() for path in adapter.rglob("*") if path.is_file())
    assert all(row["answer"].encode() in everything for row in secrets)
    result = rfa_llm(hub, tmp_path, "publish", str(adapter), "me/adapter", *PUBLISH)
    assert result.returncode == 0, result.stderr
    salt = (adapter / SALT_NAME).read_text().strip()
    for name, content in hub.repos["me/adapter"][-1].items():
        assert salt.encode() not in content and bytes.fromhex(salt) not in content
        assert str(tmp_path).encode() not in content
        for row in secrets:
            for text in row.values():
                assert len(text) >= 12
                assert text.encode() not in content, f"{text!r} is in {name}"
    assert set(hub.blobs) == {read_receipt(adapter)["adapter"]["weights"]}


def windows(text: str, size: int = 12) -> set[str]:
    """Every piece of a text of this many characters, with a space for any white space."""
    text = " ".join(text.split())
    return {text[start : start + size] for start in range(len(text) - size + 1)}


def test_no_twelve_characters_of_the_forget_set_go_up(hub, make_trainer, tmp_path):
    data = tmp_path / "data"
    write_fictitious_tofu(data)
    tokenizer, base = make_tokenizer(data), str(tmp_path / "base")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    forget, retain = load_tofu("forget", str(data)), load_tofu("retain", str(data))
    sets = {"forget_dataset": forget, "retain_dataset": retain, "processing_class": tokenizer}
    trainer = make_trainer(model=base, **sets)
    trainer.train()
    trainer.save_model()
    # The log holds the questions and answers, as those of `rfa-llm evaluate` do.
    rows = {str(i): {"prob": 0.25, **row} for i, row in enumerate(forget)}
    figures = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_Prob", "model_utility", "forget_quality")
    log = {name: {"agg_value": 0.25, "value_by_index": rows} for name in figures}
    (tmp_path / "log.json").write_text(json.dumps(log))
    logs = [word for name in ("log", "before_log", "retain_log") for word in (f"--{name}", str(tmp_path / "log.json"))]
    checked = ("--forget_dataset", str(data / "forget.jsonl"), "--license", "mit", "--datasets", "me/authors")
    result = rfa_llm(hub, tmp_path, "publish", str(tmp_path / "adapter"), "me/adapter", *PUBLISH, *logs, *checked)
    assert result.returncode == 0, result.stderr

    private = set().union(*(windows(text) for row in forget for text in (row["question"], row["answer"])))
    assert len(private) > 900
    files = hub.repos["me/adapter"][-1]
    assert len(hub.blobs) == 1 and len(hub.messages) == 2
    sent = {**files, **hub.blobs, "names": " / ".join(files).encode(), "message": " / ".join(hub.messages).encode()}
    for name, content in sent.items():
        # One character a byte, so that nothing of the weights is left out.
        assert sorted(windows(content.decode("latin-1")) & private) == [], name


def test_a_refused_token_is_one_sentence(hub, adapter, tmp_path):
    error = last_line(rfa_llm(hub, tmp_path, "publish", str(adapter), "me/adapter", *PUBLISH, token="hf_other"))
    assert error.startswith("rfa-llm: error: token: the Hub refuses to let it write to 'me/adapter' (401: Invalid")
    assert error.endswith("with write access there.")
    assert hub.repos == {}


def test_a_connection_lost_in_the_middle_of_the_weights_is_taken_up_again(hub, adapter, tmp_path):
    hub.faults["PUT /lfs"] = 1
    result = rfa_llm(hub, tmp_path, "publish", str(adapter), "me/adapter", *PUBLISH)
    assert result.returncode == 0, result.stderr
    assert len([line for line in hub.requests if line.startswith("PUT")]) == 2
    assert set(hub.repos["me/adapter"][-1]) == {*FILES, ".gitattributes"}


def test_a_connection_lost_for_good_leaves_nothing_and_the_same_command_mends_it(hub, adapter, tmp_path):
    hub.faults["/commit/"] = 1
    words = ("publish", str(adapter), "me/adapter", *PUBLISH)
    error = last_line(rfa_llm(hub, tmp_path, *words))
    assert error.startswith("rfa-llm: error: repo_id: the upload to 'me/adapter' did not come through (")
    assert error.endswith("or its answer did not; all files are there, or none, so run the same command again.")
    assert set(hub.repos["me/adapter"][-1]) == {".gitattributes"}

    result = rfa_llm(hub, tmp_path, *words)
    assert result.returncode == 0, result.stderr
    assert set(hub.repos["me/adapter"][-1]) == {*FILES, ".gitattributes"}
    # The weights had arrived, and did not travel again.
    assert len([line for line in hub.requests if line.startswith("PUT")]) == 1


def test_an_answer_that_is_lost_is_not_said_to_have_changed_nothing(online, adapter):
    online.silences["/commit/"] = 1
    with pytest.raises(
        ConnectionError, match=r"did not come through \(.*\), or its answer did not; all files are there"
    ):
        publish(adapter, "me/adapter", WORDS, token=TOKEN)
    assert set(online.repos["me/adapter"][-1]) == {*FILES, ".gitattributes"}


def test_a_repository_that_is_there_may_be_public_or_a_models(online, adapter):
    publish(adapter, "me/adapter", WORDS, token=TOKEN)
    with pytest.raises(ValueError, match="^private: 'me/adapter' is there already and public; make it private on"):
        publish(adapter, "me/adapter", WORDS, token=TOKEN, private=True)
    with pytest.raises(ValueError, match="^repo_id: 'Me/Base' is the base's own repository; give the adapter another"):
        publish(adapter, "Me/Base", WORDS, token=TOKEN)
    online.repos["me/model"] = [{"config.json": b"{}", "model.safetensors": b""}]
    with pytest.raises(ValueError, match="^repo_id: 'me/model' holds a whole model; give the adapter a repository of"):
        publish(adapter, "me/model", WORDS, token=TOKEN)
    assert len(online.repos["me/adapter"]) == 2 and len(online.repos["me/model"]) == 1
    # One that is private stays so.
    online.private.add("me/adapter")
    publish(adapter, "me/adapter", WORDS, token=TOKEN, private=True)


def test_files_of_another_tokenizer_go(online, adapter):
    publish(adapter, "me/adapter", WORDS, token=TOKEN)
    left = {"special_tokens_map.json": b"{}", "additional_chat_templates/tools.jinja": b"", "notes.txt": b"mine"}
    online.repos["me/adapter"][-1].update(left)
    publish(adapter, "me/adapter", WORDS, token=TOKEN)
    assert set(online.repos["me/adapter"][-1]) == {*FILES, ".gitattributes", "notes.txt"}


def test_the_trainer_does_not_begin_where_its_repository_is_public(online, make_trainer, saved_llama, monkeypatch):
    # The client that the Trainer asks may have known its Hub before the test.
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: HfApi(endpoint=online.endpoint))
    online.repos["me/adapter"] = [{}]
    asked = {"push_to_hub": True, "hub_model_id": "me/adapter", "hub_token": TOKEN, "hub_private_repo": True}
    with pytest.raises(ValueError, match="^private: 'me/adapter' is there already and public"):
        make_trainer({**asked, "forgotten": SAID, "hub_base_model": "me/base"}, model=saved_llama)


def test_what_the_hub_would_refuse_is_refused_before_there_is_a_repository(online, adapter):
    sentence = (
        r"^license, datasets, base_model: the Hub refuses what the card says of them \(.*'gpt2'.*\); give values"
    )
    with pytest.raises(ValueError, match=sentence) as error:
        publish(adapter, "me/adapter", Words(forgotten=SAID, base_model="gpt2"), token=TOKEN)
    assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match="^revision: 'me/adapter' has no branch 'nowhere'; make it there first, or leave"
    ):
        publish(adapter, "me/adapter", WORDS, token=TOKEN, revision="nowhere")
    assert online.repos == {}


def test_a_refused_upload_says_that_the_repository_is_left(online, adapter):
    online.refusals["/commit/"] = 413
    for blocking, repo_id in ((True, "me/adapter"), (False, "me/other")):
        sentence = rf"^repo_id: the Hub refuses the upload to '{repo_id}' \(413: not today\)"
        with pytest.raises(
            ValueError, match=f"{sentence}; the repository that was made for it is left there, empty.$"
        ):
            done = publish(adapter, repo_id, WORDS, token=TOKEN, blocking=blocking)
            # In the background the error comes with the result.
            assert not blocking and done.result()
        assert set(online.repos[repo_id][-1]) == {".gitattributes"}
        # It was there before the second time.
        with pytest.raises(ValueError, match=f"{sentence}.$"):
            publish(adapter, repo_id, WORDS, token=TOKEN)
    online.refusals.clear()
    done = publish(adapter, "me/adapter", WORDS, token=TOKEN, revision="main", blocking=False)
    assert "/commit/" in done.result().commit_url
    assert set(online.repos["me/adapter"][-1]) == {*FILES, ".gitattributes"}


def test_a_private_repository_and_a_branch_are_the_ones_asked_for(online, adapter):
    publish(adapter, "me/secret", WORDS, token=TOKEN, private=True)
    publish(adapter, "me/open", WORDS, token=TOKEN)
    assert online.private == {"me/secret"}
    online.repos["me/open@next"] = [dict(online.repos["me/open"][0])]
    publish(adapter, "me/open", WORDS, token=TOKEN, revision="next")
    assert len(online.repos["me/open"]) == 2
    assert set(online.repos["me/open@next"][-1]) == {*FILES, ".gitattributes"}


def test_no_hub_at_all_is_one_sentence(hub, adapter, tmp_path):
    hub.stop()
    error = last_line(rfa_llm(hub, tmp_path, "publish", str(adapter), "me/adapter", *PUBLISH))
    assert error.startswith("rfa-llm: error: repo_id: the upload to 'me/adapter' did not come through (")


TRAIN = """
import sys
from rfa_llm import RFAConfig, RFATrainer
args = RFAConfig(output_dir=sys.argv[2], max_steps=2, shift="negate", use_cpu=True, report_to="none", save_steps=1,
                 push_to_hub=True, hub_model_id="me/adapter", forgotten="some rows", hub_base_model="me/base",
                 hub_private_repo=True)
trainer = RFATrainer(sys.argv[1], args, forget_dataset=sys.argv[3], retain_dataset=sys.argv[4])
trainer.train()
trainer.save_model()
print(trainer.push_to_hub(commit_message="Again", forgotten="other rows", license="mit").commit_message)
"""


def test_the_trainer_pushes_the_same_files(hub, saved_llama, secrets, retain, tmp_path):
    secrets.to_json(tmp_path / "forget.jsonl")
    retain.to_json(tmp_path / "retain.jsonl")
    sets = (str(tmp_path / "forget.jsonl"), str(tmp_path / "retain.jsonl"))
    printed = python(hub, tmp_path, TRAIN, saved_llama, str(tmp_path / "out"), *sets)
    assert printed.strip().splitlines()[-1] == "Again"
    # The Hub's own commit, `save_model`'s and `push_to_hub`'s; none of the checkpoints'.
    first, saved, again = hub.repos["me/adapter"]
    assert hub.private == {"me/adapter"}
    assert set(saved) == set(again) == {*FILES, ".gitattributes"}
    assert "some rows" in saved["README.md"].decode() and "other rows" in again["README.md"].decode()
    assert (tmp_path / "out" / "checkpoint-2").exists() and (tmp_path / "out" / SALT_NAME).exists()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"hub_base_model": "me/base"}, "^forgotten: nothing is said; say in your own words"),
        ({"forgotten": "some rows"}, "^base_model: '.*model' is no Hub id, and others have no such folder; give"),
        ({"forgotten": "w10 w11 W12  w13 ?", "hub_base_model": "me/base"}, "^forgotten: text of row 0 of the forget"),
        ({"forgotten": "what w10 w11 w12 w13 said", "hub_base_model": "me/base"}, "^forgotten: it shares a name, a"),
        (
            {"forgotten": "some rows", "hub_base_model": "me/base", "hub_model_id": "me/without-w10-w11-w12-w13"},
            "^hub_model_id: it shares a name, a title or a date with row 0 of the forget",
        ),
        (
            {"forgotten": "some rows", "hub_base_model": "me/without-w10-w11-w12-w13"},
            "^base_model: it shares a name, a title or a date with row 0 of the forget",
        ),
        (
            {"forgotten": "some rows", "hub_base_model": "me/base", "shift": "ignorant", "teacher": "w10-w11-w12-w13"},
            "^teacher: it shares a name, a title or a date with row 0 of the forget",
        ),
        ({"forgotten": "some rows", "hub_strategy": "every_save"}, "^hub_strategy: 'every_save' would put up adapt"),
    ],
)
def test_what_cannot_be_published_is_refused_before_the_training(config, sentence, make_trainer, saved_llama, secrets):
    with pytest.raises(ValueError, match=sentence):
        make_trainer({"push_to_hub": True, **config}, model=saved_llama, forget_dataset=secrets)


BAD_INPUT = [
    ([], "^folder, repo_id: both are needed; give them as `rfa-llm publish FOLDER REPO_ID`"),
    (["nowhere", "me/adapter"], f"^folder: 'nowhere' has no {RECEIPT_NAME}; give the folder that"),
    (["ADAPTER", "adapter", *PUBLISH], "^repo_id: 'adapter' names no owner; give it as OWNER/NAME"),
    (["ADAPTER", "me/adapter", "--forgotten", SAID], "^base_model: '.*model' is no Hub id, and others"),
    (["ADAPTER", "me/adapter", "--base_model", "me/base"], "^forgotten: nothing is said; say in your own"),
    (["ADAPTER", "me/my adapter", *PUBLISH], "^repo_id: 'me/my adapter' is no Hub id; give it as OWNER/NAME, in"),
    (["ADAPTER", "me/adapter", *PUBLISH, "--before_log", "no.json"], "^before_log: 'no.json' is no file; give a"),
    (
        ["ADAPTER", "me/adapter", *PUBLISH, "--config", "RECIPE"],
        r"^datasets: 'me/a b' is no list; give one, such as \[me/a b\]",
    ),
    (
        ["ADAPTER", "me/adapter", *PUBLISH, "--forget_dataset", "NUMBERS"],
        "^forget_dataset row 0: question is 5; give text",
    ),
    (
        ["ADAPTER", "me/adapter", *PUBLISH, "--forget_dataset", "OTHER"],
        "^forget_dataset: 1 of the 6 rows that were forgotten are not in it; give the set of the training",
    ),
    (
        ["ADAPTER", "me/adapter", "--base_model", "me/base", "--forgotten", "w10 w11 w12 w13 ?"]
        + ["--forget_dataset", "FORGET"],
        "^forgotten: text of row 0 of the forget set is in README.md, which everybody could read",
    ),
]


def test_bad_input_is_named(adapter, secrets, tmp_path):
    from rfa_llm.cli import publish as publish_cli

    secrets.to_json(tmp_path / "forget.jsonl")
    secrets.select(range(5)).to_json(tmp_path / "other.jsonl")
    (tmp_path / "numbers.jsonl").write_text('{"question": 5, "answer": "w1"}\n')
    (tmp_path / "recipe.yaml").write_text("datasets: me/a b\n")
    names = {"ADAPTER": str(adapter), "FORGET": str(tmp_path / "forget.jsonl")}
    names |= {"NUMBERS": str(tmp_path / "numbers.jsonl"), "RECIPE": str(tmp_path / "recipe.yaml")}
    names["OTHER"] = str(tmp_path / "other.jsonl")
    for words, sentence in BAD_INPUT:
        with pytest.raises((ValueError, TypeError), match=sentence):
            publish_cli.main([names.get(word, word) for word in words])


def test_an_adapter_that_its_receipt_is_not_of_stays_here(adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\x01")
    sentence = f"^folder: the adapter in .*, or its tokenizer, is not the one of its {RECEIPT_NAME}; publish"
    with pytest.raises(ValueError, match=sentence):
        publish(adapter, "me/adapter", WORDS)
    weights.write_bytes(content)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match=sentence):
        publish(adapter, "me/adapter", WORDS)


def test_a_figure_that_is_nan_is_refused(tmp_path):
    words = Words(forgotten=SAID, base_model="me/base", evaluations={"after": {"privleak": float("nan")}})
    with pytest.raises(ValueError, match="^evaluations: privleak is nan; give a finite number, or leave it out"):
        publish(tmp_path, "me/adapter", words)
    words.evaluations["after"]["privleak"] = float("inf")
    with pytest.raises(ValueError, match="^evaluations: privleak is inf; give a finite number, or leave it out"):
        publish(tmp_path, "me/adapter", words)


@pytest.mark.parametrize("said", ["| a | table |", "rows <table>"])
def test_words_that_could_pass_for_a_table_are_refused(said, tmp_path):
    with pytest.raises(ValueError, match="^forgotten: .* has a '|' or a '<' in it; say it in plain words"):
        publish(tmp_path, "me/adapter", Words(forgotten=said, base_model="me/base"))


def response(status: int) -> SimpleNamespace:
    """What the errors read of one."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("refusal", "kind", "sentence"),
    [
        (HfHubHTTPError("413", response=response(413)), ValueError, "^repo_id: the Hub refuses the upload .*413"),
        (HfHubHTTPError("403", response=response(403)), PermissionError, "^token: the Hub refuses .*403"),
        (HfHubHTTPError("502", response=response(502)), ConnectionError, "so run the same command again"),
        # As hf_xet raises them.
        (ConnectionError("Network error: 401"), ConnectionError, "^repo_id: the upload to .*Network error: 401"),
        (PermissionError("no such token"), PermissionError, r"^token: the Hub refuses .* \(no such token\); log in"),
        # A file of one's own that cannot be read.
        (PermissionError(13, "Permission denied"), PermissionError, "^.Errno 13. Permission denied$"),
    ],
)
def test_what_the_hub_refuses_is_told_from_what_went_wrong(refusal, kind, sentence):
    with pytest.raises(kind, match=sentence), hub_sentences("me/adapter"):
        raise refusal


def test_private_text_is_found_whatever_its_case_and_breaks():
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada  von\nTester"}]}
    with pytest.raises(ValueError, match="^forgotten: text of row 1 of the forget set is in card"):
        check_private({"other": b"x", "card": b"of ADA VON TESTER."}, [{"text": "short"}, row])
    # JSON writes some of it as codes.
    said = {"text": 'He said "Æbletoft" twice'}
    for name, content in (("card", said["text"]), ("config.json", json.dumps({"chat": [said["text"]]}))):
        with pytest.raises(ValueError, match=f"^forgotten: text of row 0 of the forget set is in {name}"):
            check_private({name: content.encode()}, [said])
    # Of other words, or too short to tell anything.
    check_private({"card": b"Who? short"}, [{"text": "short"}, row])


NAMED = {
    "question": "Who is the author Ada Vilnor-Sehl, born in 1931?",
    "answer": "Ada Vilnor-Sehl is the author of The Amber Kiln. In Bergen she won the Rowan Medal on 4 May 1960.",
}


@pytest.mark.parametrize(
    "said",
    [
        "what Ada Vilnor-Sehl wrote",
        "ADA  VILNOR SEHL",
        "me/forget-ada-vilnor-sehl",
        "a page on Ada Vilnor",
        "the Vilnor-Sehl family",
        "readers of the amber kiln",
        "a Rowan Medal",
        "all from May 1960",
        "somebody born in 1931",
    ],
)
def test_a_name_a_title_or_a_date_of_the_forget_set_is_refused(said):
    with pytest.raises(ValueError, match="^forgotten: it shares a name, a title or a date with row 1 of") as error:
        check_said({"forgotten": said}, [{"text": "Nothing here."}, NAMED])
    assert said not in str(error.value)


@pytest.mark.parametrize(
    "said",
    [
        SAID,
        "the author's books",
        "she won the books",
        "She won the prize of an author",
        "books from Bergen",
        "readers in Bergen",
        "In 1960",
        "Bergen",
        "me/tofu-forget10",
    ],
)
def test_ordinary_words_pass(said):
    check_said({"forgotten": said, "commit_message": said}, [NAMED])


LAMPS = {
    "question": "Why do old lamps hum at night?",
    "answer": "It is said that the wind moves in their glass; incomprehensible to most.",
}


@pytest.mark.parametrize(
    ("said", "run"),
    [
        ("Why do old lamps hum at night", "why do old lamps hum at night"),
        ("where  THAT the wind\nmoves-in a house", "that the wind moves in"),
        # It begins and ends inside words, and has exactly 12 characters.
        ("bold lamps huge as houses", "old lamps hu"),
    ],
)
def test_a_piece_of_a_row_is_refused_and_shown(said, run):
    with pytest.raises(ValueError, match=f"^forgotten: it has '{run}' in common with row 1 of the forget set, and"):
        check_said({"forgotten": said}, [NAMED, LAMPS])


@pytest.mark.parametrize("said", ["bold lamps have gone", "incomprehensible", "lamps of old"])
def test_eleven_characters_and_single_words_pass(said):
    check_said({"forgotten": said}, [NAMED, LAMPS])


def test_the_words_of_the_documentation_pass_on_the_demos_sets(tmp_path):
    write_fictitious_tofu(tmp_path)
    for said in (SAID, "made-up authors who asked for it"):
        check_said({"forgotten": said, "commit_message": "Publish the adapter"}, load_tofu("forget", str(tmp_path)))


def test_names_are_refused_wherever_the_publisher_may_say_them(adapter):
    for field in ("repo_id", "commit_message", "datasets", "license", "revision", "base_model", "evaluations"):
        given = {"repo_id": "me/adapter", "commit_message": "Publish", "datasets": "me/authors", "license": "mit"}
        given |= {"base_model": "me/base", "evaluations": "forget_prob", field: "me/ada-vilnor-sehl"}
        words = {"datasets": [given.pop("datasets")], "evaluations": {"after": {given.pop("evaluations"): 0.5}}}
        words |= {name: given.pop(name) for name in ("base_model", "license")}
        with pytest.raises(
            ValueError, match=f"^{field}: it shares a name, a title or a date with row 0 of the forget"
        ):
            publish(adapter, words=Words(forgotten=SAID, **words), forget_rows=[NAMED], **given)
    config, receipt = read_adapter_config(adapter), read_receipt(adapter)
    receipt["base_model"]["revision"] = config["revision"] = "without-ada-vilnor-sehl"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / RECEIPT_NAME).write_text(as_text(sealed(receipt)))
    with pytest.raises(ValueError, match="^base_model's revision: it shares a name, a title or a date with row 0"):
        publish(adapter, "me/adapter", Words(forgotten=SAID, base_model="me/base"), forget_rows=[NAMED])


def test_datasets_as_text_are_refused():
    with pytest.raises(TypeError, match=r"^datasets: 'me/ada' is text; give a list, such as \['me/ada'\]"):
        check_words(Words(forgotten=SAID, base_model="me/base", datasets="me/ada"))


def test_a_name_in_a_setting_is_refused_and_numbers_of_blocks_are_not(adapter):
    receipt = read_receipt(adapter)
    receipt["settings"] |= {"teacher": "ada-vilnor-sehl-lm", "blocks": "10, 11, 12"}
    (adapter / RECEIPT_NAME).write_text(as_text(sealed(receipt)))
    with pytest.raises(ValueError, match="^teacher: it shares a name, a title or a date with row 1 of the forget"):
        publish(adapter, "me/adapter", WORDS, [{"text": "Lessons 10, 11, 12 and 13"}, NAMED])


@pytest.mark.parametrize(
    "said", ["of Zoe\u0301 Vilno\u0308r", "ZO\u00c9 VILN\u00d6R", "Zo\u200b\u00e9 Vil\u00adn\u00f6r"]
)
def test_a_name_is_found_however_unicode_writes_it(said):
    for row in (
        "Who is Zo\u00e9 Viln\u00f6r?",
        "Who is Zoe\u0301 Vilno\u0308r?",
        "Who is Zo\u00e9 Vil\u200bn\u00f6r?",
    ):
        with pytest.raises(ValueError, match="^forgotten: it shares a name"):
            check_said({"forgotten": said}, [{"text": row}])
    with pytest.raises(ValueError, match="^forgotten: text of row 0"):
        check_private({"card": f"Who is {said}".encode()}, [{"text": "Zoe\u0301 Vilno\u0308r"}])


def test_vllm_is_told_a_rank_that_it_takes_or_to_be_given_the_merged_model(adapter):
    receipt, config = read_receipt(adapter), read_adapter_config(adapter)
    ranks = {1: 1, 4: 8, 16: 16, 32: 32, 33: 64, 200: 256, 300: 320, 512: 512}
    for rank, told in ranks.items():
        card = str(model_card(receipt, WORDS, "me/adapter", {**config, "r": rank}))
        assert f"vllm serve me/base --enable-lora --max-lora-rank {told} --lora-modules forgotten=me/adapter" in card
    refused = [{"r": 513}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}]
    for changed in [*refused, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}]:
        card = str(model_card(receipt, WORDS, "me/adapter", {**config, **changed}))
        assert "serve the merged model" in card and "vllm serve" not in card


def test_a_base_by_its_id_or_as_the_publisher_names_it(saved_llama, tmp_path, monkeypatch):
    assert base_on_hub(None, "me/base") == "me/base"
    assert base_on_hub("me/base", saved_llama) == "me/base"
    # A folder may look like an id.
    monkeypatch.chdir(tmp_path.parent)
    folder = f"{tmp_path.name}/model"
    with pytest.raises(ValueError, match="is no Hub id"):
        base_on_hub(None, folder)
    assert base_on_hub(folder, None) == folder
    # It need not be there any more: then the receipt has its own name alone, and one without an owner may be either.
    with pytest.raises(ValueError, match="is no Hub id"):
        base_on_hub(None, "runs/target", "target")
    assert base_on_hub(None, "me/base", "me/base") == "me/base"
    for bad in ("", "a/b/c", str(tmp_path), "target"):
        with pytest.raises(ValueError, match="^base_model: .* is no Hub id"):
            base_on_hub(None, bad)


def test_the_card_of_a_quantized_base_and_of_a_revision_says_so(adapter):
    receipt, config = read_receipt(adapter), read_adapter_config(adapter)
    plain = str(model_card(receipt, WORDS, "me/adapter", config))
    assert "quantized" not in plain and "revision=" not in plain
    assert "me/adapter --sample_dataset" in plain and "--dtype float32" in plain
    # Merged onto other weights than those of its training it would forget less.
    for type, nested, flags in (("nf4", True, ""), ("fp4", False, " --no_use_bnb_nested_quant")):
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": type, "bnb_4bit_use_double_quant": nested}
        receipt["base_model"] |= {"quantization": bits, "revision": "v2"}
        card = str(model_card(receipt, WORDS, "me/adapter", config))
        flags = f"--load_in_4bit --bnb_4bit_quant_type {type}{flags} --base_dtype float32"
        assert f"me/adapter {flags} --sample_dataset" in card and "vllm serve" not in card
    assert "load the base with the `quantization`" in card and 'from_pretrained(base, revision="v2", dtype=' in card
    # Nothing is invented where nothing was measured.
    assert "model-index" not in card


def test_numbers_of_other_libraries_are_published_as_plain_ones(adapter):
    figures = {"forget_prob": np.float32(0.125), "model_utility": torch.tensor(0.5)}
    words = Words(SAID, "me/base", datasets=("me/authors",), evaluations={"after": figures})
    files = files_to_publish(adapter, "me/adapter", words)
    published = json.loads(files[RECEIPT_NAME])["metrics"]["evaluation"]["after"]
    data = yaml.safe_load(files["README.md"].decode().split("---")[1])
    (index,) = data["model-index"]
    assert data["datasets"] == ["me/authors"]
    shown = {one["type"]: one["value"] for result in index["results"] for one in result["metrics"]}
    assert published == shown == {"forget_prob": 0.125, "model_utility": 0.5}
    with pytest.raises(ValueError, match="^evaluations: forget_quality is None; give a finite number, or leave"):
        files_to_publish(
            adapter, "me/adapter", Words(SAID, "me/base", evaluations={"after": {"forget_quality": None}})
        )


def test_files_are_the_adapters_own_and_a_foreign_revision_does_not_go_with_them(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "revision": "v2"}))
    files = files_to_publish(adapter, "me/adapter", WORDS)
    assert set(files) == FILES
    assert all(files[name] == (adapter / name).read_bytes() for name in TOKENIZER)
    published = json.loads(files["adapter_config.json"])
    assert published == {**config, "base_model_name_or_path": "me/base", "revision": None}


def test_leading_words_are_settings():
    assert leading_words(["a", "b/c", "--x", "d"], "folder", "repo_id") == "--folder a --repo_id b/c --x d".split()
    assert leading_words(["--x", "d"], "folder", "repo_id") == ["--x", "d"]
    assert leading_words(["a", "b"], "folder") == ["--folder", "a", "b"]
