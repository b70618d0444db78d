"""The notebooks run, and their stored outputs are complete and independent of machine and time."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from runs import HERE, SPEND_NO_SECONDS, environment

BOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def kinds(path):
    """Return the kinds of outputs of each cell: printed text, a picture, a value."""
    return [
        [sorted(out.get("data", {out.get("name"): ""})) for out in cell.outputs]
        for cell in code_cells(path)
    ]


def shortened(path: Path, to: Path) -> Path:
    """A copy of the notebook in `to`: a twentieth of the steps, from two seeds at most."""
    book = nbformat.read(path, as_version=4)
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        text = re.sub(
            r"\b((?:steps|tokens|\w+_every)=)(\d+)\b",
            lambda m: m[1] + str(max(1, int(m[2]) // 20)),
            cell.source,
        )
        text = text.replace("rows, steps = (4, 200)", "rows, steps = (4, 10)")  # 00's on a CPU
        text = re.sub(r"^seeds = .*", "seeds = (0, 1)", text, flags=re.MULTILINE)
        cell.source = SPEND_NO_SECONDS * (".fit(" in text) + text
    nbformat.write(book, to / path.name)
    return to / path.name


def marked(path: Path):
    """CI runs the notebook of a released model. `make test-all` and `make notebooks` run all."""
    return pytest.param(path, id=path.stem, marks=[pytest.mark.rare] * (path.stem[:2] != "05"))


@pytest.mark.long
@pytest.mark.parametrize("path", [marked(path) for path in BOOKS])
def test_it_runs_and_gives_the_stored_kinds_of_outputs(path, tmp_path, root, monkeypatch):
    """The numbers differ: training is shorter, and other Python versions come with other text."""
    monkeypatch.delenv("DSV3_RUN", raising=False)
    env = environment(root) | {"JAX_NUM_CPU_DEVICES": "1"}
    program, book = HERE / "notebooks" / "execute.py", shortened(path, tmp_path)
    command = [sys.executable, str(program), "--to", str(tmp_path / "run"), str(book)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kinds(tmp_path / "run" / path.name) == kinds(path)


def test_stored_outputs_are_complete_and_of_no_machine():
    assert [path.stem[:2] for path in BOOKS] == ["00", "01", "02", "03", "04", "05", "06"]
    for path in BOOKS:
        book = nbformat.read(path, as_version=4)
        cells = code_cells(path)
        in_order = list(range(1, len(cells) + 1))
        assert [cell.execution_count for cell in cells] == in_order, path
        outputs = [out for cell in cells for out in cell.outputs]
        assert re.fullmatch("[0-9a-f]{12}", book.metadata["dsv3_jax"]["commit"]), path
        assert any("image/png" in out.get("data", {}) for out in outputs)
        texts = [cell.source for cell in book.cells]
        for out in outputs:
            assert out.output_type != "error" and out.get("name") != "stderr", path
            texts.append(out.get("text", ""))
            texts += [text for kind, text in out.get("data", {}).items() if kind[:5] != "image"]
        of_a_machine = r"/(home|root|tmp|Users|usr)/|site-packages|0x[0-9a-f]{10}"
        assert not re.search(of_a_machine, "\n".join(texts)), path


def test_the_picture_of_the_readme_is_the_last_one_of_03():
    cells = code_cells(HERE / "notebooks/03_where_tokens_go.ipynb")
    outputs = [out for cell in cells for out in cell.outputs]
    pictures = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    shown = (HERE / "assets/notebook_tokens.png").read_bytes()
    assert base64.b64decode(pictures[-1]) == shown, "write it to assets/notebook_tokens.png"


# Decimal numbers in prose that no cell computes: of papers, formats and devices.
GIVEN = {"8.0", "0.0001", "0.002", "1.8"}


def test_prose_holds_no_number_that_another_execution_would_change():
    """What is measured is printed by a cell: prose would keep the old number."""
    for path in BOOKS:
        cells = nbformat.read(path, as_version=4).cells
        prose = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
        code = " ".join(cell.source for cell in cells if cell.cell_type == "code")
        numbers = [set(re.findall(r"\d+\.\d+", text)) for text in (prose, code)]
        assert numbers[0] - numbers[1] <= GIVEN, path
