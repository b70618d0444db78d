"""The training loop: batches in, a run folder out. The same call again resumes where the run stopped.

A run folder holds run.json (the configuration), checkpoints/, metrics.jsonl (a line every `log_every` steps and one
each evaluation), load.jsonl (each expert's load and bias, at some of those steps), tensorboard/, and two pictures,
routing.png and training.png. A start takes these steps:

    0. several processes (see `cluster`) agree on one run; from here the first alone prints and writes
    1. the folder is claimed, or found to be this run's; another run's is refused (`prepare`). So is one that another
       process writes to (`lock`)
    2. the last whole checkpoint is restored, or that of a given step: parameters, optimizer, router bias, step and
       data position. Later checkpoints are renamed (`Checkpoints.rewind`)
    3. metrics and load after that step are dropped: they will be written again
    4. without a checkpoint, training begins at step 0 from the run's seed, from another run's weights if `start` names
       one, or on another's trunk if `trunk` does: then the multi-token heads alone are trained. With `lora`, the
       weights of `start` are frozen, and low-rank adapters are trained
"""

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dsv3_jax.cluster import processes
from dsv3_jax.config import ModelConfig, RunConfig, replace
from dsv3_jax.data import batches as data
from dsv3_jax.data.ngram import Order2
from dsv3_jax.data.source import Documents, Source, training_bytes
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.lock import FolderLock, acquire
from dsv3_jax.mesh import sharding
from dsv3_jax.ops.routing import ROUTERS
from dsv3_jax.report.metrics import LOAD_FILE, Metrics, Rows
from dsv3_jax.report.progress import Progress
from dsv3_jax.report.run_plots import routing_heatmap, training_curves
from dsv3_jax.signals import STOP, handled
from dsv3_jax.training import rows, warm_start
from dsv3_jax.training.callbacks import Callback, Callbacks
from dsv3_jax.training.checkpoint import Checkpoints, SaveFailed
from dsv3_jax.training.evaluate import evaluate
from dsv3_jax.training.feed import Feed
from dsv3_jax.training.finite import first_nonfinite
from dsv3_jax.training.prepare import chosen, describe, flops_per_token, prepare
from dsv3_jax.training.profile import Profile
from dsv3_jax.training.run_folder import claim
from dsv3_jax.training.step import Batch, first_bad_tensor, make_step, model_of

# Steps started before the oldest one is looked at. Above 0, the next batch is put on the devices while a step runs. A
# CPU's cores have no time for the host meanwhile.
AHEAD = {"cpu": 0}
AHEAD_ELSEWHERE = 2
_compiled_step = lru_cache(maxsize=16)(make_step)  # a run resumed in one process compiles once


def _of_any_seed(run: RunConfig) -> RunConfig:
    """The run as its step depends on it: runs that differ in their seeds alone share a step, if nothing is drawn."""
    return run if ROUTERS[run.model.router].has_noise else replace(run, seed=0, data=replace(run.data, seed=0))


class NonFiniteLoss(ValueError):
    """Training met a loss or gradient that is not finite; the message names the step and the first bad tensor."""


@dataclass(frozen=True)
class FitResult:
    """How a call of `fit` ended."""

    step: int
    finished: bool  # False: stopped before the last step, by a signal or `stop_after`
    resumed_from: int | None
    evaluation: dict | None  # of the last step, see `evaluate`
    order2_bits_per_byte: float | None  # of an order-2 byte model on the same validation text


def fit(
    run: RunConfig,
    out: str | Path,
    *,
    mesh: Mesh | None = None,
    step: int | None = None,
    stop_after: int | None = None,
    quiet: bool = False,
    report: bool = True,
    profile: tuple[int, int] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    source: Source | None = None,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train a run in folder `out`; the same call again resumes it.

    Args:
        run: what to train. Its execution may change from call to call.
        out: the run's folder, made if absent.
        mesh: devices to shard the run over, from `sharding.make_mesh`. None means a single device. The same run may
            resume on another mesh. If it has several processes, all make this call, with one shared `out`.
        step: resume from the checkpoint of this step, and rename later ones. None means the newest that is whole.
        stop_after: save and return once this step is reached, as after SIGTERM.
        quiet: print nothing.
        report: False leaves out what only readers need: the estimate of the time and MFU, for which a matrix product is
            timed, the order-2 model and the pictures. Thus short runs end some seconds earlier.
        profile: (START, STOP): write a trace of these steps into `profile/` of the folder.
        optimizer: any optax transformation, in place of the run's own optimizer. It must not count on more than
            (gradients, state, parameters), and sees nested dicts of arrays, the parameters that train. Learning rate,
            schedule and weight decay are its own. The run's `clip_norm` clips the gradients that it gets, and a step
            that is not finite does not change its state. Its checkpoints resume with a transformation whose state has
            the same types and shapes. The caller keeps the learning rate and other numbers.
        source: data to train and to measure on, in place of the text that `run.data` names. A resumed run needs it
            again. Its token ids must be ids of `run.data.tokenizer`. None means the text.
        callbacks: called at the start and the end and for each row of metrics and checkpoint, see `Callback`. If one
            raises, the run is saved and the error is raised.
    Raises:
        ValueError: another run's folder, unreadable data, a tokenizer larger than the vocabulary, a start or trunk of
            another model, or a loss that is not finite (NonFiniteLoss); the last good checkpoint stays. ConfigError:
            batch or experts that cannot be sharded over the mesh, kernels that the devices do not have, or processes
            that disagree on what to train.
        FolderInUse (a ValueError): another process trains in the folder.
        DamagedCheckpoint (a ValueError): the checkpoint of `step`, or every one, is damaged.
        OSError: no room for a checkpoint, or it cannot be written; the ones before stay. Or the folder was moved or
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
    ...     data = ds.replace(run.data, paths=(str(text),), seq_len=32, batch_size=2, val_fraction=0.3)
    ...     run = ds.replace(run, model=model, data=data, steps=2, eval_batches=1)
    ...     ds.train.fit(run, pathlib.Path(name, "run"), quiet=True).step
    2
    """
    out, hooks = Path(out), Callbacks(callbacks)
    ready = prepare(run, out, mesh, step, stop_after, optimizer, source, time_device=report)
    run, batches, held_out = ready.run, ready.batches, ready.held_out
    mix = training_bytes(ready.source)
    with (
        Progress(run.steps, quiet=quiet or not processes.is_first()) as progress,
        _only_writer(out, run) as lock,
        Checkpoints(out, run, optimizer=optimizer) as checkpoints,
        _asked_to_stop() as asked,
        sharding.use_mesh(mesh),
        Profile(profile if processes.is_first() else None, out) as trace,
    ):
        sentences = [lock.sentence, *checkpoints.rewind(step)]
        found = checkpoints.restore(mesh)
        resumed_from = None
        if found is None:
            state, sentence = warm_start.begin(run, ready.tokenizer, mesh, optimizer=optimizer)
        else:
            state, position = found
            batches.set_state(position)
            resumed_from = int(state.step)
            sentence = f"resumed from the checkpoint of step {resumed_from} in {checkpoints.folder}"
        step, evaluation = int(state.step), None
        after, read_only = resumed_from or 0, not processes.is_first()
        metrics = Metrics(out, after, read_only=read_only)
        loads = Rows(out / LOAD_FILE, after, read_only=read_only)
        for line in (*describe(ready, step, mesh), *sentences, metrics.sentence, loads.sentence, sentence):
            if line:
                progress.say(line)
        step_fn = _compiled_step(_of_any_seed(run), ready.kernels, ready.options, optimizer=optimizer)
        speed, first_row = _Speed(run, ready.peak), {"kernels": chosen(ready.kernels, run, mesh)}
        feed = Feed(batches, lambda b: processes.put(data.model_inputs(b), mesh, run.data.batch_size, ready.rows))
        started, ahead = deque[_Started](), AHEAD.get(ready.kernels.target.platform, AHEAD_ELSEWHERE)
        alone = jax.process_count() == 1
        # Whether a step may change the state; made of the state, to be on its devices as the steps' own flags are.
        go = (state.step >= 0,) if ahead else ()

        def not_good(what: str) -> NonFiniteLoss:
            last = f"is step {checkpoints.latest}" if checkpoints.latest is not None else "does not exist"
            return NonFiniteLoss(f"{what}; the last good checkpoint {last} in {checkpoints.folder}")

        def settle() -> None:
            """Wait for the oldest step that was started, check it and write its row."""
            done = started.popleft()
            if not jax.device_get(done.metrics["finite"]):
                # The steps after it changed nothing: the state is still the one that it met.
                bad = first_bad_tensor(run, state, done.batch)
                met = f"step {done.step - 1} met a loss or gradient that is not finite"
                raise not_good(f"{met}; first bad tensor: {bad}")
            if done.logged:
                fetched = processes.fetch(done.metrics, mesh)
                row = rows.as_row(done.step, fetched, run) | speed.since_last(done.step) | first_row
                lock.check()
                checkpoints.check_save()
                metrics.write(row)
                first_row.clear()  # in the first row of each start
                if fetched["load"].size and done.step % rows.load_every(run) == 0:
                    loads.write(rows.load_row(done.step, fetched))
                progress.update(done.step, row)
                hooks.step(row)

        hooks.start(run, out, step, stop=asked.set)
        if step < run.steps:
            progress.say("compiling the training step" + (" …" if step == 0 else " (again) …"))
        while step < run.steps:
            if trace.ends_at(step):
                while started:
                    settle()
            if trace.reach(step):
                progress.say(f"traced steps {trace.first} to {step - 1}: tensorboard --logdir {trace.folder}")
            arrays = feed.take()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, step_metrics = step_fn(state, arrays, *go)
            go = (step_metrics["finite"],) if ahead else ()
            step += 1
            stopping = step == stop_after
            if ahead == 0 or alone or step % run.log_every == 0:  # several processes wait for the step when they ask
                stopping |= processes.any_of(asked.is_set())
            last = step == run.steps
            logged = step % run.log_every == 0 or last or stopping or step == 1
            if logged:
                step_metrics |= rows.measure(step_metrics["load"]) | rows.biases(run, state.bias)
            started.append(_Started(step, arrays, step_metrics, logged))
            complete = last or stopping or step % run.eval_every == 0 or step % run.save_every == 0
            if ahead and not complete:
                feed.look_ahead()
            while len(started) > (0 if complete else ahead):
                settle()
            if step % run.eval_every == 0 or last:
                with speed.paused():
                    model = model_of(run, state, ready.kernels)
                    evaluation = evaluate(model, held_out, ready.tokenizer, ready.source.domains, mesh, mix)
                    if not math.isfinite(float(np.asarray(evaluation["val_loss"]))):
                        raise not_good(f"step {step} has a validation loss that is not finite")
                    row = {"step": step} | {k: v for k, v in evaluation.items() if k != "load"}
                    lock.check()
                    metrics.write(row)
                    progress.show_evaluation(step, row)
                    hooks.evaluation(row)
            if step % run.save_every == 0 or last or stopping:
                with speed.paused():
                    if bad := first_nonfinite(state, mesh):
                        raise not_good(
                            f"step {step} made {bad}, whose norm is not finite; a smaller learning rate may help"
                        )
                    lock.check()
                    checkpoints.save(state, feed.position(), wait=last or stopping)
                    hooks.checkpoint(step, checkpoints.folder / str(step))
            if stopping and not last:
                progress.say(f"stopped and saved at step {step}; the same command resumes from there")
                result = FitResult(step, False, resumed_from, evaluation, None)
                hooks.end(result)
                return result
        if evaluation is None:  # the run was finished before this call
            model = model_of(run, state, ready.kernels)
            evaluation = evaluate(model, held_out, ready.tokenizer, ready.source.domains, mesh, mix)
        order2 = _order2(ready.source, ready.tokenizer, held_out) if report else None
        pictures = []
        if report and processes.is_first():
            lock.check()
            pictures = _draw(out, evaluation, metrics, run.model)
        progress.show_result(evaluation, order2, out, pictures)
        result = FitResult(step, True, resumed_from, evaluation, order2)
        hooks.end(result)
        return result


@contextmanager
def _only_writer(out: Path, run: RunConfig) -> Iterator[FolderLock]:
    """Lock the run folder: process 0 holds the lock, and the others get one that is always in order."""
    with ExitStack() as stack:
        held = [FolderLock()]

        def lock() -> None:
            held[0] = stack.enter_context(acquire(out))
            claim(out, run)  # again: two processes may have claimed a new folder at the same time

        processes.by_first(lock)
        try:
            yield held[0]
        except SaveFailed:
            held[0].check()  # says more, if the folder is gone
            raise


class _Started(NamedTuple):
    """A step that was started, and may still run."""

    step: int  # steps taken with it
    batch: Batch
    metrics: dict
    logged: bool


class _Speed:
    """Tokens a second and MFU between two reports, without evaluation and saving. Without a peak there is no MFU."""

    def __init__(self, run: RunConfig, peak: float | None):
        self._tokens = run.data.batch_size * run.data.seq_len
        self._flops, self._peak = flops_per_token(run), peak
        self._since, self._pause = time.perf_counter(), 0.0
        self._step: int | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._pause += time.perf_counter() - start

    def since_last(self, step: int) -> dict:
        now = time.perf_counter()
        taken, before = now - self._since - self._pause, self._step
        self._since, self._pause, self._step = now, 0.0, step
        if before is None:  # the first report holds the compilation
            return {}
        rate = (step - before) * self._tokens / max(taken, 1e-9)
        mfu = {"mfu": rate * self._flops / self._peak} if self._peak else {}
        return {"tokens_per_s": rate} | mfu


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets; a second SIGINT interrupts at once."""
    asked = threading.Event()

    def note(number, frame):
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    with handled(note, *STOP):
        yield asked


def _order2(source: Source, tokenizer: Tokenizer, held_out: list[data.Batch]) -> float | None:
    """Bits a byte of an order-2 byte model, fitted on the training text, on the same validation rows.

    None for chat examples, which it would have to answer without a context.
    """
    if not isinstance(source, Documents):
        return None
    rows = [
        tokenizer.bytes_of(row[real].tolist())
        for batch in held_out
        for row, real in zip(batch["tokens"], batch["segment_ids"] > 0, strict=True)
    ]
    bits, size = Order2(d.text.encode() for d in source.corpus.train).bits(rows)
    return bits / max(size, 1)


def _draw(out: Path, evaluation: dict, metrics: Metrics, cfg: ModelConfig) -> list[Path]:
    """Draw the routing, if there is any, and the curves of training. Returns the pictures."""
    load, routing, training = np.asarray(evaluation["load"]), out / "routing.png", out / "training.png"
    training_curves(metrics.rows(), training)
    if not load.size:
        return [training]
    routing_heatmap(load, routing, first_layer=cfg.num_dense_layers, mtp_blocks=cfg.num_sparse_heads)
    return [routing, training]
