"""The training loop: batches in, a run folder out. The same call resumes where the run stopped.

A run folder holds run.json (the configuration), checkpoints/, metrics.jsonl (a line every
`log_every` steps and one each evaluation), load.jsonl (each expert's load and bias, at some of
those steps), tensorboard/, and two pictures, routing.png and training.png. A start takes these
steps:

    0. several processes (see `mesh.processes`) agree on one run, and its text is read
       (`prepare`); from here the first alone prints and writes
    1. the folder is locked and claimed, or found to be this run's; another run's is refused, and
       one that another process writes to (`lock`)
    2. the last whole checkpoint is restored, or that of a given step: parameters, optimizer, router
       bias, step and data position. Later checkpoints are renamed (`Checkpoints.rewind`)
    3. metrics and load after that step are dropped: they will be written again
    4. without a checkpoint, training begins at step 0 from the run's seed, from another run's
       weights if `start` names one, or on another's trunk if `trunk` does: then the multi-token
       heads alone are trained. With `lora`, the weights of `start` are frozen, and low-rank
       adapters are trained
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import InitVar, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import RunConfig, check_kind
from dsv3_jax.data.batches import Source, model_inputs
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.hf.places import find
from dsv3_jax.host.lock import FolderLock, acquire
from dsv3_jax.host.signals import asked_to_stop
from dsv3_jax.mesh import processes, sharding
from dsv3_jax.report.metrics import (
    LOAD_FILE,
    METRICS_FILE,
    Metrics,
    Rows,
    load_every,
    load_row,
    read_rows,
)
from dsv3_jax.report.progress import Progress
from dsv3_jax.report.run_result import draw, order2_of
from dsv3_jax.report.speed import Speed
from dsv3_jax.runs.chats import chats_of, for_epochs
from dsv3_jax.runs.checkpoint import Checkpoints
from dsv3_jax.runs.convert import keep_origin
from dsv3_jax.runs.evaluate import evaluate
from dsv3_jax.runs.folder import check_place, claim, made_from
from dsv3_jax.runs.prepare import Callback, Options, agree, check, kernels_of, read
from dsv3_jax.runs.start import Start, begin, open_start
from dsv3_jax.training.metrics import as_row
from dsv3_jax.training.step import (
    Batch,
    Job,
    first_bad_tensor,
    first_nonfinite,
    make_step,
    model_of,
    split_trainable,
)

__all__ = ["Callback", "FitResult", "NonFiniteLoss", "fit", "for_epochs", "open_start"]

# Steps started before the oldest one is looked at. If above 0, the next batch is copied while a
# step runs. On a CPU the step needs all cores.
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


class Done(NamedTuple):
    """A step that was started, and what follows once it is complete."""

    step: int  # steps taken with it
    batch: Batch
    metrics: dict[str, Any]  # on the devices
    logged: bool
    evaluate: bool
    save: bool


def fit(run: RunConfig, out: str | Path, **options: Any) -> FitResult:
    """Train a run in folder `out`; the same call again resumes it.

    Args:
        run: what to train. Its execution may change from call to call.
        out: the run's folder, made if absent.
        mesh: devices to shard the run over, from `sharding.make_mesh`. None means a single device.
            The same run may resume on another mesh. If it has several processes, all make this
            call, with one shared `out`.
        step: resume from the checkpoint of this step, and rename later ones. None means the newest
            that is whole.
        stop_after: save and return once this step is reached, as after SIGTERM.
        quiet: True prints nothing.
        report: False leaves out what only readers need: MFU, for which a matrix product is timed,
            the order-2 model and the pictures. Thus short runs end some seconds earlier.
        profile: (START, STOP): write a trace of these steps into `profile/` of the folder, which
            TensorBoard (XProf) and Perfetto open. The parts of a step have names: MLA or GQA,
            router, experts, heads, loss, optimizer.
        optimizer: any optax transformation, in place of the run's own optimizer. It must not count
            on more than (gradients, state, parameters), and sees nested dicts of arrays, the
            parameters that train. Learning rate, schedule and weight decay are its own. The run's
            `clip_norm` clips the gradients that it gets, and a step that is not finite does not
            change its state. Its checkpoints resume with a transformation whose state has the same
            types and shapes. The caller keeps the learning rate and other numbers.
        source: data to train and to measure on, in place of the text that `run.data` names. A
            resumed run needs it again. Its token ids must be ids of `run.data.tokenizer`. None
            means the text.
        callbacks: called at the start and the end and for each row of metrics and checkpoint, see
            `Callback`. If one raises, the run is saved and the error is raised.
    Raises:
        ValueError: another run's folder, unreadable data, a tokenizer larger than the vocabulary, a
            start or trunk of another model, or a loss that is not finite (NonFiniteLoss); the last
            good checkpoint stays. ConfigError: batch or experts that cannot be sharded over the
            mesh, kernels that the devices do not have, or processes that disagree on what to train.
        FolderInUse (a ValueError): another process trains in the folder.
        DamagedCheckpoint (a ValueError): the checkpoint of `step`, or every one, is damaged.
        OSError: a checkpoint cannot be written; the ones before stay. Or the folder was moved or
            deleted.

    >>> import pathlib, tempfile
    >>> import dsv3_jax as ds
    >>> with tempfile.TemporaryDirectory() as name:
    ...     text = pathlib.Path(name, "text")
    ...     text.mkdir()
    ...     for i in range(20):
    ...         _ = (text / f"{i}.txt").write_text(f"document {i} is short. " * 9)
    ...     run = ds.recipe("tiny")
    ...     model = ds.replace(run.model, num_layers=1, mtp_depth=0)
    ...     sizes = dict(seq_len=32, batch_size=2, val_fraction=0.3)
    ...     data = ds.replace(run.data, paths=(str(text),), **sizes)
    ...     run = ds.replace(run, model=model, data=data, steps=2, eval_batches=1)
    ...     ds.train.fit(run, pathlib.Path(name, "run"), quiet=True).step
    2
    """
    check_kind("run", run, RunConfig)
    if run.data.format == "chat" and options.get("source") is None:
        chats = chats_of(run, out)
        options |= chats | {"callbacks": [*chats["callbacks"], *options.get("callbacks", ())]}
    options["callbacks"] = [KeepOrigin(), *options.get("callbacks", ())]
    with open_run(run, Path(out), Options(**options)) as training:
        for done in training.steps():
            if done.logged:
                training.log(done)
            if done.evaluate:
                training.evaluate()
            if done.save:
                training.save()
        return training.finish()


class KeepOrigin(Callback):
    """Keeps what `dsv3 convert` needs of the released folder that a run's start or trunk is of."""

    def on_start(self, run: RunConfig, out: Path, step: int) -> None:
        place = run.start or run.trunk
        if place is not None and step == 0:  # later the other run may be gone
            keep_origin(find(place), out)


@contextmanager
def open_run(run: RunConfig, out: Path, options: Options) -> Iterator["Training"]:
    """Prepare a run, lock its folder, and restore its last checkpoint or make a new state."""
    processes.by_first(lambda: check_place(out))
    job = agree(run, options)
    check(job)
    words, source, start = read(job, out, options)
    with (
        Progress(run.steps, quiet=options.quiet or not processes.is_first()) as progress,
        _only_writer(
            job, out, made_from(source.fingerprint, words.fingerprint, source.checker)
        ) as lock,
        Checkpoints(out, job.run, optimizer=options.optimizer) as checkpoints,
        asked_to_stop() as asked,
        sharding.use_mesh(options.mesh),
    ):
        yield Training(job, options, out, words, source, lock, checkpoints, progress, asked, start)


@dataclass
class Training:
    """An open run: its state, its batches, and the files that it writes."""

    job: Job
    options: Options
    out: Path
    tokenizer: Tokenizer
    source: Source
    lock: FolderLock
    checkpoints: Checkpoints
    progress: Progress
    asked: threading.Event  # to stop
    start: InitVar[Start | None]

    def __post_init__(self, start: Start | None) -> None:
        run = self.job.run
        mesh = self.job.mesh
        kernels = self.job.chosen()
        # None means all
        rows = None if mesh is None else processes.rows_held(mesh, run.data.batch_size)
        self.batches = self.source.train_batches(rows)
        if self.source.sampled is not None:
            self.batches = self.source.sampled(lambda: (self.job, self.state))
        self.held_out = self.source.val_batches(run.eval_batches)
        # A machine's CPU devices share its cores, others add up.
        devices = (
            jax.process_count() if mesh is None or kernels.target.platform == "cpu" else mesh.size
        )
        self.speed = Speed(run, devices if self.options.report else 0)
        self.stopped = False
        self.evaluation: dict[str, Any] | None = None
        self.error: Exception | None = None  # the first of a callback, or of the source
        sentences = [self.lock.sentence, *self.checkpoints.rewind(self.options.step)]
        found = self.checkpoints.restore(self.job.mesh)
        if found is None:
            self.state, sentence = begin(self.job, start)
        else:
            self.state, position = found
            try:
                self.batches.set_state(position)
            except ValueError as error:
                raise ValueError(
                    f"step={int(self.state.step)} in {self.checkpoints.folder}: {error}"
                ) from error
            checkpoint = f"the checkpoint of step {int(self.state.step)}"
            sentence = f"resumed from {checkpoint} in {self.checkpoints.folder}"
        self.step = int(self.state.step)
        self.resumed_from = None if found is None else self.step
        first = processes.is_first()
        self.metrics = Metrics(self.out, self.step, read_only=not first)
        self.loads = Rows(self.out / LOAD_FILE, self.step, read_only=not first)
        sentences += [self.metrics.sentence, self.loads.sentence, sentence]
        chosen = kernels.describe(run.execution.compute_dtype, 1 if mesh is None else mesh.size)
        for line in filter(None, [self.source.summary, chosen, *sentences]):
            self.progress.say(line)
        self.callbacks = list(self.options.callbacks) if first else []
        for callback in self.callbacks:
            callback.on_start(run, self.out, self.step)

    def steps(self) -> Iterator[Done]:
        """Train, and yield each step once it is complete.

        No other runs when one that is evaluated or saved is yielded.

        Nothing goes between the host and the devices but batches, each step's flag `finite`, and
        what is logged.
        """
        steps, (first, end) = self.job.run.steps, self.options.profile or (0, 0)
        step_fn = _compiled_step(_of_any_seed(self.job))
        ahead = AHEAD.get(self.job.chosen().target.platform, AHEAD_ELSEWHERE)
        # the model samples once it has learnt from the batch before
        ahead = 0 if self.source.sampled else ahead
        # Whether a step may change the state; made of the state, to be on its devices as the steps'
        # own flags are.
        go = self.state.step >= 0
        started = deque[Done]()
        batch = None
        traces = processes.is_first()
        if self.step < steps:
            self.progress.say(
                "compiling the training step" + (" …" if self.step == 0 else " (again) …")
            )
        with ExitStack() as trace:
            while self.step < steps and not self.stopped:
                if traces and first <= self.step < end:  # also if the run resumes between the two
                    trace.enter_context(
                        jax.profiler.trace(self.out / TRACE_FOLDER, create_perfetto_trace=True)
                    )
                    traces = False
                with jax.transfer_guard("disallow"):
                    arrays = self._next_batch() if batch is None else batch
                    if arrays is None:
                        break
                    with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
                        self.state, metrics = step_fn(self.state, arrays, go)
                    self.step += 1
                    go = metrics["finite"]
                    started.append(self._started(arrays, metrics, ask_often=not ahead))
                    waits = started[-1].evaluate or started[-1].save or self.step == end
                    batch = self._next_batch() if ahead and not waits else None
                while len(started) > (0 if waits or self.stopped else ahead):
                    settled = self._settled(started.popleft())
                    since = time.perf_counter()
                    yield settled
                    if waits:
                        self.speed.away += time.perf_counter() - since
                if self.step == end:
                    trace.close()
        if self.error is not None and self.step and self.checkpoints.latest != self.step:
            self.save()

    def _next_batch(self) -> Batch | None:
        """Put the next batch on the devices. None if that fails: `finish` raises why."""
        try:
            batch = next(self.batches)
        except (ValueError, OSError) as error:
            if jax.process_count() > 1:
                raise  # the others may have their batch, and do not save
            self.stopped = True
            self.error = error
            return None
        return processes.put(model_inputs(batch), self.job.mesh, self.job.run.data.batch_size)

    def _started(self, batch: Batch, metrics: dict[str, Any], *, ask_often: bool) -> Done:
        """Decide what follows a step that was started."""
        run = self.job.run
        step = self.step
        self.stopped = step == self.options.stop_after
        logged = step % run.log_every == 0
        # several processes wait for the step when they ask
        if ask_often or logged or jax.process_count() == 1:
            self.stopped |= processes.any_of(self.asked.is_set())
        last = step == run.steps
        logged |= last or self.stopped or step == 1
        saves = step % run.save_every == 0 or last or self.stopped
        return Done(step, batch, metrics, logged, step % run.eval_every == 0 or last, saves)

    def _settled(self, done: Done) -> Done:
        """Wait for a step. Raises: NonFiniteLoss."""
        if not jax.device_get(done.metrics["finite"]):
            # The steps after it changed nothing: the state is still the one that it met.
            bad = first_bad_tensor(self.job, self.state, done.batch)
            raise self._not_good(
                f"step {done.step - 1} met a loss or gradient that is not finite; "
                f"first bad tensor: {bad}"
            )
        return done

    def _not_good(self, what: str) -> NonFiniteLoss:
        latest = self.checkpoints.latest
        last = "does not exist" if latest is None else f"is step {latest}"
        return NonFiniteLoss(
            f"{what}; the last good checkpoint {last} in {self.checkpoints.folder}"
        )

    def log(self, done: Done) -> None:
        """Write a step's row of metrics, and at some steps its load."""
        found = processes.fetch(done.metrics, self.job.mesh)
        row = as_row(done.step, found, self.job.run) | self.speed.since_last(done.step)
        if self.source.sampled is not None:
            row |= self.batches.metrics
        self.lock.check()
        self.metrics.write(row)
        if found["load"].size and done.step % load_every(self.job.run) == 0:
            self.loads.write(load_row(done.step, found))
        self.progress.update(done.step, row)
        self._call("on_step", row)

    def evaluate(self) -> None:
        """Measure the model on the held-out rows, and write the measures."""
        self.evaluation = found = self._measured()
        if not math.isfinite(found["val_loss"]):
            raise self._not_good(f"step {self.step} has a validation loss that is not finite")
        row = {"step": self.step} | {k: v for k, v in found.items() if k != "load"}
        self.lock.check()
        self.metrics.write(row)
        self.progress.show_evaluation(self.step, row)
        self._call("on_evaluation", row)

    def _measured(self) -> dict[str, Any]:
        model = model_of(self.job, self.state)
        about = (self.source.domains, self.job.mesh, self.source.training_bytes)
        return evaluate(model, self.held_out, self.tokenizer, *about)

    def save(self) -> None:
        """Save the state and the data position; in the background unless the run ends here."""
        moved = split_trainable(self.job.run, self.state.params)[0], self.state.bias, self.state.opt
        arrays = [x for x in jax.tree.leaves(moved) if x.ndim]  # optax begins at infinity
        if not jnp.isfinite(jax.jit(optax.tree.norm)(arrays)):
            bad = first_nonfinite("parameter", self.state.params)
            bad = bad or first_nonfinite("router bias", self.state.bias) or "an optimizer state"
            raise self._not_good(
                f"step {self.step} has {bad}, whose norm is not finite; a smaller rate may help"
            )
        self.lock.check()
        ends = self.stopped or self.step == self.job.run.steps
        self.checkpoints.save(self.state, self.batches.get_state(), wait=ends)
        self._call("on_checkpoint", self.step, self.checkpoints.folder / str(self.step))

    def finish(self) -> FitResult:
        """Print and draw how the run ended. Raises: the first error of a callback or the source."""
        finished = self.step == self.job.run.steps
        order2 = None
        pictures = []
        if finished:
            # it may have been finished before
            evaluation = self.evaluation = self.evaluation or self._measured()
            if self.options.report:
                order2 = order2_of(self.source, self.tokenizer, self.held_out)
            if self.options.report and processes.is_first():
                self.lock.check()
                pictures = draw(
                    self.out, evaluation, read_rows(self.out / METRICS_FILE), self.job.run.model
                )
            self.progress.show_result(evaluation, order2, self.out, pictures)
        else:
            self.progress.say(
                f"stopped and saved at step {self.step}; the same command resumes from there"
            )
        result = FitResult(self.step, finished, self.resumed_from, self.evaluation, order2)
        if self.error is None:
            self._call("on_end", result)
        if self.error is not None:
            raise self.error
        return result

    def _call(self, name: str, *args: Any) -> None:
        """Call a method of all callbacks. If one raises, the run stops and calls it no more."""
        for callback in list(self.callbacks):
            try:
                getattr(callback, name)(*map(copy, args))
            except Exception as error:
                self.callbacks.remove(callback)
                self.error = self.error or error
                self.asked.set()


def _of_any_seed(job: Job) -> Job:
    """The job as its step depends on it: nothing is drawn, so runs of any seed share a step."""
    run = job.run
    return replace(job, run=replace(run, seed=0, data=replace(run.data, seed=0)))


@contextmanager
def _only_writer(job: Job, out: Path, made: dict[str, Any]) -> Iterator[FolderLock]:
    """Lock and claim the run folder: process 0 has the lock, others one always in order."""
    locks = [FolderLock()]

    def lock() -> None:
        out.mkdir(parents=True, exist_ok=True)
        locks.append(stack.enter_context(acquire(out)))
        claim(out, job.run, kernels_of(job), made)

    with ExitStack() as stack:
        processes.by_first(lock)
        yield locks[-1]
