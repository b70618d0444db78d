"""The training loop: batches in, a run folder out. The same call again goes on where the run stopped.

A run folder holds run.json (the configuration), checkpoints/, metrics.jsonl (a line every `log_every` steps and one
each evaluation), load.jsonl (each expert's load, at steps of the former), tensorboard/, and two pictures, routing.png
and training.png. What happens on a start:

    0. several processes (see `cluster`) agree that they mean one run; from here the first alone prints and writes
    1. the folder is claimed, or found to be this very run's; another run's is refused
    2. the last whole checkpoint is restored: parameters, optimizer, router bias, step and place in the data
    3. metrics and load after that step are dropped, for they are about to be made again
    4. without a checkpoint, training begins at step 0 from the run's seed, with another run's weights where `start`
       names one, on another's trunk where `trunk` does: its multi-token heads then train alone
"""

import importlib.metadata
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.cluster import processes
from dsv3_jax.config import ModelConfig, RunConfig, to_dict
from dsv3_jax.data import batches as data
from dsv3_jax.data import tokenizer
from dsv3_jax.data.ngram import Order2
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.token_exchange import wire_bytes
from dsv3_jax.model.counting import train_flops_per_token
from dsv3_jax.ops import balance
from dsv3_jax.report.metrics import LOAD_FILE, Metrics, Rows
from dsv3_jax.report.progress import Progress
from dsv3_jax.report.run_plots import routing_heatmap, training_curves
from dsv3_jax.report.speed import gemm_flops
from dsv3_jax.training import frozen, warm_start
from dsv3_jax.training.checkpoint import RUN_FILE, Checkpoints, claim
from dsv3_jax.training.evaluate import evaluate
from dsv3_jax.training.step import TrainState, first_bad_tensor, init_state, make_step, model_of

_compiled_step = lru_cache(maxsize=4)(make_step)  # a run resumed in one process compiles once


class NonFiniteLoss(ValueError):
    """Training met a loss or gradient that is not finite; the message names the step and the first bad tensor."""


@dataclass(frozen=True)
class Fitted:
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
    stop_after: int | None = None,
    quiet: bool = False,
) -> Fitted:
    """Train a run in folder `out`, from wherever it stands.

    Args:
        run: what to train.
        out: the run's folder, made if absent.
        mesh: devices to spread the run over, from `sharding.make_mesh`; None is a single one. The same run may go on
            with another mesh. It may be of several processes, which then all make this call, with one shared `out`.
        stop_after: save and return once this step is reached, as SIGTERM would have it.
        quiet: print nothing.
    Raises:
        ValueError: another run's folder, unreadable data, a tokenizer larger than the vocabulary, a start or trunk of
            another model, or a loss that is not finite (NonFiniteLoss); the last good checkpoint stays. ConfigError:
            batch or experts that cannot be cut over the mesh, or processes that disagree on what to train.
        OSError: no room for a checkpoint; the ones before stay.
    """
    _agree(run, mesh, stop_after)  # first: what is checked from here on then comes out alike in all processes
    if mesh is not None:
        sharding.check(mesh, run)
        processes.check_layout(run.model.layout)
    out = Path(out)
    spec = warm_start.tokenizer_of(run, out)
    words = processes.by_each(lambda: tokenizer.load(spec))
    if not (out / RUN_FILE).exists():  # before anything is written
        _check_beginning(run, words)
    corpus = processes.by_each(lambda: _read(run, words))
    processes.agree({"text": corpus.fingerprint})
    rows = None if mesh is None else processes.rows_held(mesh, run.data.batch_size)
    batches = data.train_batches(corpus, words, run.data, rows)
    held_out = data.val_batches(corpus, words, run.data, run.eval_batches)
    processes.by_first(lambda: claim(out, run))
    if spec != run.data.tokenizer:
        processes.by_first(lambda: warm_start.copy_tokenizer(spec, run))
    peak = _peak(run, mesh)
    with (
        Progress(run.steps, quiet=quiet or not processes.is_first()) as progress,
        Checkpoints(out, run) as checkpoints,
        _asked_to_stop() as asked,
        sharding.in_force(mesh),
    ):
        progress.say(_describe(corpus))
        found = checkpoints.restore(mesh)
        resumed_from = None
        if found is None:
            state = _begin(run, words, mesh, progress)
        else:
            state, place = found
            batches.set_state(place)
            resumed_from = int(state.step)
            progress.say(f"resumed from the checkpoint of step {resumed_from} in {checkpoints.folder}")
        after, read_only = resumed_from or 0, not processes.is_first()
        metrics = Metrics(out, after, read_only=read_only)
        loads = Rows(out / LOAD_FILE, after, read_only=read_only)
        step_fn = _compiled_step(run)
        speed = _Speed(run, peak)
        step, evaluation = int(state.step), None
        if step < run.steps:
            progress.say("compiling the training step" + (" …" if step == 0 else " (again) …"))
        while step < run.steps:
            batch = next(batches)
            arrays = {k: batch[k] for k in ("tokens", "segment_ids", "positions")}
            arrays = processes.put(arrays, mesh, run.data.batch_size, rows)
            state, found_metrics = step_fn(state, arrays)
            if not bool(found_metrics["finite"]):
                bad = first_bad_tensor(run, state, arrays)
                raise NonFiniteLoss(
                    f"step {step} met a loss or gradient that is not finite; first bad tensor: {bad}; the last good "
                    f"checkpoint is step {checkpoints.latest} in {checkpoints.folder}"
                )
            step += 1
            stopping = processes.any_of(asked.is_set()) or step == stop_after
            last = step == run.steps
            if step % run.log_every == 0 or last or stopping or step == 1:
                fetched = processes.fetch(found_metrics, mesh)
                row = _row(step, fetched, run.model) | speed.since_last(step)
                metrics.write(row)
                if fetched["load"].size and step % _load_every(run) == 0:
                    loads.write({"step": step, "load": np.asarray(fetched["load"]).astype(int).tolist()})
                progress.update(step, row)
            if step % run.eval_every == 0 or last:
                with speed.paused():
                    evaluation = evaluate(model_of(run.model, state), held_out, words, corpus.domains, mesh)
                    row = {"step": step} | {k: v for k, v in evaluation.items() if k != "load"}
                    metrics.write(row)
                    progress.evaluated(step, row)
            if step % run.save_every == 0 or last or stopping:
                with speed.paused():
                    checkpoints.save(state, batches.get_state(), wait=last or stopping)
            if stopping and not last:
                metrics.close()
                progress.say(f"stopped and saved at step {step}; the same command goes on from there")
                return Fitted(step, False, resumed_from, evaluation, None)
        if evaluation is None:  # the run was finished before this call
            evaluation = evaluate(model_of(run.model, state), held_out, words, corpus.domains, mesh)
        order2 = _order2(corpus, words, held_out)
        if processes.is_first():
            _draw(out, evaluation, metrics, run.model.num_sparse_heads)
        metrics.close()
        progress.finished(evaluation, order2, out)
    return Fitted(step, True, resumed_from, evaluation, order2)


def _read(run: RunConfig, words: tokenizer.Tokenizer) -> data.Corpus:
    """Raises: ValueError for a tokenizer larger than the vocabulary, or text that cannot be read."""
    data.check_vocab(words, run.model.vocab_size)
    return data.load_corpus(run.data)


def _check_beginning(run: RunConfig, words: tokenizer.Tokenizer) -> None:
    """Raises: ValueError for another run to begin with that does not fit."""
    if run.trunk is not None:
        frozen.check(run, words)
    elif run.start is not None:
        warm_start.check(run, words)


def _begin(run: RunConfig, words: tokenizer.Tokenizer, mesh: Mesh | None, progress: Progress) -> TrainState:
    """The state of step 0."""
    if run.trunk is not None:
        state, at = frozen.start(run, words, mesh)
        progress.say(f"the trunk is that of step {at} in {run.trunk}; the multi-token heads alone train")
    elif run.start is not None:
        state, at = warm_start.begin(run, words, mesh)
        progress.say(f"the weights are those of step {at} in {run.start}")
    else:
        state = init_state(run, mesh)
    return state


def _agree(run: RunConfig, mesh: Mesh | None, stop_after: int | None) -> None:
    """Raises: ConfigError when another process means another run, or is of another version."""
    facts = {"run": to_dict(run), "mesh": mesh and dict(mesh.shape), "stop_after": stop_after}
    versions = {name: importlib.metadata.version(name) for name in ("dsv3-jax", "jax")}
    processes.agree(facts | {"versions": versions})


def _peak(run: RunConfig, mesh: Mesh | None) -> float:
    """FLOP/s of a GEMM on what the run has: a machine's CPU devices share its cores, others add up."""
    devices = jax.process_count() if mesh is None or jax.default_backend() == "cpu" else mesh.size
    return devices * gemm_flops(run.model.compute_dtype)


def _describe(corpus: data.Corpus) -> str:
    sizes = corpus.sizes()
    parts = ", ".join(f"{name} {(train + val) / 1e6:.1f} MB" for name, (train, val) in sizes.items())
    held = sum(val for _, val in sizes.values())
    return f"text: {parts}; {held / 1e6:.2f} MB of it held out"


LOAD_ROWS = 1000  # about so many steps of a run leave their load: a large model's is tens of kilobytes


def _load_every(run: RunConfig) -> int:
    """Steps between two rows of load.jsonl: a multiple of `log_every`."""
    return run.log_every * max(1, run.steps // (LOAD_ROWS * run.log_every))


def _row(step: int, found: dict, cfg: ModelConfig) -> dict:
    """A step's metrics as plain numbers."""
    row: dict = {"step": step, "loss": float(found["loss"])}
    if found["mtp_loss"].size:
        row["mtp_loss"] = [float(x) for x in found["mtp_loss"]]
    for key in ("feature_loss", "balance_loss", "accuracy", "grad_norm", "lr", "dropped"):
        if key in found:
            row[key] = float(found[key])
    if found["crossed"]:
        row["crossed"] = float(found["crossed"])
        row["wire_bytes"] = wire_bytes(row["crossed"], cfg, jnp.dtype(cfg.compute_dtype).itemsize)
    load = jnp.asarray(found["load"])
    if load.shape[0]:
        low, high = balance.min_max(load)
        row |= {
            "max_vio": float(balance.max_vio(load).mean()),
            "load_entropy": float(balance.entropy(load).mean()),
            "load_gini": float(balance.gini(load).mean()),
            "load_min": float(low.min()),
            "load_max": float(high.max()),
        }
    return row


class _Speed:
    """Tokens a second and MFU between two reports, evaluation and saving apart."""

    def __init__(self, run: RunConfig, peak: float):
        self._tokens = run.data.batch_size * run.data.seq_len
        self._flops, self._peak = train_flops_per_token(run.model, trunk_held=run.trunk is not None), peak
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
        return {"tokens_per_s": rate, "mfu": rate * self._flops / self._peak}


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets; a second SIGINT interrupts at once. Only the main thread can listen."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number, frame):
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _order2(corpus: data.Corpus, words: tokenizer.Tokenizer, held_out: list[data.Batch]) -> float:
    """Bits a byte of an order-2 byte model, fitted on the training text, on the very validation rows."""
    rows = [
        words.bytes_of(row[real].tolist())
        for batch in held_out
        for row, real in zip(batch["tokens"], batch["segment_ids"] > 0, strict=True)
    ]
    bits, size = Order2(d.text.encode() for d in corpus.train).bits(rows)
    return bits / max(size, 1)


def _draw(out: Path, evaluation: dict, metrics: Metrics, mtp_blocks: int) -> None:
    load = np.asarray(evaluation["load"])
    if load.size:
        title = "Load of each expert on held-out text, over the layer's mean"
        routing_heatmap(load, out / "routing.png", title=title, mtp_blocks=mtp_blocks)
    training_curves(metrics.rows(), out / "training.png")
