"""Execute the notebooks and store their outputs, as `make notebooks` does.

    python notebooks/execute.py [--to FOLDER] [NOTEBOOK …]

On one machine the outputs are the same each time, but for the speed that 04 measures. Times, paths
and kernel metadata are not stored. The metadata name the commit of the package whose outputs these
are, and the site shows it. Kernels run on the CPU and in an empty folder, so existing runs do not
change the outputs. A run in DSV3_RUN, which 03 reads, does.
"""

import argparse
import os
import subprocess
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
CELL_TIMEOUT = 3600  # seconds, for a machine that others use too


def code_commit() -> str:
    """Return the last commit that changed the package; "" without git.

    It ends with "-changed" if the package's files differ from that commit.
    """

    def git(*words: str) -> str:
        command = ("git", *words, "--", "dsv3_jax")
        return subprocess.run(
            command, cwd=HERE.parent, capture_output=True, text=True
        ).stdout.strip()

    commit = git("log", "-1", "--format=%H")[:12]
    return f"{commit}-changed" if git("status", "--porcelain") else commit


def execute(notebook: Path, to: Path) -> None:
    """Run all cells of a notebook, and write it with its outputs to folder `to`.

    Raises: CellExecutionError if a cell fails; then nothing is written.
    """
    book = nbformat.read(notebook, as_version=4)
    commit = code_commit()  # of the code that runs, so before it runs
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            book,
            timeout=CELL_TIMEOUT,
            startup_timeout=CELL_TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
            # The sockets are in that folder, because a kernel on TCP warns that others could
            # listen.
            config=Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"}),
        )
        client.execute()
    book.metadata = nbformat.from_dict(METADATA | {"dsv3_jax": {"commit": commit}})
    part = to / (notebook.name + ".part")
    nbformat.write(book, part)
    part.rename(to / notebook.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute notebooks and store their outputs.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in this folder")
    parser.add_argument("--to", type=Path, help="the folder to write to; default: in place")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # XLA's log of a busy machine, such as a slow compilation, is no output
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if args.to:
        args.to.mkdir(parents=True, exist_ok=True)
    for notebook in args.notebooks or sorted(HERE.glob("*.ipynb")):
        print(notebook.name, flush=True)
        execute(notebook, args.to or notebook.parent)


if __name__ == "__main__":
    main()
