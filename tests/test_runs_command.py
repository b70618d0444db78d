"""`dsv3 runs`: a table of the runs below a folder."""

import os

import pytest
from flax import nnx
from runs import by_command, make_run, write_lines

from dsv3_jax.host.lock import acquire
from dsv3_jax.runs.folder import RUN_FILE, claim


@pytest.fixture
def folder(tmp_path):
    """Three runs, one of them in a subfolder and one damaged, and what is no run."""
    run = make_run("some text")
    for place, rows in (("first", 12), ("group/[b]", 5), ("new", 0)):
        claim(tmp_path / place, run)
        lines = [{"step": i + 1, "loss": 9.0 - i, "tokens_per_s": 1234.5} for i in range(rows)]
        write_lines(tmp_path / place / "metrics.jsonl", lines)
    (tmp_path / "first" / "checkpoints" / "12").mkdir(parents=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RUN_FILE).write_text("{")
    (tmp_path / "notes").mkdir()
    for age, place in enumerate(("first", "group/[b]", "new")):
        for file in (tmp_path / place).glob("*.json*"):
            os.utime(file, (2e9 - 100 * age,) * 2)
    return tmp_path


def listed(folder):
    code, out, err = by_command("runs", "list", folder)
    lines = [line.replace(str(folder) + "/", "").split() for line in out.splitlines()]
    return code, lines, err


def test_runs_are_listed_the_last_changed_first(folder, monkeypatch):
    """Without making a model: tracing one takes a tenth of a second a run."""
    monkeypatch.setattr(nnx, "Rngs", None)  # every model needs them
    with acquire(folder / "group" / "[b]"):
        code, lines, err = listed(folder)
    assert code == 0 and [line[0] for line in lines] == ["run", "first", "group/[b]", "new"]
    assert lines[1][1:5] == ["12/12", "finished", "-2.000", "1,234"]
    assert lines[2][1:4] == ["5/12", "training", "5.000"]
    assert lines[3][1:4] == ["0/12", "not", "begun"]
    assert err.startswith("dsv3: passed over: ")
    assert "run.json is not JSON" in err
    assert len(err.splitlines()) == 1
    assert "stopped" in listed(folder)[1][2]

    notes = folder / "notes"
    assert by_command("runs", "list", notes) == (0, f"no run in {notes}\n", "")
