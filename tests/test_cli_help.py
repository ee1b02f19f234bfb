"""`rfa-llm` and every subcommand as a user meets them: help, defaults and units, and what a mistake looks like."""

import resource
import subprocess
import sys
from dataclasses import MISSING, fields
from importlib import import_module

import pytest
import yaml

from rfa_llm.cli.benchmark import BenchmarkArguments
from rfa_llm.cli.demo import DemoArguments
from rfa_llm.cli.evaluate import EvaluateArguments
from rfa_llm.cli.finetune import FinetuneArguments, FinetuneConfig, FinetuneModelConfig
from rfa_llm.cli.main import COMMANDS, main, run
from rfa_llm.cli.merge import MergeArguments
from rfa_llm.cli.publish import PublishArguments
from rfa_llm.cli.report import ReportArguments
from rfa_llm.cli.unlearn import UnlearnArguments, UnlearnModelConfig
from rfa_llm.cli.verify import VerifyArguments
from rfa_llm.config import RFAConfig
from rfa_llm.unlearning_config import UnlearningConfig

# Of each subcommand: our own dataclasses; words with a file that is not there, and how its sentence begins; words
# that lack something (none where nothing is needed), likewise; and a setting that takes a number or a choice, if it
# has one.
SUBCOMMANDS = {
    "unlearn": (
        [UnlearnArguments, RFAConfig, UnlearningConfig, UnlearnModelConfig],
        ("--model_name_or_path MODEL --output_dir OUT --forget_dataset no.jsonl", "forget_dataset is 'no.jsonl', but"),
        ("--model_name_or_path MODEL --output_dir OUT --use_cpu", "forget_dataset is None; give"),
        "max_steps",
    ),
    "evaluate": (
        [EvaluateArguments],
        ("--model_name_or_path MODEL --data_dir OUT", "data_dir"),
        ("", "model_name_or_path: no model is given; pass"),
        "batch_size",
    ),
    "publish": (
        [PublishArguments],
        ("OUT me/adapter --forgotten rows", "folder: 'OUT' has no forget_receipt.json; give"),
        ("", "folder, repo_id: both are needed; give"),
        None,
    ),
    "verify": (
        [VerifyArguments],
        ("OUT", "folder: 'OUT' has no forget_receipt.json; give"),
        ("", "folder: none is given; give"),
        "batch_size",
    ),
    "report": (
        [ReportArguments],
        ("OUT", "runs: 'OUT' holds no forget_receipt.json, and"),
        ("", "runs: none is given; give"),
        "forget_text",
    ),
    "merge": (
        [MergeArguments],
        ("--adapter_name_or_path ./no --output_dir OUT", "adapter_name_or_path: './no' is no adapter"),
        ("--output_dir OUT", "adapter_name_or_path: no adapter is given; pass"),
        "sample_rows",
    ),
    "finetune": (
        [FinetuneArguments, FinetuneConfig, FinetuneModelConfig],
        ("--model_name_or_path MODEL --output_dir OUT --train_dataset no.jsonl", "train_dataset is 'no.jsonl', but"),
        ("--model_name_or_path MODEL --output_dir OUT", "train_dataset is None; give"),
        "max_steps",
    ),
    "benchmark": (
        [BenchmarkArguments],
        ("--config METHODS --data_dir OUT --output_dir OUT", "data_dir"),
        ("--data_dir OUT", "methods: none is given; name them"),
        "points",
    ),
    "demo": (
        [DemoArguments],
        ("--model MODEL --data_dir OUT --output_dir OUT", "data_dir"),
        ("--model MODEL", "data_dir: model is given but not its data; give"),
        "max_steps",
    ),
}
every_command = pytest.mark.parametrize("command", SUBCOMMANDS)
# What the help of a number has to say, and the numbers that have no unit.
UNITS = {
    **dict.fromkeys(["local_window", "local_sinks", "max_length", "max_new_tokens"], "token"),
    **dict.fromkeys(["mean_rows", "per_device_train_batch_size", "sample_rows"], "row"),
    **dict.fromkeys(["calibration_steps", "warmup_steps", "max_steps", "logging_steps"], "step"),
    "batch_size": " at a time",
    "num_train_epochs": "passes over",
    "reference_cache_gb": "in gb",
    "max_kl": "in nats",
    "points": "times",
}
PURE = {"alpha", "beta", "shift_scale", "smoothing_temperature", "lora_r", "lora_alpha", "lora_dropout", "tolerance"}
PURE |= {"learning_rate", "learning_rates", "seed", "seeds", "blocks", "next_token_weight"}


def own_fields(command: str):
    """The fields that our own dataclasses of a subcommand declare, without those that they inherit; of one that is
    declared twice, the derived class's, which is listed first."""
    declared = {}
    for cls in SUBCOMMANDS[command][0]:
        for field in fields(cls):
            if field.name in cls.__dict__["__annotations__"]:
                declared.setdefault(field.name, field)
    return declared.values()


def call(command: str, words: str, tmp_path) -> None:
    """Run a subcommand in this process as `rfa-llm` does; OUT and METHODS are a missing folder and a recipe."""
    recipe = {"methods": {"rfa": {"trainer": "rfa"}}, "target_model": "model", "retain_model": "model"}
    (tmp_path / "methods.yaml").write_text(yaml.safe_dump(recipe))
    names = {"METHODS": str(tmp_path / "methods.yaml"), "MODEL": str(tmp_path / "model")}
    run(import_module(f"rfa_llm.cli.{command}").main, [names.get(word, word) for word in words.split()])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """OUT and what else a command may write lie in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


def helped(command: str, tmp_path, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        call(command, "--help", tmp_path)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_table_has_every_subcommand():
    assert list(SUBCOMMANDS) and set(SUBCOMMANDS) == set(COMMANDS)


@every_command
def test_help_tells_what_each_of_our_settings_is(command, tmp_path, capsys, monkeypatch):
    # argparse breaks lines at the terminal's width.
    monkeypatch.setenv("COLUMNS", "2000")
    lines = helped(command, tmp_path, capsys).splitlines()
    assert lines[0].startswith(f"usage: rfa-llm {command} ") and "--debug" in lines[0]
    for field in own_fields(command):
        at = next(i for i, line in enumerate(lines) if line.split()[:1] in ([f"--{field.name}"], [f"--{field.name},"]))
        # A long list of names has its help on the next line.
        text = " ".join(lines[at : at + 2])
        assert field.metadata["help"].rstrip(".") in text, field.name
        default = field.default_factory() if field.default is MISSING else field.default
        if default is not None:
            assert f"(default: {default})" in text, field.name
        elif field.type == "str" or field.name == "methods":
            assert text.split("Required.")[1:], f"{field.name} does not say that it is required"
    assert not any("default: None" in line for line in lines)


@every_command
def test_help_tells_the_units(command):
    for field in own_fields(command):
        if any(kind in str(field.type) for kind in ("int", "float")):
            assert (field.name in UNITS) != (field.name in PURE), f"say which unit {field.name} has"
            assert UNITS.get(field.name, "") in field.metadata["help"].lower(), field.name


def test_help_of_a_report_needs_no_plotting_library(tmp_path, capsys, monkeypatch):
    for module in [name for name in sys.modules if name.startswith("rfa_llm.report")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--forget_text" in helped("report", tmp_path, capsys)


@pytest.mark.parametrize("mistake", ["missing file", "missing setting", "unknown setting", "no recipe", "no name"])
@every_command
def test_a_mistake_is_one_sentence_and_debug_shows_where_it_was_found(command, mistake, tmp_path, capsys):
    _, file, lacking, _ = SUBCOMMANDS[command]
    recipe = "--config METHODS --data_dir OUT " if command == "benchmark" else ""
    words, sentence = {
        "missing file": file,
        "missing setting": lacking,
        "unknown setting": (
            f"{recipe}--no_such_thing 1",
            f"no_such_thing: there is no such setting; `rfa-llm {command} --help` lists them.",
        ),
        "no recipe": ("--config no.yaml", "config: 'no.yaml' is no file; give a YAML file of settings."),
        "no name": ("--config", "config: '' is no file; give a YAML file of settings."),
    }[mistake]
    with pytest.raises(SystemExit) as ended:
        call(command, words, tmp_path)
    assert isinstance(ended.value.code, str) and ended.value.code.startswith(f"rfa-llm: error: {sentence}")
    assert len(ended.value.code.strip().splitlines()) == 1
    assert "Traceback" not in capsys.readouterr().err
    # Nothing is half-written.
    assert not (tmp_path / "OUT").exists()
    with pytest.raises((ValueError, OSError)) as shown:
        call(command, f"{words} --debug", tmp_path)
    assert f"rfa-llm: error: {shown.value}" == ended.value.code


@every_command
def test_a_value_of_another_type_is_refused_by_its_setting(command, tmp_path, capsys):
    number = SUBCOMMANDS[command][3]
    words = f"--{number} many" if number else "--private perhaps"
    with pytest.raises(SystemExit) as ended:
        call(command, words, tmp_path)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"rfa-llm {command}: error: argument {words.split()[0]}")
    # The usage, which is short, and the sentence.
    assert len(error.splitlines()) <= 3


def test_the_beginning_of_a_settings_name_is_no_setting(tmp_path):
    with pytest.raises(SystemExit, match="^rfa-llm: error: num_train_epoch: there is no such setting"):
        call("unlearn", "--output_dir OUT --num_train_epoch 3", tmp_path)


def test_a_key_of_a_recipe_that_is_no_setting_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: x\nforget_datasets: y\n")
    (tmp_path / "number.yaml").write_text("blocks: -1\n")
    with pytest.raises(SystemExit, match=r"^rfa-llm: error: blocks: -1 is no list; give one, such as \[-1\]"):
        call("unlearn", f"--output_dir OUT --config {tmp_path / 'number.yaml'}", tmp_path)
    with pytest.raises(SystemExit, match="^rfa-llm: error: forget_datasets: there is no such setting"):
        call("unlearn", f"--output_dir OUT --config {tmp_path / 'recipe.yaml'}", tmp_path)


@pytest.mark.parametrize(
    ("words", "code", "printed"),
    [
        (["--help"], 0, "unlearn "),
        (["--version"], 0, "rfa-llm "),
        ([], 2, "the following arguments are required: COMMAND"),
        (["forget"], 2, "argument COMMAND: invalid choice: 'forget'"),
    ],
)
def test_the_command_alone(words, code, printed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rfa-llm", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    output = capsys.readouterr()
    assert printed in (output.err if code else output.out)


def test_ctrl_c_is_one_word_and_debug_shows_where_it_was():
    def stopped(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="^rfa-llm: stopped.$"):
        run(stopped, [])
    with pytest.raises(KeyboardInterrupt):
        run(stopped, ["--debug"])


def test_help_takes_less_than_two_seconds():
    # Of the processor, so that a busy machine does not count.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-m", "rfa_llm.cli.main", "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0 and all(f"  {command} " in result.stdout for command in COMMANDS)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
