"""scripts/tofu800.py: the subset and other forget sets of it, each question with its own wrong answers; and the format
in which scripts/smollm2_tofu.py has its models read them."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_tokenizer

SCRIPT = Path(__file__).parent.parent / "scripts" / "tofu800.py"
SHARED = Path(__file__).parents[2] / "shared"


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(folder: Path) -> dict[str, list[dict]]:
    return {file.stem: [json.loads(line) for line in file.open()] for file in folder.glob("*.jsonl")}


@pytest.fixture
def folder(tmp_path) -> Path:
    """TOFU with 900 rows, of which 100 in the middle are not the subset's; row 799 has no wrong answers."""
    full = [{"question": f"q{i}?", "answer": f"a{i}"} for i in range(900)]
    perturbed = [{**row, "paraphrased_answer": "p", "perturbed_answer": [f"not {row['answer']}"]} for row in full]
    write(tmp_path / "tofu" / "full.jsonl", full)
    write(tmp_path / "tofu" / "retain_perturbed.jsonl", perturbed[:400])
    # In another order than in full.
    write(tmp_path / "tofu" / "forget10_perturbed.jsonl", perturbed[898:499:-1])
    return tmp_path


def make(folder: Path, *words) -> subprocess.CompletedProcess:
    words = [*words, "--tofu_dir", "tofu", "--output_dir", "new"]
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], cwd=folder, capture_output=True, text=True)


def test_sets_of_other_rows(folder):
    """Row 400 of the subset is row 500 of the whole."""
    assert make(folder, "--begin", 398, "--end", 402).returncode == 0
    sets = read(folder / "new")
    questions = {name: [row["question"] for row in rows] for name, rows in sets.items()}
    assert questions["forget"] == questions["forget_perturbed"] == ["q398?", "q399?", "q500?", "q501?"]
    assert questions["full"] == [f"q{i}?" for i in [*range(400), *range(500, 900)]]
    assert questions["retain"] == [f"q{i}?" for i in [*range(398), *range(502, 900)]]
    assert questions["retain_perturbed"] == [f"q{i}?" for i in range(100)]
    assert [row["perturbed_answer"] for row in sets["forget_perturbed"]] == [
        [f"not a{i}"] for i in (398, 399, 500, 501)
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--begin", 99, "--end", 120), "a forget set has rows from 100 "),
        (("--begin", 790, "--end", 801), "up to 800"),
        (("--begin", 300, "--end", 300), "choose others"),
        (("--begin", 790, "--end", 800), "have nothing on 'q899?'"),
        (("--begin", 790), "give both, or neither"),
    ],
)
def test_rows_that_cannot_be_the_forget_set(folder, words, says):
    made = make(folder, *words)
    assert made.returncode != 0 and says in made.stderr and not (folder / "new").exists()


@pytest.mark.skipif(
    not (SHARED / "tofu").exists() or not (SHARED / "tofu800").exists(),
    reason="TOFU's text (../shared/tofu, ../shared/tofu800) is not here",
)
def test_the_subset_of_the_benchmark(folder):
    for file in (SHARED / "tofu").glob("*.jsonl"):
        (folder / "tofu" / file.name).write_bytes(file.read_bytes())
    assert make(folder).returncode == 0
    assert read(folder / "new") == read(SHARED / "tofu800")


def test_the_format_has_no_system_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = runpy.run_path(SCRIPT.with_name("smollm2_tofu.py"))["CHAT_TEMPLATE"]
    turns = [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "a"}]
    asked = "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{asked}a<|im_end|>\n"
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == asked
