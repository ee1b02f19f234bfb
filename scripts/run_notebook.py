"""Run a notebook in a fresh kernel, and keep its outputs in it: `python scripts/run_notebook.py NOTEBOOK`."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

# Seconds that one cell may take.
TIMEOUT = 3600
# Bars of tqdm, which only a living kernel can show; the Trainer's own bar is none.
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(notebook: NotebookNode, folder: Path, environment: dict[str, str]) -> None:
    """Run all cells in a new kernel, in place.

    Args:
        notebook: What to run; its outputs are replaced, and `code_digest` is kept in its metadata.
        folder: Where the kernel works.
        environment: The kernel's environment variables.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell has failed; the notebook holds what came before it.
    """
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        # Times of the run would make each run another file.
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    notebook.metadata["outputs_of"] = code_digest(notebook)


def code_digest(notebook: NotebookNode) -> str:
    """SHA-256 of the code of all cells: outputs with another one in the notebook's metadata are of other code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def main(argv: list[str]) -> None:
    if len(argv) != 1 or not Path(argv[0]).is_file():
        sys.exit(f"run_notebook: {' '.join(argv) or 'nothing'} is no notebook; give the file of one.")
    path = Path(argv[0])
    notebook = nbformat.read(path, as_version=4)
    run(notebook, path.parent, dict(os.environ))
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
