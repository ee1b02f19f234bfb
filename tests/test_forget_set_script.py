"""scripts/tofu800_forget_set.py: the sets part `full`, and each question goes with its own wrong answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "tofu800_forget_set.py"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eight rows, the first two asked as retained ones, the last without wrong answers."""
    full = [{"question": f"q{i}?", "answer": f"a{i}"} for i in range(8)]
    perturbed = [{**row, "paraphrased_answer": "p", "perturbed_answer": [f"not {row['answer']}"]} for row in full]
    files = {
        "data/full": full,
        "data/retain_perturbed": perturbed[:2],
        "tofu/retain_perturbed": perturbed[:4],
        # In another order than in full.
        "tofu/forget10_perturbed": perturbed[6:3:-1],
    }
    for name, rows in files.items():
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def make(folder: Path, begin: int, end: int) -> subprocess.CompletedProcess:
    words = ["--begin", begin, "--end", end, "--data_dir", "data", "--tofu_dir", "tofu", "--output_dir", "new"]
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], cwd=folder, capture_output=True, text=True)


def test_sets_of_other_rows(folder):
    assert make(folder, 3, 6).returncode == 0
    read = {file.stem: [json.loads(line) for line in file.open()] for file in (folder / "new").iterdir()}
    questions = {name: [row["question"] for row in rows] for name, rows in read.items()}
    assert questions["forget"] == questions["forget_perturbed"] == ["q3?", "q4?", "q5?"]
    assert questions["retain"] == ["q0?", "q1?", "q2?", "q6?", "q7?"]
    assert questions["retain_perturbed"] == ["q0?", "q1?"]
    assert [row["perturbed_answer"] for row in read["forget_perturbed"]] == [["not a3"], ["not a4"], ["not a5"]]


@pytest.mark.parametrize(
    ("begin", "end", "says"),
    [(1, 4, "asked as retained ones"), (5, 8, "1 of the rows from 5 to 8 have no wrong"), (4, 9, "no rows of the 8")],
)
def test_rows_that_cannot_be_the_forget_set(folder, begin, end, says):
    made = make(folder, begin, end)
    assert made.returncode != 0 and says in made.stderr and not (folder / "new").exists()
