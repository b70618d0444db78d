"""The training loop: however a run is stopped, the same command ends with the same numbers."""

import json
import shutil
import signal
import struct
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import (
    CLOCK,
    SECONDS,
    STEPS,
    assert_bitwise,
    finished,
    flags,
    rows_of,
    said_by,
    unhooked_cli,
)
from tensorboardX.proto.event_pb2 import Event

from dsv3_jax.config import ConfigError
from dsv3_jax.training import loop
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.prepare import Callback

pytestmark = pytest.mark.usefixtures("cheap")

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def whole(root):
    return finished(root)


def main(argv: list[str]) -> int:
    return unhooked_cli().main(argv)


def last_checkpoint(run, folder: Path):
    with Checkpoints(folder, run) as checkpoints:
        return checkpoints.restore()


def assert_same_run(run, folder: Path, whole) -> None:
    """Compare parameters, optimizer, biases, data position, and all metrics."""
    (state, place), (want, want_place) = last_checkpoint(run, folder), last_checkpoint(whole.run, whole.folder)
    assert int(state.step) == STEPS
    assert_bitwise(state, want)
    assert place == want_place
    assert rows_of(folder) == rows_of(whole.folder)
    assert (folder / "load.jsonl").read_text() == (whole.folder / "load.jsonl").read_text()


def test_a_run_folder_holds_what_it_should(whole):
    rows = rows_of(whole.folder)
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "val_loss" in row] == [6, 12]
    assert all(np.isfinite(row["loss"]) and len(row["mtp_loss"]) == 1 for row in rows if "loss" in row)
    assert rows[0]["loss"] > rows[-1]["val_loss"]  # it learns
    assert {path.name for path in (whole.folder / "checkpoints").iterdir()} == {"8", "12"}  # keep=2
    for name in ("routing.png", "training.png"):
        assert (whole.folder / name).read_bytes().startswith(PNG)
    assert whole.fitted.finished and whole.fitted.step == STEPS and whole.fitted.resumed_from is None
    assert f", against {whole.fitted.order2_bits_per_byte:.3f} of an order-2 byte model" in whole.said


def test_tensorboard_holds_the_same_scalars(whole):
    (file,) = (whole.folder / "tensorboard").glob("events.out.tfevents.*")
    blob, at, found = file.read_bytes(), 0, {}
    while at < len(blob):  # a record: its length, a checksum, the event, a checksum
        (length,) = struct.unpack_from("<Q", blob, at)
        event = Event.FromString(blob[at + 12 : at + 12 + length])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        at += 16 + length
    for row in rows_of(whole.folder):
        for name in {"loss", "grad_norm", "max_vio", "val_bits_per_byte"} & row.keys():
            assert found[row["step"], name] == np.float32(row[name])
        if "mtp_loss" in row:
            assert found[row["step"], "mtp_loss/0"] == np.float32(row["mtp_loss"][0])


def test_stopped_and_resumed_is_never_stopped(whole, tmp_path, monkeypatch):
    """Twice, and without a report. Rows of metrics after the checkpoint are dropped, also one that is cut short."""
    folder = tmp_path / "run"
    for module, name in SECONDS:
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    first, said = said_by(lambda: loop.fit(whole.run, folder, stop_after=5, report=False))
    assert (first.step, first.finished, first.resumed_from) == (5, False, None)
    assert "stopped and saved at step 5" in said and " tokens/s" in said and "MFU" in whole.said and "MFU" not in said
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 0.0}) + "\n" + '{"step": 7, "lo')
    second = loop.fit(whole.run, folder, stop_after=7, quiet=True, report=False)
    assert (second.step, second.finished, second.resumed_from) == (7, False, 5)
    third, said = said_by(lambda: loop.fit(whole.run, folder, report=False))
    assert (third.step, third.finished, third.resumed_from) == (STEPS, True, 7)
    assert "resumed from the checkpoint of step 7" in said
    assert_same_run(whole.run, folder, whole)
    assert third.evaluation["val_loss"] == whole.fitted.evaluation["val_loss"]
    assert third.order2_bits_per_byte is None and not list(folder.glob("*.png"))
    again = loop.fit(whole.run, folder, quiet=True, report=False)  # a finished run is only looked at
    assert (again.step, again.finished, again.resumed_from) == (STEPS, True, STEPS)
    assert_same_run(whole.run, folder, whole)


def test_a_run_with_a_damaged_checkpoint_and_damaged_metrics_ends_the_same(whole, tmp_path):
    """It resumes from the checkpoint before, and keeps rows behind a bad line; then from a step that is asked for."""
    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    (folder / "checkpoints" / "12" / "data" / "metadata").write_text("{}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], "", "12", "{}", '{"step', *lines[2:]]) + "\n")
    result, said = said_by(loop.fit, whole.run, folder)
    assert result.resumed_from == 8
    assert "the checkpoint of step 12 is kept as 12.damaged: file=" in said and "data/metadata' is damaged" in said
    assert f"file={folder}/metrics.jsonl: lines 3, 4, 5, 6 are no rows and are passed over" in said
    assert_same_run(whole.run, folder, whole)
    assert loop.fit(whole.run, folder, step=8, quiet=True).resumed_from == 8
    assert_same_run(whole.run, folder, whole)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"8", "12", "12.damaged", "12.superseded"}


@pytest.mark.parametrize("what", ["parameter head", pytest.param("an optimizer state", marks=pytest.mark.long)])
def test_what_an_update_spoiled_is_not_saved(what, whole, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"

    def make(job):
        good = loop.make_step(job)

        def step(state, batch, go):
            state, metrics = good(state, batch, go)
            with jax.transfer_guard("allow"):
                if state.step == 8 and what == "parameter head":
                    state.params["head"] = state.params["head"].replace(state.params["head"][...] * 1e30)
                elif state.step == 8:
                    state = replace(state, opt=jax.tree.map(lambda x: x * float("nan"), state.opt))
            return state, metrics

        return step

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_compiled_step", make)
        assert main(["train", "tiny", "--out", str(folder), *flags(whole.run)]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert f"step 8 made {what}, whose norm is not finite" in said
    assert f"the last good checkpoint is step 4 in {folder}" in said
    assert loop.fit(whole.run, folder, quiet=True).resumed_from == 4


def no_connection():
    raise KeyError("no connection to the tracker")


class Recorder(Callback):
    def __init__(self, breaks_at=None, how=no_connection):
        self.calls, self.rows, self._breaks_at, self._break = [], [], breaks_at, how

    def on_start(self, run, out, step):
        self.calls.append(("start", step))

    def on_step(self, row):
        self.calls.append(("step", row["step"]))
        self.rows.append(row)
        if row["step"] == self._breaks_at:
            self._break()

    def on_evaluation(self, row):
        self.calls.append(("evaluation", row["step"]))
        self.rows.append(row)

    def on_checkpoint(self, step, folder):
        assert folder.name == str(step)
        self.calls.append(("checkpoint", step))

    def on_end(self, result):
        self.calls.append(("end", result.step))


@pytest.mark.long
def test_a_callback_that_fails_ends_the_run_after_it_is_saved(whole, tmp_path):
    """It stops after the step that follows, and the other callback is called to the end. The same call resumes."""
    folder, first, broken, second = tmp_path / "run", Recorder(), Recorder(breaks_at=6), Recorder()
    with pytest.raises(KeyError, match="no connection to the tracker"):
        loop.fit(whole.run, folder, quiet=True, callbacks=[broken, first])
    steps = [("step", step) for step in range(1, STEPS + 1)]
    want = [("start", 0), *steps[:4], ("checkpoint", 4), *steps[4:6], ("evaluation", 6), steps[6], ("checkpoint", 7)]
    assert first.calls == want and broken.calls == want[:8]
    assert loop.fit(whole.run, folder, quiet=True, callbacks=[second]).resumed_from == 7
    assert second.calls[:3] == [("start", 7), steps[7], ("checkpoint", 8)]
    assert second.calls[-3:] == [("evaluation", 12), ("checkpoint", 12), ("end", 12)]
    kept = [{k: v for k, v in row.items() if k not in CLOCK} for row in first.rows + second.rows]
    assert kept == rows_of(folder) == rows_of(whole.folder)


def test_sigterm_saves_and_the_next_call_resumes(whole, tmp_path):
    stop = Recorder(breaks_at=2, how=lambda: signal.raise_signal(signal.SIGTERM))
    stopped = loop.fit(whole.run, tmp_path / "run", quiet=True, callbacks=[stop])
    assert (stopped.step, stopped.finished) == (3, False)
    assert loop.fit(whole.run, tmp_path / "run", quiet=True).resumed_from == 3
    assert_same_run(whole.run, tmp_path / "run", whole)


def test_the_next_batch_is_copied_while_a_step_runs_and_nothing_is_by_accident(whole, tmp_path, monkeypatch, ahead):
    """JAX refuses transfers that are not asked for, from a batch to the start of a step."""
    events, put = [], loop.processes.put

    def make(job):
        step = loop.make_step(job)

        def started(*inputs):
            events.append(f"start {1 + sum(e.startswith('start') for e in events)}")
            assert jax.config.jax_transfer_guard_host_to_device == "disallow"
            return step(*inputs)

        return started

    def noted(*args):
        events.append(f"put {1 + sum(e.startswith('put') for e in events)}")
        return put(*args)

    class Noted(Callback):
        def on_step(self, row):
            events.append(f"row {row['step']}")

    monkeypatch.setattr(loop, "_compiled_step", make)
    monkeypatch.setattr(loop.processes, "put", noted)
    loop.fit(whole.run, tmp_path / "run", stop_after=5, quiet=True, callbacks=[Noted()])
    # Step 4 is saved: no batch is made ahead of it, so the data position is that of the steps.
    assert events == [
        *("put 1", "start 1", "put 2", "start 2", "put 3", "start 3", "put 4", "row 1"),
        *("start 4", "row 2", "row 3", "row 4", "put 5", "start 5", "row 5"),
    ]
    assert rows_of(tmp_path / "run") == rows_of(whole.folder)[:5]


def poisoned_at(bad: int, steps: list[int], late: bool):
    """Make a compiled step that meets a parameter which is not finite when it is called after `bad` calls."""

    def make(job):
        good = loop.make_step(job)

        def step(state, batch, go):
            with jax.transfer_guard("allow"):
                head = state.params["head"]
                sound = np.asarray(head[...])
                if len(steps) == bad:
                    state.params["head"] = head.replace(head[...].at[0, 0].set(np.inf))
                state, metrics = good(state, batch, go)
                if len(steps) == bad and late:  # what follows is sound again
                    state.params["head"] = head.replace(jax.numpy.asarray(sound))
                steps.append(int(state.step))
                return state, metrics

        return step

    return make


@pytest.fixture
def ahead(monkeypatch):
    """Steps are started before the one before is looked at, as on an accelerator."""
    monkeypatch.setattr(loop, "AHEAD", {})


@pytest.mark.parametrize("late", [False, pytest.param(True, marks=pytest.mark.rare)])
def test_a_loss_that_is_not_finite_stops_the_run(whole, tmp_path, monkeypatch, capfd, late):
    """If steps are started ahead, two more have started by the time the bad one is seen, and they change nothing."""
    folder, steps = tmp_path / "run", []
    with monkeypatch.context() as patch:
        if late:
            patch.setattr(loop, "AHEAD", {})
        patch.setattr(loop, "_compiled_step", poisoned_at(8, steps, late))
        assert main(["train", "tiny", "--out", str(folder), *flags(whole.run)]) == 2
    assert steps == [*range(1, 9), *(8,) * (3 if late else 1)]
    (said,) = capfd.readouterr().err.splitlines()
    assert "step 8 met" in said and "first bad tensor: " in said and "last good checkpoint is step 8" in said
    assert ("parameter head" in said) != late
    assert loop.fit(whole.run, folder, quiet=True).resumed_from == 8  # without the poison
    assert_same_run(whole.run, folder, whole)


@pytest.mark.rare
def test_a_finished_run_goes_on_for_more_steps(whole, tmp_path):
    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    longer = replace(whole.run, steps=STEPS + 2, eval_every=9)
    result = loop.fit(longer, folder, quiet=True)
    assert (result.resumed_from, result.step, result.finished) == (STEPS, STEPS + 2, True)
    assert [row["step"] for row in rows_of(folder) if "loss" in row] == list(range(1, STEPS + 3))
    with pytest.raises(ConfigError, match=f"steps={STEPS} is below the {STEPS + 2} steps that the run in .* has taken"):
        loop.fit(whole.run, folder, quiet=True)
