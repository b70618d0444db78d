"""The steps of a run: which are logged, evaluated and saved, and when the loop waits for one."""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.data.batches import Batch, Batches, model_inputs
from dsv3_jax.host.lock import FolderLock
from dsv3_jax.mesh import processes
from dsv3_jax.report.metrics_files import (
    METRICS_FILE,
    AnswersFile,
    JsonLines,
    MetricsFile,
    load_every,
    load_row,
    numbers_beside,
    read_rows,
)
from dsv3_jax.report.progress import Progress
from dsv3_jax.report.run_result import draw, order2_of
from dsv3_jax.report.speed import Speed
from dsv3_jax.runs.answers import Answers
from dsv3_jax.runs.callbacks import Callback
from dsv3_jax.runs.checkpoint import Checkpoints
from dsv3_jax.runs.evaluate import evaluate
from dsv3_jax.runs.prepare import FitOptions, Prepared
from dsv3_jax.runs.tracing import StepTrace
from dsv3_jax.training.metrics import as_row
from dsv3_jax.training.state import (
    Job,
    TrainState,
    first_nonfinite,
    model_of,
    norm,
    split_trainable,
)
from dsv3_jax.training.step import first_bad_tensor, make_step

# Steps started before the oldest one is looked at. While they run, the next batch is read and
# copied. On a CPU the step needs all cores.
AHEAD = {"cpu": 0}
AHEAD_ELSEWHERE = 2
TRACE_FOLDER = "profile"
_compiled_step = lru_cache(maxsize=16)(make_step)  # a run resumed in one process compiles once


class NonFiniteLoss(ValueError):
    """A loss or gradient that is not finite; the message names the step and first bad tensor."""


@dataclass(frozen=True)
class FitResult:
    """How a call of `fit` ended."""

    step: int
    finished: bool  # False: stopped before the last step, by a signal or `stop_after`
    resumed_from: int | None
    evaluation: dict | None  # of the last step, see `evaluate`
    order2_bits_per_byte: float | None  # of an order-2 byte model on the same validation text


class Files(NamedTuple):
    """What a run writes to its folder."""

    folder: Path
    lock: FolderLock
    checkpoints: Checkpoints
    metrics: MetricsFile
    loads: JsonLines
    answers: AnswersFile


class Done(NamedTuple):
    """A step that was started, and what follows once it is complete."""

    step: int  # steps taken with it
    batch: dict[str, jax.Array]
    metrics: dict[str, Any]  # on the devices
    logged: bool
    evaluate: bool
    save: bool
    waits: bool  # no other step runs when it is yielded


@dataclass
class Training:
    """An open run: its state, its batches, and its files. See `loop.open_training`."""

    ready: Prepared
    options: FitOptions
    files: Files
    progress: Progress
    asked: threading.Event  # to stop
    state: TrainState
    batches: Batches
    held_out: list[Batch]
    speed: Speed
    step: int
    resumed_from: int | None
    callbacks: list[Callback]
    stopped: bool = False
    evaluation: dict[str, Any] | None = None
    error: Exception | None = None  # the first of a callback, or of the source

    @property
    def job(self) -> Job:
        """The run, its mesh and its kernels."""
        return self.ready.job

    def say_and_call(self, sentences: list[str]) -> None:
        """Say what the run begins with, and call the callbacks' `on_start`."""
        run = self.job.run
        devices = 1 if self.job.mesh is None else self.job.mesh.size
        chosen = self.job.its_kernels().describe(run.execution.compute_dtype, devices)
        for line in filter(None, [self.ready.source.summary, chosen, *sentences]):
            self.progress.say(line)
        for callback in self.callbacks:
            callback.on_start(run, self.files.folder, self.step)

    def steps(self) -> Iterator[Done]:
        """Train, and yield each step once it is complete.

        No other runs when one that is evaluated or saved is yielded.

        Nothing goes between the host and the devices but batches, each step's flag `finite`, and
        what is logged.
        """
        step_fn = _compiled_step(_of_any_seed(self.job))
        ahead = AHEAD.get(self.job.its_kernels().target.platform, AHEAD_ELSEWHERE)
        if self.ready.tasks is not None:
            ahead = 0  # the model answers once it has learnt from the batch before
        self.stopped = self._reached()  # an earlier call may have
        if self.step == self.job.run.steps:
            self.progress.say(f"finished at step {self.step}; nothing to do; more steps go on")
        elif not self.stopped:
            again = " …" if self.step == 0 else " (again) …"
            self.progress.say("compiling the training step" + again)

        # Whether a step may change the state; made of the state, to be on its devices as the steps'
        # own flags are.
        go = self.state.step >= 0
        started = deque[Done]()
        traced = self.options.profile if processes.is_first() else None
        with StepTrace(self.files.folder / TRACE_FOLDER, traced) as trace:
            for batch in self._batches_left():
                # Start a step. It runs while the next batch is read and copied.
                with trace.of_step(self.step), jax.transfer_guard("disallow"):
                    self.state, metrics = step_fn(self.state, batch, go)
                self.step += 1
                go = metrics["finite"]
                started.append(self._started(batch, metrics, ask_often=ahead == 0))

                # Wait for the steps before it, and for it too before it is evaluated or saved.
                running = 0 if started[-1].waits else ahead
                while len(started) > running:
                    yield from self._complete(started.popleft())
                trace.close_at(self.step)

            # The data has ended in an error: wait for what runs.
            while started:
                yield from self._complete(started.popleft())

        if self.error is not None and self.step and self.files.checkpoints.latest != self.step:
            self.save()

    def _batches_left(self) -> Iterator[dict[str, jax.Array]]:
        """Put one batch after another on the devices, until the last step or a wish to stop.

        It ends early if a batch cannot be read: `finish` raises why.
        """
        run = self.job.run
        while self.step < run.steps and not self.stopped:
            if isinstance(self.batches, Answers):
                self.batches.state = self.state
            try:
                with jax.transfer_guard("disallow"):
                    rows = model_inputs(next(self.batches))
                    batch = processes.put(rows, self.job.mesh, run.data.batch_size)
            except (ValueError, OSError) as error:
                if jax.process_count() > 1:
                    raise  # the others may have their batch, and do not save
                self.stopped = True
                self.error = error
                return

            # The rows of a step that is not taken go when the run resumes.
            if isinstance(self.batches, Answers):
                self.files.lock.check()
                self.files.answers.keep(self.step + 1, self.batches.shown)
            yield batch

    def _started(self, batch: dict, metrics: dict[str, Any], *, ask_often: bool) -> Done:
        """Decide what follows a step that was started."""
        run = self.job.run
        step = self.step
        last = step == run.steps
        logged = step % run.log_every == 0

        # Several processes wait for the step when they ask.
        self.stopped = self._reached()
        if ask_often or logged or jax.process_count() == 1:
            self.stopped |= processes.any_of(self.asked.is_set())
        self.stopped &= step % run.grpo.updates == 0  # no checkpoint holds a batch of answers

        logged |= last or self.stopped or step == 1
        evaluates = last or step % run.eval_every == 0
        saves = last or step % run.save_every == 0 or self.stopped
        ends_trace = self.options.profile is not None and step == self.options.profile[1]
        waits = evaluates or saves or ends_trace
        return Done(step, batch, metrics, logged, evaluates, saves, waits)

    def _reached(self) -> bool:
        """Whether the caller wants no step after this one."""
        after = self.options.stop_after
        return after is not None and self.step >= after

    def _complete(self, done: Done) -> Iterator[Done]:
        """Wait for a step, and yield it. Raises: NonFiniteLoss."""
        if not jax.device_get(done.metrics["finite"]):
            # The steps after it changed nothing: the state is still the one that it met.
            bad = first_bad_tensor(self.job, self.state, done.batch)
            raise self._not_good(
                f"step {done.step - 1} met a loss or gradient that is not finite; "
                f"first bad tensor: {bad}"
            )
        since = time.perf_counter()
        yield done
        if done.waits:
            self.speed.away += time.perf_counter() - since

    def _not_good(self, what: str) -> NonFiniteLoss:
        latest = self.files.checkpoints.latest
        last = "does not exist" if latest is None else f"is step {latest}"
        return NonFiniteLoss(
            f"{what}; the last good checkpoint {last} in {self.files.checkpoints.folder}"
        )

    def log(self, done: Done) -> None:
        """Write a step's row of metrics, and at some steps its load."""
        found = processes.fetch(done.metrics, self.job.mesh)
        row = as_row(done.step, found, self.job.run) | self.speed.since_last(done.step)
        row |= self.batches.metrics
        self._call("on_step", row)
        self.files.lock.check()
        self.files.metrics.write(row)
        if found["load"].size and done.step % load_every(self.job.run) == 0:
            self.files.loads.write(load_row(done.step, found))
        self.progress.update(done.step, row)

    def evaluate(self) -> None:
        """Measure the model on the held-out rows, and write the measures."""
        self.evaluation = found = self._measured()
        if not math.isfinite(found["val_loss"]):
            raise self._not_good(f"step {self.step} has a validation loss that is not finite")
        row = {"step": self.step} | {k: v for k, v in found.items() if k != "load"}
        self._call("on_evaluation", row)
        self.files.lock.check()
        self.files.metrics.write(row)
        self.progress.show_evaluation(self.step, row)

    def _measured(self) -> dict[str, Any]:
        model = model_of(self.job, self.state)
        source = self.ready.source
        found: dict[str, Any] = evaluate(
            model, self.held_out, self.ready.tokenizer,
            source.domains, self.job.mesh, source.training_bytes,
        )  # fmt: skip

        # A checker may fail here, too. Then the run is saved, as after the error of a callback.
        if isinstance(self.batches, Answers):
            self.batches.state = self.state
            try:
                found |= self.batches.measured()
            except ValueError as error:
                self.error = self.error or error
                self.asked.set()
            if sample := found.pop("sample", None):
                self.progress.show_sample(self.step, sample)
        return found

    def save(self) -> None:
        """Save the state and the data position; in the background unless the run ends here."""
        # A checkpoint resumes: none is made of numbers that no step can mend.
        moved = split_trainable(self.job.run, self.state.params)[0], self.state.bias, self.state.opt
        arrays = [x for x in jax.tree.leaves(moved) if x.ndim]  # optax begins at infinity
        if not jnp.isfinite(jax.jit(norm)(arrays)):
            bad = first_nonfinite("parameter", self.state.params)
            bad = bad or first_nonfinite("router bias", self.state.bias) or "an optimizer state"
            raise self._not_good(
                f"step {self.step} has {bad}, whose norm is not finite; a smaller rate may help"
            )

        self.files.lock.check()
        ends = self.stopped or self.step == self.job.run.steps
        checkpoints = self.files.checkpoints
        checkpoints.save(self.state, self.batches.get_state(), wait=ends)
        self._call("on_checkpoint", self.step, checkpoints.folder / str(self.step))

    def finish(self) -> FitResult:
        """Print and draw how the run ended. Raises: the first error of a callback or the source."""
        finished = self.step == self.job.run.steps
        order2 = None
        if finished:
            # it may have been finished before
            self.evaluation = self.evaluation or self._measured()
            order2 = self._show(self.evaluation)
        elif self.step:  # else an error came before the first step, and nothing is saved
            self.progress.say(
                f"stopped and saved at step {self.step}; the same command resumes from there"
            )

        result = FitResult(self.step, finished, self.resumed_from, self.evaluation, order2)
        if self.error is None:
            self._call("on_end", result)
        if self.error is not None:
            raise self.error
        return result

    def _show(self, evaluation: dict[str, Any]) -> float | None:
        """Draw and print the last evaluation. Returns: an order-2 model's bits, to compare with."""
        out = self.files.folder
        order2 = None
        pictures = []
        if self.options.report:
            order2 = order2_of(self.ready.source, self.ready.tokenizer, self.held_out)
        if self.options.report and processes.is_first():
            self.files.lock.check()
            rows = read_rows(out / METRICS_FILE)
            pictures = draw(out, evaluation, rows, self.job.run.model)
        self.progress.show_result(evaluation, order2, out, pictures)
        return order2

    def _call(self, name: str, *args: Any) -> None:
        """Call a method of all callbacks. If one raises, the run stops and calls it no more.

        Numbers that one returns join the row that it was given.
        """
        for callback in list(self.callbacks):
            try:
                found = getattr(callback, name)(*map(copy, args))
                if found is not None and isinstance(args[0], dict):
                    args[0].update(numbers_beside(args[0], found))
            except Exception as error:
                self.callbacks.remove(callback)
                self.error = self.error or error
                self.asked.set()


def _of_any_seed(job: Job) -> Job:
    """The job as its step depends on it: nothing is drawn, so runs of any seed share a step."""
    run = job.run
    return replace(job, run=replace(run, seed=0, data=replace(run.data, seed=0)))
