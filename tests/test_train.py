"""The training loop: however a run is stopped or moved, its command ends with the same numbers."""

import json
import math
import shutil
import signal
import struct
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from tensorboardX.proto.event_pb2 import Event

from dsv3_jax.data import tokenizer
from dsv3_jax.data.batches import Batches
from dsv3_jax.data.source import open_source
from dsv3_jax.report.metrics_files import numbers_beside, parse_rows
from dsv3_jax.runs import loop, steps
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.folder import RUN_FILE, TOKENIZER_FILE, claim, read_run
from dsv3_jax.runs.prepare import Callback, FitOptions

PNG = b"\x89PNG\r\n\x1a\n"
BEGUN = 5  # steps taken in the folders that are begun


@pytest.fixture(scope="module")
def stopped(whole, root):
    """`whole`, stopped at step BEGUN: what `fit` returned and printed. `begun` copies it."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in runs.SECONDS:
            patch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
        how = {"stop_after": BEGUN, "report": False}
        return runs.said_by(lambda: loop.fit(whole.run, root / "begun", **how))


@pytest.fixture
def begun(stopped, root, tmp_path) -> Path:
    return Path(shutil.copytree(root / "begun", tmp_path / "run"))


def assert_same_run(folder: Path, whole: Path) -> None:
    """Compare parameters, optimizer, biases, data position, and all metrics."""
    (state, place), (want, want_place) = runs.last_state(folder), runs.last_state(whole)
    assert int(state.step) == runs.STEPS
    runs.assert_bitwise(state, want)
    assert place == want_place
    assert runs.rows_of(folder) == runs.rows_of(whole)
    assert (folder / "load.jsonl").read_text() == (whole / "load.jsonl").read_text()


def test_a_run_folder_holds_what_it_should(whole):
    rows = runs.rows_of(whole.folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, runs.STEPS + 1))
    assert [row["step"] for row in rows if "val_loss" in row] == [6, 12]
    steps = [row for row in rows if "loss" in row]
    assert all(np.isfinite(row["loss"]) and len(row["mtp_loss"]) == 1 for row in steps)
    assert rows[0]["loss"] > rows[-1]["val_loss"]  # it learns
    assert {path.name for path in (whole.folder / "checkpoints").iterdir()} == {"8", "12"}  # keep=2
    for name in ("routing.png", "training.png"):
        assert (whole.folder / name).read_bytes().startswith(PNG)
    fitted = whole.fitted
    assert (fitted.finished, fitted.step, fitted.resumed_from) == (True, runs.STEPS, None)
    assert f", against {fitted.order2_bits_per_byte:.3f} of an order-2 byte model" in whole.said


def test_tensorboard_holds_the_same_scalars(whole):
    (file,) = (whole.folder / "tensorboard").glob("events.out.tfevents.*")
    blob, at, found = file.read_bytes(), 0, {}
    while at < len(blob):  # a record: its length, a checksum, the event, a checksum
        (length,) = struct.unpack_from("<Q", blob, at)
        event = Event.FromString(blob[at + 12 : at + 12 + length])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        at += 16 + length
    for row in runs.rows_of(whole.folder):
        for name in {"loss", "grad_norm", "max_vio", "val_bits_per_byte"} & row.keys():
            assert found[row["step"], name] == np.float32(row[name])


@pytest.mark.parametrize(
    ("data", "others", "sentence"),
    [
        ({}, {"held_out": list}, "the source holds out no row"),
        ({"seq_len": 8}, {}, "data.seq_len=16 is not that of the source, 8;"),
        ({"batch_size": 8}, {}, "data.batch_size=4 is not that of the source, 8;"),
    ],
)
def test_a_source_that_does_not_fit_the_run_is_refused(whole, tmp_path, data, others, sentence):
    source = open_source(replace(whole.run.data, **data), tokenizer.load("bytes"))
    with runs.refused(f"^{sentence}"):
        loop.fit(whole.run, tmp_path / "run", source=replace(source, **others), quiet=True)
    assert not any((tmp_path / "run").glob("checkpoints/*"))


class Recorder(Callback):
    """Notes each call and row. At step `at` it calls `act`."""

    def __init__(self, at=None, act=None):
        self.calls, self.rows, self._at, self._act = [], [], at, act

    def on_start(self, run, out, step):
        self.calls.append(("start", step))

    def on_step(self, row):
        self.calls.append(("step", row["step"]))
        self.rows.append(row)
        if row["step"] == self._at:
            self._act()

    def on_evaluation(self, row):
        self.calls.append(("evaluation", row["step"]))
        self.rows.append(row)

    def on_checkpoint(self, step, folder):
        assert folder.name == str(step)
        self.calls.append(("checkpoint", step))

    def on_end(self, result):
        self.calls.append(("end", result.step))


def test_stopped_and_resumed_is_never_stopped(whole, stopped, begun, capfd):
    """By steps, SIGTERM and at once; rows of metrics after the checkpoint, or cut, are dropped."""
    first, said = stopped
    assert (first.step, first.finished, first.resumed_from) == (BEGUN, False, None)
    assert "stopped and saved at step 5" in said and " tokens/s" in said
    assert "MFU" in whole.said and "MFU" not in said
    with (begun / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 0.0}) + "\n" + '{"step": 7, "lo')
    stop = Recorder(at=6, act=lambda: signal.raise_signal(signal.SIGTERM))
    second = loop.fit(whole.run, begun, quiet=True, report=False, callbacks=[stop])
    assert "stopping when this step" in capfd.readouterr().err
    assert (second.step, second.finished, second.resumed_from) == (7, False, BEGUN)
    again, said = runs.said_by(lambda: loop.fit(whole.run, begun, stop_after=7, report=False))
    assert (again.step, again.finished, again.resumed_from) == (7, False, 7)
    assert "compiling" not in said
    third, said = runs.said_by(lambda: loop.fit(whole.run, begun, report=False))
    assert (third.step, third.finished, third.resumed_from) == (runs.STEPS, True, 7)
    assert "resumed from the checkpoint of step 7" in said
    assert_same_run(begun, whole.folder)
    assert third.evaluation["val_loss"] == whole.fitted.evaluation["val_loss"]
    assert third.order2_bits_per_byte is None and not list(begun.glob("*.png"))


@pytest.mark.long
def test_a_run_with_a_damaged_checkpoint_and_damaged_metrics_ends_the_same(whole, tmp_path):
    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    (folder / "checkpoints" / "12" / "data" / "metadata").write_text("{}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2:2] = "", "12", "{}", '{"step'
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result, said = runs.said_by(loop.fit, whole.run, folder)
    assert result.resumed_from == 8
    assert "the checkpoint of step 12 is kept as 12.damaged: file=" in said
    assert "data/metadata' is damaged" in said
    assert f"file={folder}/metrics.jsonl: lines 3, 4, 5, 6 are no rows and are passed over" in said
    assert_same_run(folder, whole.folder)
    assert loop.fit(whole.run, folder, step=8, quiet=True).resumed_from == 8
    assert_same_run(folder, whole.folder)


def error_of(run, folder) -> str:
    code, _, err = runs.by_command("train", "tiny", "--out", folder, *runs.flags(run))
    (said,) = err.splitlines()
    assert code == 2
    return said


NAN = np.float32("nan")
SPOILED = {
    "parameter head": lambda state: (state.params, "head", 1e30),
    "router bias sparse.moe.bias": lambda state: (state.bias["sparse"]["moe"], "bias", NAN),
    "an optimizer state": lambda state: (state.opt.mu, "head", NAN),
}


@pytest.mark.long
def test_what_an_update_spoiled_is_not_saved(whole, begun):
    with loop.open_training(whole.run, begun, FitOptions(quiet=True, report=False)) as training:
        training.step = 8
        for what, part_of in SPOILED.items():
            part, name, factor = part_of(training.state)
            good = part[name]
            part[name] = good.replace(good[...] * factor)
            kept = f"the last good checkpoint is step {BEGUN} in {begun}"
            with runs.refused(f"^step 8 has {what}, whose norm is not finite; .*; {kept}"):
                training.save()
            part[name] = good
    assert not (begun / "checkpoints" / "8").exists()


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_the_run(whole, begun, monkeypatch):
    calls = []

    def make(job):
        good = steps.make_step(job)

        def step(state, *rest):
            calls.append(state)
            if len(calls) == 4:
                with jax.transfer_guard("allow"):
                    head = state.params["head"]
                    state.params["head"] = head.replace(head[...].at[0, 0].set(np.inf))
            return good(state, *rest)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_compiled_step", make)
        said = error_of(whole.run, begun)
    assert len(calls) == 4 and "step 8 met" in said
    assert "first bad tensor: parameter head" in said
    assert "last good checkpoint is step 8" in said
    assert loop.fit(whole.run, begun, quiet=True).resumed_from == 8  # without the poison
    assert_same_run(begun, whole.folder)


def test_a_bad_record_in_the_middle_ends_the_run_after_it_is_saved(whole, begun, monkeypatch):
    good = Batches.__next__

    def read(self):
        if self._row == 7 * whole.run.data.batch_size:
            raise ValueError("shard 'a' is damaged in record 82")
        return good(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__next__", read)
        patch.setattr(steps, "AHEAD", {"cpu": 2})
        said = error_of(whole.run, begun)
    assert said == "dsv3: shard 'a' is damaged in record 82"
    assert runs.rows_of(begun) == runs.rows_of(whole.folder)[:8]  # 7 steps, and an evaluation
    assert loop.fit(whole.run, begun, quiet=True).resumed_from == 7
    assert_same_run(begun, whole.folder)


class Numbers(Callback):
    def on_step(self, row):
        return {"twice": 2 * row["loss"]}

    def on_evaluation(self, row):
        return {"rank": 3}


def test_a_callback_that_fails_ends_the_run_after_it_is_saved(whole, begun):
    """It stops after the next step, and calls the other callback to the end. The call resumes.

    Numbers that a callback returns join the rows; later callbacks see them.
    """
    broken = Recorder(at=7, act=lambda: {}["no connection to the tracker"])
    first, second = Recorder(), Recorder()
    with pytest.raises(KeyError, match="no connection to the tracker"):
        loop.fit(whole.run, begun, quiet=True, callbacks=[broken, Numbers(), first])
    want = [("start", 5), ("step", 6), ("evaluation", 6), ("step", 7)]
    want += [("step", 8), ("checkpoint", 8)]
    assert first.calls == want and broken.calls == want[:4]
    more = [Numbers(), second]
    assert loop.fit(whole.run, begun, quiet=True, callbacks=more).resumed_from == 8
    assert second.calls[:2] == [("start", 8), ("step", 9)]
    assert second.calls[-3:] == [("evaluation", 12), ("checkpoint", 12), ("end", 12)]

    plain, rows = runs.rows_of(whole.folder), runs.rows_of(begun)
    added = [{"twice": 2 * row["loss"]} if "loss" in row else {"rank": 3} for row in plain[BEGUN:]]
    wanted = [row | more for row, more in zip(plain[BEGUN:], added, strict=True)]
    assert rows == plain[:BEGUN] + wanted
    seen = first.rows + second.rows
    kept = [{k: v for k, v in row.items() if k not in runs.CLOCK} for row in seen]
    assert kept == wanted and parse_rows(begun / "metrics.jsonl")[1] == []


def test_numbers_of_a_callback_that_cannot_join_are_refused():
    for found, sentence in (
        (3, "a callback returns 3, not a dict of numbers by name"),
        ({"step": 1.0}, "metric 'step' is no name, or another"),
        ({"load": 1.0}, "metric 'load' is no name, or another"),  # a matrix in other files
        ({"x": math.nan}, "metric x=nan is no finite number"),
        ({"x": "3"}, "metric x='3' is no finite number"),
    ):
        with runs.refused(sentence):
            numbers_beside({"step": 1}, found)


@pytest.mark.long
def test_a_moved_folder_continues_without_the_tokenizers_file(whole, tmp_path, monkeypatch):
    """It names what is inside it by name, text by place. Another tokenizer is another run."""
    text, there = Path(whole.run.data.paths[0]), tmp_path / "elsewhere"
    monkeypatch.chdir(text.parent)
    words = str(tmp_path / "words" / TOKENIZER_FILE)
    data = replace(whole.run.data, paths=("text",), tokenizer=words)
    tokenizer.train_bpe(["no merges"], 260, data.tokenizer)
    run = replace(whole.run, data=data)
    loop.fit(run, there / "renamed", stop_after=BEGUN, quiet=True, report=False)
    shutil.rmtree(tmp_path / "words")
    monkeypatch.chdir(there)
    moved = Path("renamed")
    written = json.loads((moved / RUN_FILE).read_text())["run"]["data"]
    assert (written["tokenizer"], written["paths"]) == (TOKENIZER_FILE, [str(text)])
    assert load_run(moved).step == BEGUN

    by_bytes = replace(read_run(moved), data=replace(read_run(moved).data, tokenizer="bytes"))
    with runs.refused(r"^data\.tokenizer='bytes' is not that of the run in renamed, 'renamed"):
        claim(moved, by_bytes)
    run = replace(run, data=replace(data, paths=(f"{text}/../text",)))  # another spelling
    again = loop.fit(run, moved, stop_after=BEGUN + 1, quiet=True, report=False)
    assert again.resumed_from == BEGUN


@pytest.mark.long
def test_the_next_batch_is_copied_while_a_step_runs_and_nothing_is_by_accident(
    whole, begun, monkeypatch
):
    events, put = [], steps.processes.put

    def make(job):
        step = steps.make_step(job)

        def started(*inputs):
            events.append("start")
            assert jax.config.jax_transfer_guard_host_to_device == "disallow"
            return step(*inputs)

        return started

    monkeypatch.setattr(steps, "AHEAD", {})  # as on an accelerator
    monkeypatch.setattr(steps, "_compiled_step", make)
    monkeypatch.setattr(steps.processes, "put", lambda *of: events.append("put") or put(*of))
    run = replace(whole.run, eval_every=20, save_every=9)
    loop.fit(run, begun, stop_after=10, quiet=True)
    # Step 9 is saved: no batch is made ahead of it, so the data position is that of the steps.
    assert events == ["put", "start"] * 5
    assert runs.rows_of(begun) == [row for row in runs.rows_of(whole.folder) if "loss" in row][:10]
