"""Runs the notebooks and writes each one's .ipynb anew, with its outputs.

    python -m notebooks.execute
    python -m notebooks.execute 01_quick_start 06_many_devices

A notebook is written as a Python file in jupytext's percent format; nothing in the
.ipynb is edited by hand.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("[0-9]*.py"))

_TIMEOUT = 1800  # seconds a cell
# Such as `adamw: 3/20 |#   | ETA 00:07, loss 2.5`, with what a terminal makes of it.
_PROGRESS = re.compile(r"^[^|]*: *\d+/\d+ *\|.*\|.*$|^[^|]*\d+%\|.*\|.*$|^\s*$")


def read(source: Path) -> NotebookNode:
    """The notebook of a Python file, without outputs; equal at every call."""
    notebook: Any = jupytext.read(source)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02}"
    return notebook


def run(notebook: NotebookNode, small: bool = False) -> NotebookNode:
    """Executes a notebook in place, by the interpreter that runs this.

    Args:
      notebook: what is run.
      small: whether it is told to do less of everything.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    # Without directories to look into, `python3` is the kernel of this interpreter.
    kernels = KernelSpecManager(kernel_dirs=[])
    with tempfile.TemporaryDirectory() as scratch:
        kernel = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=kernels,
            connection_file=f"{scratch}/kernel.json",
            transport="ipc",  # sockets of this user's, not ports that anyone can reach
        )
        client = NotebookClient(
            notebook,
            km=kernel,
            timeout=_TIMEOUT,
            record_timing=False,
            resources={"metadata": {"path": str(HERE.parent)}},
        )
        client.execute(
            cleanup_kc=True,  # else done for a kernel manager of its own only
            env={
                **os.environ,
                "IPYTHONDIR": scratch,
                "TMPDIR": scratch,
                "LOWRANK_OPTAX_SMALL": str(int(small)),
            },
        )
    return notebook


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Takes progress bars, and what differs from machine to machine, out of it.

    Raises:
      ValueError: there is more on stderr than progress bars.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") != "stderr":
                continue
            for line in re.split(r"[\r\n]", output.text):
                if not _PROGRESS.match(line):
                    raise ValueError(f"{cell.id} wrote to stderr: {line}")
        if "outputs" in cell:
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    return notebook


def main(names: list[str]) -> int:
    """Writes the notebooks that are named, or all; returns the exit status."""
    known = {source.stem: source for source in SOURCES}
    unknown = [name for name in names if name not in known]
    if unknown:
        print(
            f"execute: no notebook {', '.join(unknown)}; there are {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    for name in names or known:
        source = known[name]
        notebook = tidy(run(read(source)))
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb").relative_to(HERE.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
