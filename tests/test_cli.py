"""The subcommands on a tiny model: recipes, results on disk, and how bad input ends."""

import json
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from conftest import tiny_llama, tiny_lora, tiny_rows
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from rfa_llm.cli import evaluate, finetune, unlearn
from rfa_llm.cli.launch import launch
from rfa_llm.cli.main import run
from rfa_llm.cli.settings import read_settings
from rfa_llm.config import RFAConfig
from rfa_llm.data.formats import encode
from rfa_llm.evaluation import read_log, summary
from rfa_llm.receipt import read_receipt


@pytest.fixture
def data_dir(tmp_path, forget, retain):
    """A folder of JSON Lines in TOFU's shape."""
    folder = tmp_path / "data"
    folder.mkdir()
    forget.to_json(folder / "forget.jsonl")
    retain.to_json(folder / "retain.jsonl")
    wrong = {"paraphrased_answer": "w1 w2", "perturbed_answer": ["w3", "w4 w5"]}
    for name, rows in (("forget", forget), ("retain", retain), ("real_authors", forget), ("world_facts", retain)):
        rows.map(lambda row: wrong).to_json(folder / f"{name}_perturbed.jsonl")
    return folder


def cli(command: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rfa_llm.cli.main", command, *words], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("residual", ["feature", "branch"])
def test_a_recipe_and_flags_train_an_adapter(residual, saved_llama, data_dir, tmp_path, capsys):
    recipe = {
        "forget_dataset": str(data_dir / "forget.jsonl"),
        "retain_dataset": str(data_dir / "retain.jsonl"),
        "shift": "negate",
        "blocks": [1, -1],
        "max_steps": 2,
        "lora_r": 4,
        "use_cpu": True,
        "report_to": "none",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "adapter"
    # A flag wins over the recipe.
    unlearn.main(
        ["--config", str(tmp_path / "recipe.yaml"), "--model_name_or_path", saved_llama, "--output_dir", str(out)]
        + ["--learning_rate", "0.01", "--max_steps", "3", "--residual", residual]
    )
    printed = capsys.readouterr().out
    assert "block 1 " in printed and "block 3 " in printed and str(out) in printed
    header = printed.partition("Relative residual, last step\n")[2].partition("\n")[0]
    assert header.strip().split("  ") == (["forget set", "retain set"] if residual == "feature" else ["forget set"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_llama), out)
    assert model.peft_config["default"].r == 4
    # The command's default is a branch of the Hub, and the base lies in a folder.
    assert model.peft_config["default"].revision is None
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3


def test_evaluate_writes_a_log_that_serves_as_reference(saved_llama, data_dir, tmp_path, capsys):
    words = ["--model_name_or_path", saved_llama, "--data_dir", str(data_dir), "--use_cpu", "true"]
    words += ["--forget_config", "forget_perturbed", "--max_new_tokens", "4"]
    first, second = tmp_path / "logs" / "first.json", tmp_path / "second.json"
    evaluate.main([*words, "--output_file", str(first)])
    assert "forget_quality" not in summary(read_log(first))
    before = first.read_bytes()
    with pytest.raises(ValueError, match="^output_file: '.*first.json' is there already; give another name"):
        evaluate.main([*words, "--output_file", str(first)])
    assert first.read_bytes() == before
    evaluate.main([*words, "--output_file", str(second), "--retain_log", str(first)])
    assert summary(read_log(second))["forget_quality"] == 1.0
    assert "forget_quality" in capsys.readouterr().out


def test_sets_of_the_hub_are_those_of_their_configurations(saved_llama, data_dir, tmp_path, monkeypatch):
    sets = {("forget10", "test"): tiny_rows(6, 0), ("retain90", "test"): tiny_rows(10, 20)}
    sets["holdout10", "train"] = tiny_rows(4, 40)
    monkeypatch.setattr("rfa_llm.data.formats.load_dataset", lambda name, config, split: sets[config, split])
    out = tmp_path / "adapter"
    unlearn.main(
        ["--model_name_or_path", saved_llama, "--output_dir", str(out), "--max_steps", "1", "--use_cpu"]
        + ["--forget_dataset", "me/rows", "--forget_config", "forget10", "--dataset_split", "test"]
        + ["--retain_dataset", "me/rows", "--retain_config", "retain90", "--report_to", "none"]
    )
    receipt = read_receipt(out)
    assert (receipt["forget"]["rows"], receipt["retain"]["rows"]) == (6, 10)

    facts = tmp_path / "facts"
    facts.mkdir()
    for name in ("real_authors", "world_facts"):
        shutil.move(data_dir / f"{name}_perturbed.jsonl", facts)
    words = ["--model_name_or_path", saved_llama, "--data_dir", str(data_dir), "--facts_dir", str(facts), "--use_cpu"]
    words += [
        "--forget_config",
        "forget_perturbed",
        "--max_new_tokens",
        "4",
        "--output_file",
        str(tmp_path / "log.json"),
    ]
    with pytest.raises(ValueError, match="^gradient_norm: it is an attack against a holdout set, but none is given"):
        evaluate.main([*words, "--gradient_norm"])
    evaluate.main([*words, "--holdout_dataset", "me/rows", "--holdout_config", "holdout10", "--gradient_norm"])
    attack = read_log(tmp_path / "log.json")["mia_gradnorm"]
    assert {half: len(attack[half]["value_by_index"]) for half in ("forget", "holdout")} == {"forget": 6, "holdout": 4}


def test_evaluate_refuses_an_adapter_of_another_model(saved_llama, data_dir, tmp_path):
    # peft would take the two blocks that fit, and say nothing of the others.
    shallow = tiny_llama(num_hidden_layers=2)
    get_peft_model(shallow, tiny_lora(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    words = ["--model_name_or_path", saved_llama, "--data_dir", str(data_dir), "--use_cpu", "true"]
    words += ["--forget_config", "forget_perturbed", "--adapter_name_or_path", str(tmp_path / "adapter")]
    with pytest.raises(ValueError, match="^model_name_or_path: the adapter .* does not fit .* 4 too few"):
        evaluate.main([*words, "--output_file", str(tmp_path / "log.json")])
    with pytest.raises(ValueError, match="^adapter_name_or_path: .* is no adapter"):
        evaluate.main([*words[:-1], str(data_dir), "--output_file", str(tmp_path / "log.json")])
    assert not (tmp_path / "log.json").exists()


@pytest.mark.parametrize("dataclass", [RFAConfig, finetune.FinetuneConfig])
def test_resume_from_checkpoint_is_a_folder_or_a_yes(dataclass, tmp_path):
    for text, value in (("true", True), ("False", False), ("some/folder", "some/folder")):
        words = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", text]
        (settings,) = read_settings((dataclass,), "unlearn", words)
        assert settings.resume_from_checkpoint == value


def test_finetune_is_refused_where_several_processes_were_started(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^args: 2 processes were started, and a model is fine-tuned here in one"):
        finetune.main(["--model_name_or_path", "x", "--train_dataset", "y", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("command", [finetune, evaluate], ids=["finetune", "evaluate"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/model", "^model_name_or_path: 'no/such/model' is no model .there is no such folder"),
        # transformers would load it onto its base without a word.
        ("lora", "^model_name_or_path: '.*lora' is an adapter and no whole model; give"),
    ],
)
def test_what_is_no_model_is_named(model, message, command, data_dir, tmp_path):
    if model == "lora":
        model = str(tmp_path / "lora")
        get_peft_model(tiny_llama(), tiny_lora(target_modules=["q_proj"])).save_pretrained(model)
    words = {
        finetune: ["--train_dataset", str(data_dir / "forget.jsonl"), "--output_dir", str(tmp_path / "out")],
        evaluate: ["--data_dir", str(data_dir), "--forget_config", "forget_perturbed"],
    }
    with pytest.raises(ValueError, match=message):
        command.main(["--model_name_or_path", model, *words[command]])
    assert not (tmp_path / "out").exists()


def test_weights_that_are_cut_short_end_with_a_sentence(saved_llama, data_dir, tmp_path):
    broken = shutil.copytree(saved_llama, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = ["--model_name_or_path", str(broken), "--data_dir", str(data_dir), "--forget_config", "forget_perturbed"]
    with pytest.raises(SystemExit, match="^rfa-llm: error: .*incomplete"):
        run(evaluate.main, words)


@pytest.mark.parametrize("use_peft", ["true", "false"])
def test_finetune_lowers_the_loss_of_its_rows(use_peft, saved_llama, data_dir, tmp_path, tokenizer, forget):
    from rfa_llm.evaluation import answer_losses

    out = tmp_path / "tuned"
    finetune.main(
        ["--model_name_or_path", saved_llama, "--train_dataset", str(data_dir / "forget.jsonl")]
        + ["--output_dir", str(out), "--max_steps", "20", "--learning_rate", "0.02", "--use_peft", use_peft]
        + ["--use_cpu", "--report_to", "none"]
    )
    before, after = (
        torch.tensor(answer_losses(AutoModelForCausalLM.from_pretrained(path), tokenizer, list(forget)))
        for path in (saved_llama, out)
    )
    assert after.mean() < 0.7 * before.mean()


def test_a_finetuning_learns_the_answers_alone(tokenizer, forget, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = finetune.finetune_trainer(tiny_llama(), tokenizer, forget, args)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in (0, 3)])
    for index, labels in zip((0, 3), batch["labels"].tolist(), strict=True):
        encoded = encode(forget[index], tokenizer)
        answer = encoded["input_ids"][encoded["answer_start"] :]
        assert answer[-1] == tokenizer.eos_token_id
        assert [label for label in labels if label != -100] == answer
        assert labels[: encoded["answer_start"]] == [-100] * encoded["answer_start"]


def test_finetune_goes_on_from_a_checkpoint_and_refuses_what_it_would_not_do(saved_llama, data_dir, tmp_path):
    words = ["--model_name_or_path", saved_llama, "--train_dataset", str(data_dir / "forget.jsonl"), "--use_cpu"]
    words += ["--report_to", "none", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    finetune.main([*words, "--output_dir", str(tmp_path / "whole")])
    half = tmp_path / "whole" / "checkpoint-2"
    shutil.rmtree(tmp_path / "whole" / "checkpoint-4")
    finetune.main([*words, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", str(half)])
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "resumed" / "checkpoint-2").exists()
    with pytest.raises(ValueError, match="^load_in_4bit, load_in_8bit: a whole model is saved here"):
        finetune.main([*words, "--output_dir", str(tmp_path / "small"), "--load_in_4bit"])
    with pytest.raises((ValueError, ImportError), match="no_such_attention"):
        finetune.main([*words, "--output_dir", str(tmp_path / "other"), "--attn_implementation", "no_such_attention"])


def test_bad_input_is_one_sentence_and_a_failing_exit(saved_llama, data_dir, tmp_path):
    words = ("--model_name_or_path", saved_llama, "--output_dir", str(tmp_path / "adapter"), "--use_cpu")
    result = cli("unlearn", *words, "--forget_dataset", "nowhere.jsonl")
    assert result.returncode == 1
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("rfa-llm: error: forget_dataset") and "nowhere.jsonl" in error
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "adapter").exists()


def test_debug_shows_where_an_error_comes_from():
    def command(argv):
        raise ValueError(f"bad {argv}")

    with pytest.raises(ValueError, match=r"bad \['--x'\]"):
        run(command, ["--x", "--debug"])
    with pytest.raises(SystemExit, match="rfa-llm: error: bad"):
        run(command, ["--x"])


@pytest.mark.parametrize("command", ["unlearn", "evaluate"])
def test_a_missing_model_is_named(command):
    module = {"unlearn": unlearn, "evaluate": evaluate}[command]
    with pytest.raises(ValueError, match="model_name_or_path: no model is given"):
        module.main(["--output_dir", "x"] if command == "unlearn" else [])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ddp_cpu", "--num_processes", "0"], "^num_processes: '0' is no number of processes; give 1 or more"),
        (["ddp_cpu", "--num_processes", "-1"], "^num_processes: '-1' is no number"),
        (["ddp_cpu", "--num_processes", "two"], "^num_processes: 'two' is no number"),
        (["single_cpu", "--num_processes", "2"], "^num_processes: 2, but accelerate_config 'single_cpu' runs one"),
        (["single", "--num_processes", "4"], "^num_processes: 4, but accelerate_config 'single' runs one"),
        (["configs/unlearn.yaml"], "^accelerate_config: 'configs/unlearn.yaml' names no distributed_type"),
        (["LICENSE"], "^accelerate_config: 'LICENSE' is no YAML; give a file"),
    ],
)
def test_a_launch_that_cannot_be_meant_starts_no_process(words, sentence, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(ValueError, match=sentence):
        launch(["--accelerate_config", *words])


@pytest.mark.parametrize("mode", ["single_cpu", "ddp_cpu"])
def test_a_launch_that_fails_ends_with_sentences_and_no_traceback(mode, tmp_path):
    words = ("--model_name_or_path", "x", "--output_dir", str(tmp_path / "adapter"), "--forget_dataset", "no.jsonl")
    result = cli("unlearn", "--accelerate_config", mode, *words)
    assert result.returncode == 1
    assert "rfa-llm: error: forget_dataset is 'no.jsonl', but there is no such file; give" in result.stderr
    assert result.stderr.endswith(" ended with exit code 1, and the run with it; what it said itself is above.\n")
    assert "Traceback" not in result.stderr


def test_a_terminal_that_closes_ends_the_launched_process_too(saved_llama, data_dir, tmp_path):
    out = tmp_path / "adapter"
    words = ["--model_name_or_path", saved_llama, "--output_dir", str(out), "--max_steps", "100000"]
    words += ["--forget_dataset", str(data_dir / "forget.jsonl"), "--retain_dataset", str(data_dir / "retain.jsonl")]
    words += ["--report_to", "none", "--shift", "negate", "--save_steps", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rfa_llm.cli.main", "unlearn", "--accelerate_config", "single_cpu", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Tests that run under nohup would hand on that it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-1").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) != 0
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(out) in (p.info["cmdline"] or [])]
