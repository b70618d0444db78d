"""Executes the notebooks and keeps their outputs: what `make notebooks` runs.

    python notebooks/execute.py [--to FOLDER] [NOTEBOOK …]

Outputs are the same each time on one machine: nothing of the clock, of paths or of the kernel is kept. Kernels run on
the CPU and in an empty folder, so that no run that lies about changes what is kept (03 reads one that DSV3_RUN names).
"""

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).parent
# In place of what each Jupyter writes of itself and its Python.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
LONGEST = 600  # seconds for a cell


def execute(notebook: Path, to: Path) -> None:
    """Run a notebook from its first cell on, and write it with its outputs into folder `to`.

    Raises: CellExecutionError from the first cell that fails; nothing is written then.
    """
    book = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            book,
            timeout=LONGEST,
            startup_timeout=LONGEST,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
            # Sockets in that folder: a kernel on TCP warns that others could listen.
            config=Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"}),
        )
        client.execute()
    book.metadata = nbformat.from_dict(METADATA)
    part = to / (notebook.name + ".part")
    nbformat.write(book, part)
    part.rename(to / notebook.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute notebooks, outputs kept.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="none: all of this folder")
    parser.add_argument("--to", type=Path, help="the folder to write into; none: in place")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for notebook in args.notebooks or sorted(HERE.glob("*.ipynb")):
        print(notebook.name, flush=True)
        execute(notebook, args.to or notebook.parent)


if __name__ == "__main__":
    main()
