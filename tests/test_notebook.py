"""The notebook runs from a clean kernel to a published adapter; its committed outputs are of its committed code."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from hub_server import HubServer
from test_publish import FILES, environment

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "forget_an_author.ipynb"
spec = importlib.util.spec_from_file_location("run_notebook", ROOT / "scripts" / "run_notebook.py")
run_notebook = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_notebook)

# What the fast test puts in the place of the settings.
SHORT = """
settings = DemoArguments(output_dir="forget-an-author-run", max_steps=3, max_new_tokens=4, use_cpu=True)
"""
PUBLISH = """
PUBLISH_TO = "me/forgot"
BASE_ON_HUB = "me/authors"
"""


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def data_of(cell) -> list[dict]:
    """What a cell shows, by MIME type, without what it prints."""
    return [output.data for output in cell.outputs if output.output_type in ("display_data", "execute_result")]


def parameters(notebook):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def training_cell(notebook):
    (cell,) = [cell for cell in code_cells(notebook) if "trainer.train()" in cell.source]
    return cell


def execute(settings: str, hub: HubServer, tmp_path: Path):
    """The notebook, run with other settings; `environment` knows no Hub but the given one."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters(notebook).source = settings
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    # IPython's own folder, so that nothing of the user's account plays a part.
    more = {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    run_notebook.run(notebook, tmp_path, {**environment(hub, tmp_path), **more})
    return notebook


def test_a_short_run_goes_from_the_data_to_the_hub(hub, tmp_path):
    notebook = execute(SHORT + PUBLISH, hub, tmp_path)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert set(hub.repos["me/forgot"][-1]) == {*FILES, ".gitattributes"}
    assert "made-up authors who asked for it" in hub.repos["me/forgot"][-1]["README.md"].decode()
    # The Trainer's bar comes first, and the picture, redrawn in its place, is one.
    bar, picture = data_of(training_cell(notebook))[:2]
    assert "<progress value='3' max='3'" in bar["text/html"] and "image/png" in picture
    assert "Training Loss" not in bar["text/html"]
    pictures = [data for cell in code_cells(notebook) for data in data_of(cell) if "image/png" in data]
    assert len(pictures) == 1


@pytest.mark.slow
def test_the_whole_notebook_forgets_and_keeps(hub, tmp_path):
    """As it is committed, but for the publishing; at most six minutes on two idle cores."""
    settings = parameters(nbformat.read(NOTEBOOK, as_version=4)).source
    notebook = execute(settings + PUBLISH, hub, tmp_path)
    assert set(hub.repos["me/forgot"][-1]) == {*FILES, ".gitattributes"}
    check_figures(notebook)


def check_figures(notebook) -> None:
    """The bounds of the demo, whose run this is."""
    tables = [data["text/plain"] for cell in code_cells(notebook) for data in data_of(cell)]
    (table,) = [table for table in tables if "unlearned" in table and "model_utility" in table]
    names, *lines = [line.split() for line in table.splitlines()]
    figures = {metric: dict(zip(names, map(float, values), strict=True)) for metric, *values in lines}
    forget, utility = figures["forget_prob"], figures["model_utility"]
    assert forget["target"] > 0.8 and forget["unlearned"] <= 1.3 * forget["retain-only"] < 0.4
    assert utility["unlearned"] >= 0.95 * utility["target"]


def test_the_committed_outputs_are_of_the_committed_code():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook.metadata["outputs_of"] == run_notebook.code_digest(notebook), "run scripts/run_notebook.py again"
    for output in [output for cell in cells for output in cell.outputs]:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        # Of the machine that ran it, no more than the folder's name may be seen.
        for text in [output.get("text", ""), *map(str, output.get("data", {}).values())]:
            assert "site-packages" not in text and not re.search(r"""(^|[\s"'(=])/[\w.-]+/""", text), text
    bar, picture = data_of(training_cell(notebook))[:2]
    assert "<progress" in bar["text/html"] and "image/png" in picture
    check_figures(notebook)
    assert "Log in with `hf auth login`" in cells[-1].outputs[0].text
