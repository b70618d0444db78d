"""Execute the notebooks and store their outputs, as `make notebooks` does.

    python notebooks/execute.py [--to FOLDER] [NOTEBOOK …]

On one machine the outputs are the same each time, but for the speed that 04 measures. Times, paths and kernel metadata
are not stored. Kernels run on the CPU and in an empty folder, so existing runs do not change the outputs. A run in
DSV3_RUN, which 03 reads, does.
"""

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).parent
# Replaces the metadata that Jupyter writes about itself and its Python.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_TIMEOUT = 600  # seconds


def execute(notebook: Path, to: Path) -> None:
    """Run all cells of a notebook, and write it with its outputs to folder `to`.

    Raises: CellExecutionError if a cell fails; then nothing is written.
    """
    book = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            book,
            timeout=CELL_TIMEOUT,
            startup_timeout=CELL_TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
            # The sockets are in that folder, because a kernel on TCP warns that others could listen.
            config=Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"}),
        )
        client.execute()
    book.metadata = nbformat.from_dict(METADATA)
    part = to / (notebook.name + ".part")
    nbformat.write(book, part)
    part.rename(to / notebook.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute notebooks and store their outputs.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in this folder")
    parser.add_argument("--to", type=Path, help="the folder to write to; default: in place")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.to:
        args.to.mkdir(parents=True, exist_ok=True)
    for notebook in args.notebooks or sorted(HERE.glob("*.ipynb")):
        print(notebook.name, flush=True)
        execute(notebook, args.to or notebook.parent)


if __name__ == "__main__":
    main()
