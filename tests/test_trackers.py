"""`dsv3 train --report`: other programs get the rows of metrics.jsonl."""

import sys
from types import SimpleNamespace

import pytest
from runs import CLOCK, make_run, rows_of

from dsv3_jax.cli.trackers import trackers
from dsv3_jax.config import to_dict
from dsv3_jax.report.metrics_files import flat
from dsv3_jax.runs import loop


@pytest.fixture
def calls(monkeypatch):
    """What a wandb that only remembers is called with."""
    calls = []
    fake = SimpleNamespace(
        init=lambda **how: calls.append(("init", how)),
        log=lambda row, step: calls.append(("log", step, row)),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return calls


@pytest.mark.long
def test_wandb_gets_each_row_and_a_run_that_resumes_goes_on_there(calls, whole, tmp_path):
    run, out = whole.run, tmp_path / "run"
    for stop in (2, 6):
        with trackers(("wandb",)) as callbacks:
            loop.fit(run, out, stop_after=stop, quiet=True, callbacks=callbacks)
    begins = [how for name, *how in calls if name == "init"]
    assert begins[0] == begins[1] and begins[0][0]["name"] == "run"
    assert begins[0][0]["config"]["steps"] == to_dict(run)["steps"]
    assert begins[0][0]["id"] == (out / "wandb_id").read_text().strip() != ""
    assert [code for name, code, *_ in calls if name == "finish"] == [0, 0]

    rows = [{"step": step} | row[0] for name, step, *row in calls if name == "log"]
    sent = [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]
    assert sent == [{"step": row["step"]} | flat(row) for row in rows_of(out)]
    assert len(sent) == 7  # 6 steps and an evaluation


def test_training_that_fails_ends_as_a_failure_there(calls):
    with pytest.raises(KeyError), trackers(("wandb", "tensorboard")):
        raise KeyError
    assert calls == [("finish", 1)]


def test_tensorboards_command_is_named(tmp_path, monkeypatch, capsys):
    with trackers(("tensorboard",)) as (callback,):
        callback.on_start(make_run("text"), tmp_path, 0)
    assert f"pip install tensorboard; tensorboard --logdir {tmp_path}" in capsys.readouterr().out
