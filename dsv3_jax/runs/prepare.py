"""Before the first step: options of `fit`; processes agree, the run is checked, text is read."""

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import ConfigError, RunConfig, replace, to_dict
from dsv3_jax.data import tokenizer
from dsv3_jax.data.batches import Source
from dsv3_jax.data.source import check_vocab, open_source
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.kernels import choose
from dsv3_jax.mesh import processes, sharding
from dsv3_jax.report.units import format_bytes
from dsv3_jax.runs.checkpoint import steps_of
from dsv3_jax.runs.folder import RUN_FILE, read_made, settled
from dsv3_jax.runs.start import Open, Start, check_start, open_start
from dsv3_jax.training import optim
from dsv3_jax.training.step import Job, abstract_state, split_trainable


class Callback:
    """The methods that `fit` calls while it trains; each does nothing by default.

    Only the first of several processes calls them. A callback gets plain numbers and paths, never
    the state, so it cannot change the run. It is called between two steps, and training waits for
    it.

    An error in `on_start` ends `fit` before the first step. After an error elsewhere the callback
    is not called again. Training stops as after SIGTERM: the step that runs is completed and saved.
    Then `fit` raises the error, and the same call resumes.

    Example:
        >>> class Losses(Callback):
        ...     def __init__(self):
        ...         self.seen = []
        ...
        ...     def on_step(self, row):
        ...         self.seen.append((row["step"], row["loss"]))
        >>> losses = Losses()
        >>> losses.on_step({"step": 10, "loss": 5.5, "lr": 1e-3})  # as `fit(…, callbacks=[losses])`
        >>> losses.seen
        [(10, 5.5)]
    """

    def on_start(self, run: RunConfig, out: Path, step: int) -> None:
        """Training begins or resumes after `step` steps, in folder `out`."""

    def on_step(self, row: dict[str, Any]) -> None:
        """A row of training metrics was written, see metrics.jsonl: every `log_every` steps.

        On accelerators later steps may have started by then.
        """

    def on_evaluation(self, row: dict[str, Any]) -> None:
        """A row of validation metrics was written."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """The state after `step` steps is being saved, and complete before the next begins."""

    def on_end(self, result: Any) -> None:
        """`fit` is about to return this `FitResult`. Not called if it raises."""


@dataclass(frozen=True)
class Options:
    """How a call of `fit` trains a run; `dsv3_jax.train.fit` says what each means."""

    mesh: Mesh | None = None
    step: int | None = None
    stop_after: int | None = None
    quiet: bool = False
    report: bool = True
    profile: tuple[int, int] | None = None
    optimizer: optim.Transform = None
    source: Source | None = None
    callbacks: Sequence[Callback] = ()
    open_start: Open = open_start

    def __post_init__(self):
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise ValueError(
                    f"callbacks holds {callback!r}, which is no dsv3_jax.train.Callback"
                )


def agree(run: RunConfig, options: Options) -> Job:
    """Choose the kernels, and check that all processes train one run from and to the same step.

    A run that `optimizer` trains is named by it. All that follows is alike in all processes.

    Raises: ConfigError.
    """
    mesh, optimizer = options.mesh, options.optimizer
    optim.check(run.optim, optimizer)
    if optimizer is not None:
        name = optim.name_of(optimizer, split_trainable(run, abstract_state(Job(run)).params)[0])
        run = replace(run, optim=replace(run.optim, name=name))
    kernels = processes.by_each(lambda: choose.prepare(run.execution, mesh=mesh))
    job = Job(run, mesh, kernels, optimizer)
    processes.agree({
        "run": to_dict(run),
        "mesh": mesh and dict(mesh.shape),
        "kernels": kernels_of(job),
        "step": options.step,
        "stop_after": options.stop_after,
        "versions": {name: importlib.metadata.version(name) for name in ("dsv3-jax", "jax")},
    })  # fmt: skip
    return job


def check(job: Job) -> None:
    """Check that the devices and this host's memory can train a run.

    Raises: ConfigError.
    """
    if job.mesh is not None:
        sharding.check(job.mesh, job.run)
        processes.check_layout(job.run.execution.layout)
    if job.chosen().target.platform == "cpu":
        processes.by_each(lambda: check_memory(job, jax.process_count()))


def read(job: Job, out: Path, options: Options) -> tuple[Tokenizer, Source, Start | None]:
    """Read the tokenizer, the text, and the run to begin with: none if there is a checkpoint.

    Raises: ValueError.
    """
    run = job.run
    begun = (out / RUN_FILE).exists()
    own = settled(run, out) if begun else run  # the tokenizer's first file may be gone
    words = processes.by_each(lambda: tokenizer.load(own.data.tokenizer))
    taken = max(steps_of(out / "checkpoints"), default=0) if options.step is None else options.step
    if begun and taken > run.steps:
        raise ConfigError(
            f"steps={run.steps} is below the {taken} steps that the run in {out} has taken"
        )

    def other() -> Start | None:
        place = run.trunk or run.start
        if place is None or (begun and taken):
            return None
        start = options.open_start(place)
        check_start(run, start)
        return start

    start = processes.by_each(other)
    check_vocab(words, run.model.vocab_size)
    if options.source is None and run.data.format == "chat":
        raise ConfigError(
            "data.format='chat' needs the examples as source; dsv3_jax.train.fit opens them"
        )
    source = options.source or processes.by_each(lambda: open_source(run.data, words))
    if run.grpo.group and source.sampled is None:
        raise ConfigError(
            f"grpo group={run.grpo.group} needs a source that samples; dsv3_jax.train.fit makes it"
        )
    processes.agree({"text": source.fingerprint})
    starts = read_made(out)[-1:] if begun else []
    before = [start.get("checker") for start in starts if isinstance(start, dict)]
    if source.checker and before not in ([], [None], [source.checker]):
        changed = f"grpo checker={run.grpo.checker!r} has changed since the last start"
        line = f"{changed}: rewards are by the new one"
        source = replace(source, summary=f"{source.summary}\n{line}")
    return words, source, start


def check_memory(job: Job, hosts: int = 1) -> None:
    """Check that a host's memory holds its share of the training state and a step's gradients.

    On a CPU these are in the host's memory, on however many devices. Without the check the process
    is killed.

    Raises: ConfigError.

    Example:
        >>> import dsv3_jax as ds
        >>> check_memory(Job(ds.recipe("v3")))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: dim=7168 and num_layers=61 are too large: ...
    """
    state = abstract_state(job, frozen=jnp.bfloat16)  # at least
    gradients = split_trainable(job.run, state.params)[0]
    arrays = jax.tree.leaves((state.params, gradients, state.opt))
    needed = sum(x.size * x.dtype.itemsize for x in arrays) / hosts
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(
            f"dim={job.run.model.dim} and num_layers={job.run.model.num_layers} are too large: "
            f"the training state of {format_bytes(needed)} does not fit in this host's memory of "
            f"{format_bytes(memory)}; "
            "`dsv3 plan` shows what a mesh would hold"
        )


def kernels_of(job: Job) -> dict[str, str]:
    """The implementation of each op, by name.

    The table's optimizer is AdamW's update, for float32 means in C++.

    Example:
        >>> import dsv3_jax as ds
        >>> run = ds.recipe("tiny")
        >>> run = ds.replace(run, optim=ds.replace(run.optim, name="optax:lion"))
        >>> kernels_of(Job(run))["optimizer"]
        'optax:lion'
    """
    run = job.run
    devices = 1 if job.mesh is None else job.mesh.size
    names = job.chosen().chosen(run.execution.compute_dtype, devices)
    adamw = names["optimizer"] if run.optim.moments_dtype == "float32" else "xla"
    others = {"adamw": adamw, "muon": f"muon by xla, adamw by {adamw}"}
    return names | {"optimizer": others.get(run.optim.name, run.optim.name)}
