"""Every code block of README.md, CONTRIBUTING.md and docs/ runs, or is checked where it cannot; the site builds."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import carry_over
import numpy as np
import pytest
import rates
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import learn_by_heart, tiny_llama, tiny_rows, tiny_tokenizer
from datasets import Dataset
from hub_server import TOKEN, HubServer
from markdown_it import MarkdownIt
from markdown_it.token import Token

from rfa_llm import RFAConfig, RFATrainer
from rfa_llm.cli.benchmark import BenchmarkArguments, check_methods
from rfa_llm.cli.main import COMMANDS
from rfa_llm.data.formats import encode
from rfa_llm.rivals import METHODS, RIVALS, RivalConfig, RivalTrainer
from rfa_llm.unlearning_config import UnlearningConfig
from rfa_llm.unlearning_trainer import UnlearningTrainer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# What a block says -> what runs in its place: rows of a folder for the Hub's, and names that stand for one's own.
INSTEAD = {
    "--forget_dataset locuslab/TOFU --forget_config forget10": "--forget_dataset DIR/forget10.jsonl",
    "--retain_dataset locuslab/TOFU --retain_config retain90": "--retain_dataset DIR/retain90.jsonl",
    "rfa-llm unlearn …": "rfa-llm unlearn --model_name_or_path path/to/fine-tuned-model --output_dir adapter "
    "--forget_dataset forget.jsonl --retain_dataset retain.jsonl",
    "--save_steps 50": "--save_steps 2",
}
# What is added to a command, to keep it short and on the CPU; the folder stands for TOFU on the Hub.
ADDED = {
    "unlearn": "--use_cpu true --report_to none",
    "evaluate": "--use_cpu true --max_new_tokens 4 --data_dir DIR",
    "merge": "--use_cpu true",
    "verify": "--use_cpu true",
}
# Beginnings of commands that cannot run here, and why. Their flags and files are checked.
NOT_RUN = {
    "make demo": "trains models for minutes; tests/test_demo.py runs a short one",
    "make test": "would run this test within itself",
    "make test-slow": "takes minutes",
    "make docs": "the site is built below",
    "make benchmark-small": "takes minutes; tests/test_benchmark.py runs a short one",
    "pip install": "would change the environment of the tests",
    "python -m pytest": "would run tests within a test",
    "lm-eval": "wants a task of one's own; tests/test_serving.py runs one",
    "vllm": "wants a GPU; tests/test_serving.py holds the conditions of its loader",
    "ruff": "`make test` runs it first",
    "rfa-llm benchmark": "takes hours; tests/test_benchmark.py runs a short one",
    "rfa-llm unlearn --accelerate_config": "wants several GPUs; tests/test_multi_process.py runs it on the CPU",
    "accelerate launch": "likewise",
    "python scripts/tofu800.py": "wants TOFU; tests/test_tofu800_script.py runs it",
    "python scripts/smollm2_tofu.py": "fine-tunes for an hour",
    "python benchmarks/gpu.py": "wants a GPU; tests/test_gpu_script.py runs it on the CPU",
}
# Run in a process of their own, which knows our Hub only.
ON_THE_HUB = ("rfa-llm publish", "hf download")


class Block(NamedTuple):
    """A fenced block; `line` is that of its first line of code, from 1."""

    page: Path
    line: int
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [Block(page, t.map[0] + 2, t.info.strip(), t.content) for t in tokens if t.type == "fence"]


def in_the_text(page: Path) -> list[Token]:
    """Links, code and the like between the blocks."""
    tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    return [child for token in tokens for child in token.children or []]


def commands(code: str) -> list[str]:
    """The commands of a bash block, each on one line, without comments."""
    lines = re.sub(r"\s*\\\n\s*", " ", code).splitlines()
    return [command for line in lines if (command := line.partition(" #")[0].strip())]


class Parsed(Exception):
    """A command has read its flags, `args[0]` is its parser; what would follow is left out."""


def check(words: list[str]) -> None:
    """Check that a command's flags are those of its own parser, and that the files that it names exist."""
    match words:
        case ["make", target]:
            assert f"\n{target}: $(VENV)/ready\n" in (ROOT / "Makefile").read_text(), words
        case ["pip", "install", "-e", where]:
            assert where == "." or f"\n{where[2:-1]} = [" in (ROOT / "pyproject.toml").read_text(), words
        case ["pip", "install", *names]:
            pinned = (ROOT / "constraints.txt").read_text()
            assert all(f"\n{name}==" in pinned for name in names if not name.startswith("-")), words
        case ["python", "-m", "pytest", *files] | ["ruff", "check" | "format", *files]:
            assert all((ROOT / file).exists() for file in files if not file.startswith("-")), words
        case ["lm-eval" | "vllm", *_]:
            # Flags of others, which no parser here knows.
            pass
        case ["accelerate", "launch", *argv]:
            args = launch_command_parser().parse_args(argv)
            assert (ROOT / args.config_file).is_file() and (ROOT / args.training_script).is_file(), words
            check(["rfa-llm", Path(args.training_script).stem, *args.training_script_args])
        case ["rfa-llm", "unlearn", "--accelerate_config", name, *argv]:
            assert (ROOT / "configs" / "accelerate" / f"{name}.yaml").is_file(), words
            check(["rfa-llm", "unlearn", *argv])
        case ["rfa-llm", command, *argv]:
            parse(import_module(f"rfa_llm.cli.{command}").main, argv)
        case ["python", file, *argv]:
            assert (ROOT / file).is_file(), words
            parse(import_module(Path(file).stem).main, argv)
        case _:
            pytest.fail(f"{words} is a command of no kind that is known here")


def parse(main, argv: list[str]) -> argparse.ArgumentParser:
    """Let a command's `main` read its flags, and end it there; its parser."""
    original = argparse.ArgumentParser.parse_known_args

    def read(self, *args, **kwargs):
        _, rest = original(self, *args, **kwargs)
        assert not rest, f"{rest} are no flags of {self.prog}"
        raise Parsed(self)

    # What is left out with `…` is given below.
    with patch.object(argparse.ArgumentParser, "parse_known_args", read), pytest.raises(Parsed) as end:
        main([word for word in argv if word != "…"])
    return end.value.args[0]


def run_or_check(command: str, hub: HubServer) -> None:
    if command.startswith(("rfa-llm", *NOT_RUN)):
        check(shlex.split(command))
    if command.startswith(tuple(NOT_RUN)):
        return
    for written, instead in INSTEAD.items():
        command = command.replace(written, instead)
    words = shlex.split(command)
    if command.startswith(ON_THE_HUB):
        ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours |= {"HF_HOME": "hub", "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        module = {"rfa-llm": "rfa_llm.cli.main", "hf": "huggingface_hub.cli.hf"}[words[0]]
        words = [sys.executable, "-m", module, *words[1:]]
        done = subprocess.run(words, env=ours, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return
    match words:
        case ["rfa-llm", command, *argv]:
            import_module(f"rfa_llm.cli.{command}").main([*argv, *ADDED.get(command, "").split()])
        case ["python", file, *argv]:
            import_module(Path(file).stem).main(argv)
        case _:
            pytest.fail(f"{command!r} is in no table of this test; say there how it runs, or why it cannot")


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """The folder that the blocks run in, with what they name."""
    monkeypatch.chdir(tmp_path)
    # Wide enough for the kernels of bitsandbytes.
    model, tokenizer = tiny_llama(hidden_size=64, intermediate_size=128), tiny_tokenizer()
    sets = {"forget": tiny_rows(6, first=0), "retain": tiny_rows(10, first=20), "holdout": tiny_rows(6, first=40)}
    model.save_pretrained("path/to/model-before")
    learn_by_heart(model, tokenizer, [*sets["forget"], *sets["retain"]])
    for name in ("fine-tuned-model", "tofu-model", "retain-only-model"):
        model.save_pretrained(tmp_path / "path" / "to" / name)
        tokenizer.save_pretrained(tmp_path / "path" / "to" / name)
    for name, rows in sets.items():
        rows.to_json(tmp_path / f"{name}.jsonl")
    (tmp_path / "DIR").mkdir()
    for name, rows in (("forget10", sets["forget"]), ("retain90", sets["retain"])):
        rows.to_json(tmp_path / "DIR" / f"{name}.jsonl")
    questions = Dataset.from_list(
        [{**row, "paraphrased_answer": "w1 w2", "perturbed_answer": ["w3", "w4 w5"]} for row in sets["forget"]]
    )
    for name in ("forget10", "retain", "real_authors", "world_facts"):
        questions.to_json(tmp_path / "DIR" / f"{name}_perturbed.jsonl")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_from_its_top_to_its_end(page, workplace, hub):
    names = {}
    # An example may add to these.
    with patch.dict(METHODS), patch.dict(RIVALS):
        for block in blocks(page):
            match block.language:
                case "python":
                    exec(compile(block.code, f"{page.name}, block at line {block.line}", "exec"), names)
                case "bash":
                    for command in commands(block.code):
                        run_or_check(command, hub)
                case "json":
                    # Rows of a set, a line each.
                    for line in block.code.splitlines():
                        encode(json.loads(line), tiny_tokenizer())
                case "yaml":
                    # A recipe of the benchmark.
                    check_methods(BenchmarkArguments(**yaml.safe_load(block.code)))
                case language:
                    pytest.fail(f"{page.name}, line {block.line}: a block in {language!r} is not run; say how")


def test_the_tables_have_no_entry_that_no_block_needs():
    said = [c for page in PAGES for block in blocks(page) if block.language == "bash" for c in commands(block.code)]
    for start in (*NOT_RUN, *ON_THE_HUB, *(f"rfa-llm {command}" for command in ADDED)):
        assert any(command.startswith(start) for command in said), start
    for written in INSTEAD:
        assert any(written in command for command in said), written


@pytest.mark.parametrize(
    "words",
    [
        ["rfa-llm", "unlearn", "--no_such_flag", "1"],
        ["rfa-llm", "benchmark", "--config", "configs/benchmark/no_such_file.yaml"],
        ["make", "no-such-target"],
        [
            "accelerate",
            "launch",
            "--config_file",
            "configs/accelerate/ddp.yaml",
            "scripts/unlearn.py",
            "--no_such",
            "1",
        ],
        ["rfa-llm", "unlearn", "--accelerate_config", "no_such_mode", "--output_dir", "x"],
        ["curl", "example.org"],
    ],
    ids=" ".join,
)
def test_a_command_that_is_wrong_does_not_pass_the_check(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, OSError, ValueError, pytest.fail.Exception)):
        check(words)


def test_flags_in_the_text_are_some_command_s(monkeypatch):
    monkeypatch.chdir(ROOT)
    # Read before a command's own parser is there; and vLLM's --max-lora-rank.
    known = {"--config", "--debug", "--accelerate_config", "--num_processes", "--max"}
    needed = {"unlearn": ["--output_dir", "x"], "finetune": ["--output_dir", "x"], "gpu": ["--output", "x"]}
    for module in [*(f"rfa_llm.cli.{command}" for command in COMMANDS), "gpu", "memory", "speed"]:
        parser = parse(import_module(module).main, needed.get(module.rpartition(".")[2], []))
        known |= set(parser._option_string_actions)
    for page in PAGES:
        texts = [token.content for token in in_the_text(page) if token.type == "code_inline"]
        flags = {flag for text in texts for flag in re.findall(r"(?<!\S)--\w+", text)}
        assert flags <= known, f"{page.name}: {flags - known}"


def test_links_outside_the_site_lead_to_files():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        tokens = in_the_text(page)
        targets = [token.attrs["href"] for token in tokens if token.type == "link_open"]
        targets += [token.attrs["src"] for token in tokens if token.type == "image"]
        files = [target.partition("#")[0] for target in targets if not target.startswith(("https://", "#"))]
        assert [file for file in files if not (ROOT / file).exists()] == []


class Fetched(HTMLParser):
    """The addresses that a browser fetches by itself when it opens a page."""

    def __init__(self):
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name == "src" or (name == "href" and tag == "link")]


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    fetched = Fetched()
    for page in tmp_path.rglob("*.html"):
        fetched.feed(page.read_text(encoding="utf-8"))
    assert fetched.addresses and not [a for a in fetched.addresses if re.match(r"(\w+:)?//", a)]
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style

    # Each argument is described, and each setting where it is its own; no markup of other tools is left.
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "[<code>" not in api
    expected = {trainer: {*signature(trainer).parameters} for trainer in (RFATrainer, UnlearningTrainer, RivalTrainer)}
    for config in (RFAConfig, UnlearningConfig, RivalConfig):
        expected[config] = {field.name for field in fields(config)} - {field.name for field in fields(config.__base__)}
    for named, names in expected.items():
        start = re.search(rf'<h[34] id="{named.__module__}.{named.__name__}"', api).end()
        section = re.split(r"<h[2-4] ", api[start:], maxsplit=1)[0]
        assert set(re.findall(r"<b><code>(\w+)</code></b>", section)) == names, named


def test_the_tables_are_those_of_the_committed_results():
    page = (ROOT / "docs/benchmark.md").read_text(encoding="utf-8")
    assert carry_over.tables() in page
    assert rates.every_rate() in page
    assert rates.at_best_rates() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_spread_test_sees_what_the_deviation_is():
    rng = np.random.default_rng(0)
    questions = rng.normal(0.0, 0.7, 100)
    ours, theirs = (np.exp(questions + rng.normal(0.0, 0.2, 100)) for _ in range(2))
    # Another mean alone is nothing to see; ratios that are drawn together by a third are seen.
    assert carry_over.spread_test(2 * ours, theirs) == pytest.approx(carry_over.spread_test(ours, theirs))
    assert carry_over.spread_test(ours, theirs) > 0.05
    assert carry_over.spread_test(ours**0.67, theirs) < 0.01
