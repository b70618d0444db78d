"""Before the first step, in three phases: the processes agree, the run is checked, and what it needs is read."""

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dsv3_jax.cluster import processes
from dsv3_jax.config import OPTIMIZERS, ConfigError, RunConfig, replace, to_dict
from dsv3_jax.data import tokenizer
from dsv3_jax.data.batches import Source
from dsv3_jax.data.source import check_vocab, open_source
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.kernels import choose, xla_flags
from dsv3_jax.mesh import sharding
from dsv3_jax.model.counting import train_flops_per_token
from dsv3_jax.ops import balance
from dsv3_jax.report.speed import gemm_flops
from dsv3_jax.report.units import format_bytes, format_duration
from dsv3_jax.training import lora, optim, run_folder, warm_start
from dsv3_jax.training.callbacks import Callback
from dsv3_jax.training.checkpoint import steps_of
from dsv3_jax.training.run_folder import RUN_FILE
from dsv3_jax.training.step import Job, abstract_state, split_trainable

EXPECTED_MFU = (0.3, 0.6)  # shares of the GEMM peak that training reaches, for the estimate of its time


@dataclass(frozen=True)
class Options:
    """How a call of `fit` trains a run; `dsv3_jax.train.fit` says what each means."""

    mesh: Mesh | None = None
    step: int | None = None
    stop_after: int | None = None
    quiet: bool = False
    report: bool = True
    profile: tuple[int, int] | None = None
    optimizer: optax.GradientTransformation | None = None
    source: Source | None = None
    callbacks: Sequence[Callback] = ()
    open_start: warm_start.Open = warm_start.open_run

    def __post_init__(self):
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise ValueError(f"callbacks holds {callback!r}, which is no dsv3_jax.train.Callback")


@dataclass(frozen=True)
class Prepared:
    """A run that may train in its folder, and what was read for it."""

    job: Job
    tokenizer: Tokenizer
    source: Source
    start: warm_start.Start | None  # what the run begins with; None: nothing, or it has a checkpoint
    rows: np.ndarray | None  # of the global batch that this process holds; None: all
    changed: dict[str, tuple[int, int]]  # settings that differ from those of the run so far: name → (before, now)
    peak: float | None  # FLOP/s of a GEMM on the run's devices; None: not measured


def prepare(run: RunConfig, out: Path, options: Options) -> Prepared:
    """Check a run, read its text and claim its folder. A run that `optimizer` trains is named by it.

    Several processes call it together, and are all refused where one is.

    Raises: as `dsv3_jax.train.fit`.
    """
    job = agree(run, options)  # what comes after it is alike in all processes
    check(job)
    return read(job, out, options)


def agree(run: RunConfig, options: Options) -> Job:
    """Choose the kernels, and check that all processes train the same run from and to the same step.

    Raises: ConfigError.
    """
    mesh, optimizer = options.mesh, options.optimizer
    optim.check(run.optim, optimizer)
    if optimizer is not None:
        name = optim.name_of(optimizer, split_trainable(run, abstract_state(Job(run)).params)[0])
        run = replace(run, optim=replace(run.optim, name=name))
    kernels = processes.by_each(lambda: choose.prepare(run.execution, mesh=mesh))
    devices = 1 if mesh is None else mesh.size
    flags = xla_flags.known(xla_flags.training_options(kernels.target.platform, run.execution, devices))
    job = Job(run, mesh, kernels, optimizer, flags)
    facts: dict[str, Any] = {
        "run": to_dict(run),
        "mesh": mesh and dict(mesh.shape),
        "kernels": kernels_of(job),
    }
    facts |= {"step": options.step, "stop_after": options.stop_after}
    processes.agree(facts | {"versions": {name: importlib.metadata.version(name) for name in ("dsv3-jax", "jax")}})
    return job


def check(job: Job) -> None:
    """Check that the devices and this host's memory can train a run.

    Raises: ConfigError.
    """
    run, target = job.run, job.chosen().target
    balance.rule_of(run.model)  # refuses one that the router cannot have
    if job.mesh is not None:
        sharding.check(job.mesh, run)
        processes.check_layout(run.execution.layout)
    if run.optim.moments_dtype != "float32" and target.name_of("optimizer") == "cpu":
        raise ConfigError(
            f"kernels={run.execution.kernels!r} is for float32 means, not moments_dtype={run.optim.moments_dtype!r}; "
            "use 'auto' or 'xla'"
        )
    if target.platform == "cpu":
        processes.by_each(lambda: check_memory(job, jax.process_count()))


def read(job: Job, out: Path, options: Options) -> Prepared:
    """Read the tokenizer, the run to begin with and the text; then claim the folder.

    Raises: ValueError.
    """
    run, begun = job.run, (out / RUN_FILE).exists()
    own = run_folder.own_tokenizer(out)  # the file that it was copied from may be gone
    if begun and run.data.tokenizer != "bytes" and own.exists() and not Path(run.data.tokenizer).exists():
        run = replace(run, data=replace(run.data, tokenizer=str(own)))
    words = processes.by_each(lambda: tokenizer.load(run.data.tokenizer))
    changed = processes.by_each(lambda: run_folder.changes(run_folder.read_run(out), run) if begun else {})
    taken = max(steps_of(out / "checkpoints"), default=0) if options.step is None else options.step
    if begun and taken > run.steps:
        raise ConfigError(f"steps={run.steps} is below the {taken} steps that the run in {out} has taken")

    def other() -> warm_start.Start | None:
        place = run.trunk or run.start
        if place is None or (begun and taken):
            return None
        start = options.open_start(place)
        warm_start.check(run, start)
        return start

    start = processes.by_each(other)
    check_vocab(words, run.model.vocab_size)
    if options.source is None and run.data.format == "chat":
        raise ConfigError("data.format='chat' needs the examples as source; dsv3_jax.train.fit opens them")
    source = options.source or processes.by_each(lambda: open_source(run.data, words))
    processes.agree({"text": source.fingerprint})

    def claim() -> None:
        made = run_folder.made_from(source.fingerprint, words.fingerprint)
        run_folder.claim(out, run, kernels_of(job), made)

    processes.by_first(claim)
    job = replace(job, run=run_folder.settled(run, out))
    rows = None if job.mesh is None else processes.rows_held(job.mesh, run.data.batch_size)
    return Prepared(job, words, source, start, rows, changed, _peak(job) if options.report else None)


def check_memory(job: Job, hosts: int = 1) -> None:
    """Check that a host's memory holds its share of the training state and a step's gradients.

    On a CPU these are in the host's memory, on however many devices. Without the check the process is killed.

    Raises: ConfigError.

    Example:
        >>> import dsv3_jax as ds
        >>> check_memory(Job(ds.recipe("v3")))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        dsv3_jax.config.ConfigError: dim=7168 and num_layers=61 are too large: ...
    """
    state = abstract_state(job)
    gradients = split_trainable(job.run, state.params)[0]
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, gradients, state.opt))) / hosts
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > memory:
        raise ConfigError(
            f"dim={job.run.model.dim} and num_layers={job.run.model.num_layers} are too large: the training state of "
            f"{format_bytes(needed)} does not fit in this host's memory of {format_bytes(memory)}; "
            "`dsv3 plan` shows what a mesh would hold"
        )


def kernels_of(job: Job) -> dict[str, str]:
    """The implementation of each op, by name. The table's optimizer is AdamW's update, for float32 means in C++.

    Example:
        >>> import dsv3_jax as ds
        >>> run = ds.recipe("tiny")
        >>> kernels_of(Job(ds.replace(run, optim=ds.replace(run.optim, name="optax:lion"))))["optimizer"]
        'optax:lion'
    """
    run = job.run
    names = job.chosen().chosen(run.execution.compute_dtype, 1 if job.mesh is None else job.mesh.size)
    adamw = names["optimizer"] if run.optim.moments_dtype == "float32" else "xla"
    others = {"adamw": adamw, "muon": f"muon by xla, adamw by {adamw}"}
    return names | {"optimizer": others.get(run.optim.name, run.optim.name)}


def describe(ready: Prepared, step: int) -> list[str]:
    """Lines to print before training: the text, the kernels, and how long it may take."""
    run, mesh = ready.job.run, ready.job.mesh
    kernels = ready.job.chosen().describe(run.execution.compute_dtype, 1 if mesh is None else mesh.size)
    lines = [ready.source.summary, kernels, xla_flags.describe(ready.job.options)]
    lines.append("" if run.optim.name == "adamw" else f"optimizer: {OPTIMIZERS.get(run.optim.name, run.optim.name)}")
    lines.append(lora.describe(run.lora, abstract_state(Job(run)).params) if run.lora.rank else "")
    lines += [f"{name}={now}, before {before}" for name, (before, now) in ready.changed.items()]
    if "steps" in ready.changed:
        lines.append("the learning rate's schedule is that of the new number of steps from here on")
    if step < run.steps and ready.peak:
        tokens = run.data.batch_size * run.data.seq_len
        flops = flops_per_token(run) * tokens * (run.steps - step)
        slow, fast = (format_duration(flops / (share * ready.peak)) for share in EXPECTED_MFU)
        lines.append(
            f"{run.steps - step:,} steps of {tokens:,} tokens: between {fast} and {slow}, "
            f"estimated from matrix products at {ready.peak / 1e9:,.0f} GFLOP/s here"
        )
    return lines


def flops_per_token(run: RunConfig) -> int:
    """FLOPs of a trained token of a run, see `counting.train_flops_per_token`.

    Example:
        >>> import dsv3_jax as ds
        >>> flops_per_token(ds.recipe("tiny")) == train_flops_per_token(ds.preset("tiny"))
        True
    """
    adapted = run.lora.on if run.lora.rank else ()
    return train_flops_per_token(run.model, frozen_trunk=run.trunk is not None, adapted=adapted)


def _peak(job: Job) -> float:
    """FLOP/s of a GEMM on the run's devices: a machine's CPU devices share its cores, others add up."""
    devices = jax.process_count() if job.mesh is None or job.chosen().target.platform == "cpu" else job.mesh.size
    return devices * gemm_flops(job.run.execution.compute_dtype)
