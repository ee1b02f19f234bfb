"""Imports run one way (docs/design.md), and the command answers before torch is loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "rfa_llm"
# What each room may import of the package; longer names are rooms of their own.
ALLOWED = {
    "blocks": set(),
    "files": set(),
    "shifts": set(),
    "residuals": {"blocks"},
    "unlearning_config": set(),
    "config": {"shifts", "unlearning_config"},
    "data": {"data"},
    "adapters": {"memory"},
    "evaluation": {"evaluation", "data.formats", "adapters", "files"},
    "feature_cache": {"data", "files"},
    "reference": {"adapters", "blocks", "residuals", "feature_cache", "calibration"},
    "memory": set(),
    "checkpoints": {"blocks", "unlearning_config", "memory", "files"},
    "receipt": {"checkpoints", "data.formats", "evaluation", "files", "unlearning_config"},
    "card": set(),
    "hub": {"card", "receipt", "data.formats"},
    "unlearning_trainer": {"adapters", "blocks", "data", "memory", "checkpoints", "unlearning_config"}
    | {"card", "hub", "receipt"},
    "rivals": {"rivals", "unlearning_config", "unlearning_trainer"}
    | {"adapters", "blocks", "residuals", "reference", "data", "checkpoints"},
    "calibration": {"adapters", "data", "evaluation", "memory"},
    "trainer": {"adapters", "blocks", "residuals", "shifts", "reference", "config", "unlearning_trainer"}
    | {"calibration", "checkpoints", "data", "feature_cache", "receipt"},
    "callbacks": {"evaluation", "memory"},
    "progress": set(),
    "benchmark": {
        "benchmark",
        "rivals",
        "trainer",
        "unlearning_trainer",
        "config",
        "checkpoints",
        "evaluation",
        "progress",
        "receipt",
    },
    "report": {"report", "benchmark.picture", "evaluation", "files", "receipt"},
}


def imported(file: Path) -> set[str]:
    """Dotted names below `rfa_llm` that a file imports, such as `data.formats`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):  # an absolute one; ruff refuses the others
            package, _, module = node.module.partition(".")
            if package == "rfa_llm":
                names |= {module} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("rfa_llm.") for alias in node.names if alias.name.startswith("rfa_llm.")}
    return names


def test_every_room_is_held():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__", "cli"} == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else list((PACKAGE / room).glob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            allowed = any(name == other or name.startswith(f"{other}.") for other in ALLOWED[room])
            assert allowed, f"{file.name} imports rfa_llm.{name}"


def test_help_does_not_load_torch():
    code = "import sys, rfa_llm, rfa_llm.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_trainer_does_not_load_what_the_metrics_need():
    code = "import sys, rfa_llm.trainer; sys.exit('nltk' in sys.modules or 'scipy.stats' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
