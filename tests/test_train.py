"""The training loop: however a run is stopped, the same command ends with the same numbers."""

import gzip
import json
import shutil
import signal
import struct
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import (
    CLOCK,
    SECONDS,
    STEPS,
    assert_bitwise,
    cheap_compiles,
    finished,
    flags,
    rows_of,
    said_by,
    start,
    unhooked,
    unhooked_cli,
)
from tensorboardX.proto.event_pb2 import Event

from dsv3_jax.cli.train import parse_steps
from dsv3_jax.config import ConfigError
from dsv3_jax.data import from_corpus
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.report.ngram import order2_bits_per_byte
from dsv3_jax.training import loop
from dsv3_jax.training.callbacks import Callback
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.step import Job, init_state

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    with cheap_compiles():
        yield root


@pytest.fixture(scope="module")
def whole(root):
    return finished(root)


def main(argv: list[str]) -> int:
    return unhooked_cli().main(argv)


@cache
def corpus_of(run):
    return load_corpus(run.data)


def last_checkpoint(run, folder: Path):
    with Checkpoints(folder, run) as checkpoints:
        return checkpoints.restore()


def assert_same_run(run, folder: Path, whole) -> None:
    """Compare parameters, optimizer, biases, data position, and all metrics."""
    (state, place), (want, want_place) = last_checkpoint(run, folder), last_checkpoint(whole.run, whole.folder)
    assert int(state.step) == STEPS
    assert_bitwise(state, want)
    assert place == want_place != from_corpus(corpus_of(run), ByteTokenizer(), run.data).train_batches().get_state()
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
    assert not list(whole.folder.glob("*.part"))


def test_a_fresh_state_is_placed_as_a_resumed_one(whole):
    """So the step has one program for both, which is compiled once."""
    fresh, (resumed, _) = init_state(Job(whole.run)), last_checkpoint(whole.run, whole.folder)
    for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves(resumed), strict=True):
        assert (a.sharding, a.committed) == (b.sharding, b.committed)


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


def test_the_order_2_baseline_is_printed(whole):
    corpus, words = corpus_of(whole.run), ByteTokenizer()
    rows = [
        words.bytes_of(row[segments > 0].tolist())
        for batch in from_corpus(corpus, words, whole.run.data).val_batches(whole.run.eval_batches)
        for row, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
    ]
    want = order2_bits_per_byte((d.text.encode() for d in corpus.train), rows)
    assert whole.fitted.order2_bits_per_byte == pytest.approx(want, rel=1e-12)
    assert f", against {want:.3f} of an order-2 byte model" in whole.said


def test_two_runs_are_one_and_without_a_report_nothing_is_timed_or_drawn(whole, tmp_path, monkeypatch):
    for module, name in SECONDS:
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    fitted, said = said_by(lambda: loop.fit(whole.run, tmp_path / "run", report=False))
    assert_same_run(whole.run, tmp_path / "run", whole)
    assert fitted.order2_bits_per_byte is None and not list((tmp_path / "run").glob("*.png"))
    for words in ("MFU ", "estimated from matrix products", "order-2", "pictures: "):
        assert words in whole.said and words not in said
    assert " tokens/s" in said and f"\nnumbers: {tmp_path / 'run' / 'metrics.jsonl'}" in said


def test_runs_that_differ_in_their_seeds_alone_share_a_step(whole):
    other = replace(whole.run, seed=5, data=replace(whole.run.data, seed=6))
    assert loop._of_any_seed(Job(other)) == loop._of_any_seed(Job(whole.run))
    noisy = Job(replace(other, model=replace(other.model, router="noisy_topk", num_groups=1, groups_per_token=1)))
    assert loop._of_any_seed(noisy) == noisy  # its step draws by the seed
    assert loop._of_any_seed(Job(replace(other, steps=9))) != loop._of_any_seed(Job(other))


def test_stopped_and_resumed_is_never_stopped(whole, tmp_path):
    """Twice. Rows of metrics after the checkpoint are dropped, also one that is cut short."""
    folder = tmp_path / "run"
    first, said = said_by(lambda: loop.fit(whole.run, folder, stop_after=5))
    assert (first.step, first.finished, first.resumed_from) == (5, False, None)
    assert "stopped and saved at step 5" in said
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 0.0}) + "\n" + '{"step": 7, "lo')
    second = loop.fit(whole.run, folder, stop_after=7, quiet=True)
    assert (second.step, second.finished, second.resumed_from) == (7, False, 5)
    third, said = said_by(loop.fit, whole.run, folder)
    assert (third.step, third.finished, third.resumed_from) == (STEPS, True, 7)
    assert "resumed from the checkpoint of step 7" in said
    assert_same_run(whole.run, folder, whole)
    assert third.evaluation["val_loss"] == whole.fitted.evaluation["val_loss"]
    again = loop.fit(whole.run, folder, quiet=True)  # a finished run is only looked at
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


def test_what_an_update_spoiled_is_not_saved(whole, tmp_path, monkeypatch, capfd):
    folder, answers = tmp_path / "run", iter(["", "parameter head"])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "first_nonfinite", lambda trees, mesh: next(answers))
        assert main(["train", "tiny", "--out", str(folder), *flags(whole.run)]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert "step 8 made parameter head, whose norm is not finite" in said
    assert f"the last good checkpoint is step 4 in {folder}" in said
    assert loop.fit(whole.run, folder, quiet=True).resumed_from == 4


def often(run):
    """Change the run to save after every step, which slows it down enough to be stopped half-way."""
    return replace(run, save_every=1)


def wait_for(condition, process, seconds=60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.long
def test_sigterm_saves_and_the_next_call_resumes(whole, root, tmp_path):
    folder, run = tmp_path / "run", often(whole.run)
    process = start(["train", "tiny", "--out", str(folder), *flags(run)], root)
    wait_for(lambda: (folder / "checkpoints" / "1").exists(), process)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    state, _ = last_checkpoint(run, folder)
    step = int(state.step)
    assert 1 <= step < STEPS and f"stopped and saved at step {step}" in said
    assert loop.fit(run, folder, quiet=True).resumed_from == step
    assert_same_run(run, folder, whole)


class Recorder(Callback):
    def __init__(self, breaks_at: int | None = None):
        self.calls, self.rows, self._breaks_at = [], [], breaks_at

    def on_start(self, run, out, step):
        self.calls.append(("start", step))

    def on_step(self, row):
        self.calls.append(("step", row["step"]))
        self.rows.append(row)
        if row["step"] == self._breaks_at:
            raise KeyError("no connection to the tracker")

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


def test_a_callback_that_fails_at_the_end_is_raised(whole, tmp_path):
    class Last(Callback):
        def on_end(self, result):
            raise OSError(f"step {result.step} was not sent")

    with pytest.raises(OSError, match=f"^step {STEPS} was not sent$"):
        loop.fit(whole.run, shutil.copytree(whole.folder, tmp_path / "run"), quiet=True, callbacks=[Last()])
    with pytest.raises(ValueError, match=r"^callbacks holds 'wandb', which is no dsv3_jax.train.Callback$"):
        unhooked("dsv3_jax.training.prepare").Options(callbacks=["wandb"])


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


@pytest.mark.long
def test_a_trace_holds_its_steps(whole, tmp_path):
    loop.fit(whole.run, tmp_path, quiet=True, stop_after=5, profile=(2, 4))
    (trace,) = (tmp_path / loop.TRACE_FOLDER).rglob("perfetto_trace.json.gz")
    with gzip.open(trace, "rt") as file:
        assert file.read().count('"train"') == 2


@pytest.mark.parametrize("text", ["3", "5:5", "7:2", "a:b", "-1:3", "1:2:3", ""])
def test_steps_to_trace_that_are_none(text):
    with pytest.raises(ValueError, match="is not START:STOP, two steps of which the first is smaller"):
        parse_steps(text)


def poisoned_at(bad: int, steps: list[int]):
    """Make a compiled step that meets a parameter which is not finite when it is called after `bad` calls."""

    def make(job):
        good = loop.make_step(job)

        def step(state, batch, *go):
            with jax.transfer_guard("allow"):
                head = state.params["head"]
                sound = np.asarray(head[...])
                if len(steps) == bad:
                    state.params["head"] = head.replace(head[...].at[0, 0].set(np.inf))
                state, metrics = good(state, batch, *go)
                if len(steps) == bad and go:  # what follows is sound again
                    state.params["head"] = head.replace(jax.numpy.asarray(sound))
                steps.append(int(state.step))
                return state, metrics

        return step

    return make


@pytest.fixture
def ahead(monkeypatch):
    """Steps are started before the one before is looked at, as on an accelerator."""
    monkeypatch.setattr(loop, "AHEAD", {})


@pytest.mark.long
def test_steps_that_are_started_ahead_are_the_same_steps(whole, tmp_path, monkeypatch, ahead):
    """Stopped and resumed, too. Up to three have started before a row is written, and the program is compiled once."""
    folder, made, open_steps = tmp_path / "run", [], [0]

    def make(job):
        made.append(loop.make_step(job))

        def step(state, batch, go):
            open_steps.append(open_steps[-1] + 1)
            return made[-1](state, batch, go)

        return step

    def write(metrics, row):
        if "loss" in row:
            open_steps.append(open_steps[-1] - 1)
        loop.Rows.write(metrics, row)

    monkeypatch.setattr(loop.Metrics, "write", write)
    monkeypatch.setattr(loop, "_compiled_step", make)
    loop.fit(whole.run, folder, stop_after=5, quiet=True)
    assert open_steps[-1] == 0
    loop.fit(whole.run, folder, quiet=True)
    assert_same_run(whole.run, folder, whole)
    assert (open_steps[-1], max(open_steps)) == (0, 3)
    assert [step._cache_size() for step in made] == [1, 1]


@pytest.mark.parametrize("late", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_loss_that_is_not_finite_stops_the_run(whole, tmp_path, monkeypatch, capfd, late):
    """If steps are started ahead, two more have started by the time the bad one is seen, and they change nothing."""
    folder, steps = tmp_path / "run", []
    with monkeypatch.context() as patch:
        if late:
            patch.setattr(loop, "AHEAD", {})
        patch.setattr(loop, "_compiled_step", poisoned_at(8, steps))
        assert main(["train", "tiny", "--out", str(folder), *flags(whole.run)]) == 2
    assert steps == [*range(1, 9), *(8,) * (3 if late else 1)]
    (said,) = capfd.readouterr().err.splitlines()
    assert "step 8 met" in said and "first bad tensor: " in said and "last good checkpoint is step 8" in said
    assert ("parameter head" in said) != late
    assert loop.fit(whole.run, folder, quiet=True).resumed_from == 8  # without the poison
    assert_same_run(whole.run, folder, whole)


@pytest.mark.long
@pytest.mark.parametrize("when", ["no room for its ", "the disk is full"])
def test_a_full_disk_stops_the_run_in_a_sentence(whole, tmp_path, monkeypatch, capfd, when):
    """Before a checkpoint is written, and while a row of metrics is."""
    folder = tmp_path / "run"
    loop.fit(whole.run, folder, stop_after=3, quiet=True)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        if when == "the disk is full":
            patch.setattr(loop.Metrics, "write", full)
        else:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
        assert main(["train", "tiny", "--out", str(folder), *flags(whole.run)]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert when in said and str(folder) in said
    assert loop.fit(whole.run, folder, quiet=True).resumed_from == 3
    assert_same_run(whole.run, folder, whole)


@pytest.mark.long
def test_a_finished_run_goes_on_for_more_steps(whole, tmp_path, capsys):
    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    longer = replace(whole.run, steps=STEPS + 2, eval_every=9)
    result = loop.fit(longer, folder)
    said = capsys.readouterr().out
    assert (result.resumed_from, result.step, result.finished) == (STEPS, STEPS + 2, True)
    assert f"steps={STEPS + 2}, before {STEPS}" in said and "schedule is that of the new number of steps" in said
    assert [row["step"] for row in rows_of(folder) if "loss" in row] == list(range(1, STEPS + 3))
    with pytest.raises(ConfigError, match=f"steps={STEPS} is below the {STEPS + 2} steps that the run in .* has taken"):
        loop.fit(whole.run, folder, quiet=True)


def test_what_cannot_be_trained_is_refused_before_anything_is_written(whole, tmp_path):
    means = replace(whole.run, optim=replace(whole.run.optim, moments_dtype="bfloat16"))
    forced = replace(means, execution=replace(means.execution, kernels="optimizer=cpu"))
    with pytest.raises(ConfigError, match=r"^kernels='optimizer=cpu' is for float32 means, not moments_dtype='bfloa"):
        loop.fit(forced, tmp_path / "new")
    chats = replace(whole.run, data=replace(whole.run.data, format="chat"))
    with pytest.raises(ConfigError, match=r"^data.format='chat' needs the examples as source"):
        loop.fit(chats, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_runs_folder_is_left_alone(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    with pytest.raises(
        ValueError, match=r"^optim\.beta1=0\.8 is not that of the run in .*, 0\.9; choose another --out$"
    ):
        loop.fit(replace(whole.run, optim=replace(whole.run.optim, beta1=0.8)), whole.folder)
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == before
