"""The notebooks run, and their stored outputs are complete and independent of machine and time."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from runs import SPEND_NO_SECONDS, environment

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def kinds(path):
    """Return the kinds of outputs of each cell: printed text, a picture, a value."""
    return [[sorted(out.get("data", {out.get("name"): ""})) for out in cell.outputs] for cell in code_cells(path)]


def test_there_are_six():
    assert [path.stem[:2] for path in BOOKS] == ["01", "02", "03", "04", "05", "06"]


def shortened(path, to):
    """A copy of the notebook in folder `to` that trains a twentieth of the steps, and does little else."""
    book, found = nbformat.read(path, as_version=4), 0
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source, n = re.subn(
                r"\b((?:steps|tokens|\w+_every)=)(\d+)\b", lambda m: m[1] + str(max(1, int(m[2]) // 20)), cell.source
            )
            found += n
            if ".fit(" in cell.source:
                cell.source = SPEND_NO_SECONDS + cell.source
    nbformat.write(book, to / path.name)
    assert found or path.stem[:2] in ("01", "05"), "the steps of its training are no longer found"
    return to / path.name


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Return (the folder of the notebooks that ran, the message on one that fails, at which the others end)."""
    folder = tmp_path_factory.mktemp("notebooks")
    env = environment(tmp_path_factory.getbasetemp()) | {"JAX_NUM_CPU_DEVICES": "1"}
    env.pop("DSV3_RUN", None)
    books = [str(shortened(path, folder)) for path in BOOKS]
    command = [sys.executable, str(ROOT / "notebooks" / "execute.py"), "--to", str(folder / "run"), *books]
    return folder / "run", subprocess.run(command, env=env, capture_output=True, text=True).stderr


@each
def test_it_runs_and_gives_the_stored_kinds_of_outputs(path, executed):
    """The numbers differ: the training is shorter, and another Python version comes with other text."""
    folder, said = executed
    assert (folder / path.name).exists(), said
    assert kinds(folder / path.name) == kinds(path)


@each
def test_outputs_are_stored(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "cells were not run in order"
    outputs = [out for cell in cells for out in cell.outputs]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]


@each
def test_outputs_have_no_machine_metadata(path):
    book = nbformat.read(path, as_version=4)
    assert set(book.metadata) == {"kernelspec", "language_info"} and book.metadata.language_info == {"name": "python"}
    assert not any(cell.metadata for cell in book.cells)
    texts = [cell.source for cell in book.cells]
    for cell in code_cells(path):
        for out in cell.outputs:
            texts += [out.get("text", ""), *(text for kind, text in out.get("data", {}).items() if kind[:5] != "image")]
    found = re.search(r"/(home|root|tmp|Users|usr)/|site-packages|0x[0-9a-f]{10}", "\n".join(texts))
    assert found is None, found


@each
def test_links_exist(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links and not [link for link in links if not (path.parent / link).exists()]
