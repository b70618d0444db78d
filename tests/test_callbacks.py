"""Callbacks of a run, and the loop's look-ahead on the devices."""

import contextlib
import shutil

import jax
import pytest
from runs import STEPS, cheap_compiles, finished, rows_of, unhooked

from dsv3_jax.training import loop
from dsv3_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    with cheap_compiles():
        yield root


@pytest.fixture(scope="module")
def whole(root):
    return finished(root)


class Recorder(loop.Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, run, out, step):
        self.calls.append(("start", out.name, step))

    def on_step(self, row):
        self.calls.append(("step", row))

    def on_evaluation(self, row):
        self.calls.append(("evaluation", row))

    def on_checkpoint(self, step, folder):
        self.calls.append(("checkpoint", step, folder.name))

    def on_end(self, result):
        self.calls.append(("end", result))

    def names(self):
        """The calls, with their steps."""
        return [
            (call[0], call[1]["step"] if isinstance(call[1], dict) else call[-1])
            for call in self.calls
            if call[0] not in ("start", "end")
        ]


class Broken(Recorder):
    def on_step(self, row):
        super().on_step(row)
        if row["step"] == 6:
            raise KeyError("no connection to the tracker")


def same_numbers(row):
    return {k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu", "kernels")}


@pytest.mark.long
def test_callbacks_are_called_and_one_that_fails_ends_the_run_after_it_is_saved(whole, tmp_path):
    """It stops after the step that follows, and the other callback is called to the end. The same call resumes."""
    first, broken, second = Recorder(), Broken(), Recorder()
    with pytest.raises(KeyError, match="no connection to the tracker"):
        loop.fit(whole.run, tmp_path / "run", quiet=True, callbacks=[broken, first])
    assert first.calls[0] == ("start", "run", 0)
    rows = [("step", step) for step in range(1, STEPS + 1)]
    stopped = [*rows[:4], ("checkpoint", "4"), *rows[4:6], ("evaluation", 6), rows[6], ("checkpoint", "7")]
    assert first.names() == stopped and broken.names() == stopped[:7]
    with Checkpoints(tmp_path / "run", whole.run, read_only=True) as checkpoints:
        assert checkpoints.latest == 7
    result = loop.fit(whole.run, tmp_path / "run", quiet=True, callbacks=[second])
    assert second.calls[0] == ("start", "run", 7) and second.calls[-1] == ("end", result) and result.resumed_from == 7
    assert second.names() == [rows[7], ("checkpoint", "8"), *rows[8:], ("evaluation", 12), ("checkpoint", "12")]
    seen = [same_numbers(c[1]) for c in first.calls + second.calls if c[0] in ("step", "evaluation")]
    assert seen == rows_of(tmp_path / "run") == rows_of(whole.folder)


def test_a_failure_at_the_end_is_raised_after_the_run_is_saved(whole, tmp_path):
    class Last(loop.Callback):
        def on_end(self, result):
            raise OSError(f"step {result.step} was not sent")

    folder = shutil.copytree(whole.folder, tmp_path / "run")
    with pytest.raises(OSError, match=f"^step {STEPS} was not sent$"):
        loop.fit(whole.run, folder, quiet=True, callbacks=[Last()])
    # Without the tests' import hook, which would refuse it first.
    callbacks = unhooked("dsv3_jax.training.callbacks")
    with pytest.raises(ValueError, match=r"^callbacks holds 'wandb', which is no dsv3_jax.train.Callback$"):
        callbacks.Callbacks(["wandb"])
    assert rows_of(folder) == rows_of(whole.folder)


def test_the_hot_path_looks_ahead_and_transfers_nothing_by_accident(whole, tmp_path, monkeypatch):
    """The next batch is on the devices before a step's row is written; numbers and data position stay the same.

    Between the start and the end of training, JAX refuses transfers that are not asked for, and the host reads no
    device value as a Python number. Saving is not on the hot path.
    """
    monkeypatch.setattr(loop, "AHEAD", {})
    events, guards = [], contextlib.ExitStack()

    def allowed(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            with jax.transfer_guard("allow"):
                return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    allowed(loop, "first_nonfinite")
    allowed(loop.Checkpoints, "save")

    def read(name):
        """A device value as a Python number; the guard above does not see it on a CPU, which shares its memory."""
        real = getattr(type(jax.numpy.zeros(())), name)

        def call(value):
            assert jax.config.jax_transfer_guard_host_to_device != "disallow", f"{name} of a device value"
            return real(value)

        return call

    for number in ("__bool__", "__float__", "__int__"):
        monkeypatch.setattr(type(jax.numpy.zeros(())), number, read(number))

    class Guard(Recorder):
        def on_start(self, run, out, step):
            guards.enter_context(jax.transfer_guard("disallow"))

        def on_step(self, row):
            events.append(f"row {row['step']}")

    def make(*args, **kwargs):
        step = loop.make_step(*args, **kwargs)

        def noted(*inputs):
            events.append(f"start {1 + sum(e.startswith('start') for e in events)}")
            return step(*inputs)

        return noted

    real_put = loop.processes.put

    def put(*args):
        events.append(f"put {1 + sum(e.startswith('put') for e in events)}")
        return real_put(*args)

    monkeypatch.setattr(loop, "_compiled_step", make)
    monkeypatch.setattr(loop.processes, "put", put)
    with guards:
        loop.fit(whole.run, tmp_path / "run", stop_after=5, quiet=True, callbacks=[Guard()])
    # Step 4 is saved: no batch is made ahead of it, so the data position is that of the steps.
    assert events == [
        *("put 1", "start 1", "put 2", "start 2", "put 3", "start 3", "put 4", "row 1"),
        *("start 4", "row 2", "row 3", "row 4", "put 5", "start 5", "row 5"),
    ]
    assert rows_of(tmp_path / "run") == rows_of(whole.folder)[:5]
