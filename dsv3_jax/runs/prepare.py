"""Before the first step: processes agree, the run is checked; tokenizer, text, start are read."""

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import ConfigError, RunConfig, replace, to_dict
from dsv3_jax.data import tokenizer
from dsv3_jax.data.batches import Source
from dsv3_jax.data.source import check_vocab, open_source
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.hf.places import find
from dsv3_jax.host.mirror import fetched
from dsv3_jax.kernels import choose
from dsv3_jax.mesh import processes, sharding
from dsv3_jax.report.units import format_bytes
from dsv3_jax.runs.answers import Tasks
from dsv3_jax.runs.callbacks import Callback
from dsv3_jax.runs.chats import Chats
from dsv3_jax.runs.checkpoint import steps_of
from dsv3_jax.runs.folder import RUN_FILE, read_made, settled
from dsv3_jax.runs.start import Start, check_start, open_start
from dsv3_jax.training.state import Job, abstract_state, split_trainable
from dsv3_jax.training.transformation import Transform, check_optimizer, name_of


@dataclass(frozen=True)
class FitOptions:
    """The options of a call of `fit`, whose docstring says what each means."""

    mesh: Mesh | None = None
    step: int | None = None
    stop_after: int | None = None
    quiet: bool = False
    report: bool = True
    profile: tuple[int, int] | None = None
    optimizer: Transform = None
    source: Source | None = None
    chats: Chats | None = None
    start: Start | None = None
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise ValueError(
                    f"callbacks holds {callback!r}, which is no dsv3_jax.train.Callback"
                )


class Prepared(NamedTuple):
    """A run that the devices can train, and what it reads."""

    job: Job
    tokenizer: Tokenizer
    source: Source
    tasks: Tasks | None  # with GRPO: what the model answers, in place of the source's rows
    start: Start | None  # to begin with. None means that it has none, or resumes from a checkpoint


def make_job(run: RunConfig, options: FitOptions) -> Job:
    """Choose the kernels, and check that all processes train one run from and to the same step.

    A run that `optimizer` trains is named by it. All that follows is alike in all processes.

    Raises: ConfigError.
    """
    mesh = options.mesh
    optimizer = options.optimizer

    # The caller's optimizer has no name but the types of its state.
    check_optimizer(run.optim, optimizer)
    if optimizer is not None:
        name = name_of(optimizer, split_trainable(run, abstract_state(Job(run)).params)[0])
        run = replace(run, optim=replace(run.optim, name=name))

    # Each host compiles its own kernels, and may lack some.
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


def check_devices(job: Job) -> None:
    """Check that the devices and this host's memory can train a run.

    Raises: ConfigError.
    """
    if job.mesh is not None:
        sharding.check_run(job.mesh, job.run)
        processes.check_layout(job.run.execution.layout)
    if job.its_kernels().target.platform == "cpu":
        processes.by_each(lambda: check_memory(job, jax.process_count()))


def read_inputs(job: Job, out: Path, options: FitOptions) -> Prepared:
    """Read the tokenizer, the text, and the run to begin with.

    Raises: ValueError.
    """
    run = job.run
    begun = (out / RUN_FILE).exists()
    taken = max(steps_of(out / "checkpoints"), default=0) if options.step is None else options.step
    if begun and taken > run.steps:
        raise ConfigError(
            f"steps={run.steps} is below the {taken} steps that the run in {out} has taken"
        )

    # Once a checkpoint is there, the start may be gone. GRPO alone comes back to it.
    resumes = begun and taken > 0
    start = None if resumes else processes.by_each(lambda: _start_of(run, options.start))
    own = settled(run, out) if begun else run  # the tokenizer's first file may be gone
    words = processes.by_each(lambda: _tokenizer_of(own, options.chats, start))
    check_vocab(words, run.model.vocab_size)

    # The text: of chats, which are read already, of the caller, or what `run.data` names.
    chats = options.chats
    tasks = None if chats is None else chats.tasks
    if chats is not None:
        source = chats.source
        if not tasks:
            passes = run.steps * run.data.batch_size / source.rows_per_epoch()
            line = f"{run.steps:,} steps of {run.data.batch_size} rows: {passes:.1f} passes"
            source = replace(source, summary=f"{source.summary}\n{line}")
    else:
        source = options.source or processes.by_each(lambda: open_source(run.data, words))
    if run.grpo.group and tasks is None:
        raise ConfigError(
            f"grpo group={run.grpo.group} needs a source that samples; dsv3_jax.train.fit makes it"
        )

    # A source of the caller, or chats, may be made of other settings than the run's.
    for name in ("seq_len", "batch_size"):
        theirs, ours = getattr(source.cfg, name), getattr(run.data, name)
        if theirs != ours:
            raise ConfigError(
                f"data.{name}={ours} is not that of the source, {theirs}; make it of the run's data"
            )

    # All processes read one text. A checker that has changed is reported, not refused.
    processes.agree({"text": source.fingerprint})
    if tasks is not None and begun and _other_checker(out, tasks.checker.fingerprint()):
        changed = f"grpo checker={run.grpo.checker!r} has changed since the last start"
        line = f"{changed}: rewards are by the new one"
        source = replace(source, summary=f"{source.summary}\n{line}")
    return Prepared(job, words, source, tasks, start)


def _start_of(run: RunConfig, opened: Start | None) -> Start | None:
    """The run's start or trunk, opened and checked; None for a run that has neither."""
    place = run.trunk or run.start
    if place is None:
        if opened is not None:
            raise ConfigError(
                f"start={opened.place!r} is given for a run with start=None; make the run by "
                "on_weights(run, start) or on_trunk"
            )
        return None

    # One that was opened already must be the one that the run names.
    start = opened or open_start(place)
    if start.place != place and Path(start.place).resolve() != find(fetched(place)).resolve():
        name = "start" if run.trunk is None else "trunk"
        raise ConfigError(
            f"start={start.place!r} is given for a run with {name}={place!r}; make the run by "
            "on_weights(run, start) or on_trunk"
        )
    check_start(run, start)
    return start


def _tokenizer_of(run: RunConfig, chats: Chats | None, start: Start | None) -> Tokenizer:
    """The tokenizer of a run. What has read the same file already is not asked to read it again."""
    if chats is not None:
        return chats.text.tokenizer
    if start is not None and start.run.data.tokenizer == run.data.tokenizer:
        return start.text.tokenizer
    return tokenizer.load(run.data.tokenizer)


def _other_checker(out: Path, fingerprint: str) -> bool:
    """Whether the last start of a run had another program say which answers are right."""
    last = [made for made in read_made(out)[-1:] if isinstance(made, dict)]
    before = [made.get("checker") for made in last]
    return bool(fingerprint) and before not in ([], [None], [fingerprint])


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
    names = job.its_kernels().chosen(run.execution.compute_dtype, devices)
    adamw = names["optimizer"] if run.optim.moments_dtype == "float32" else "xla"
    others = {"adamw": adamw, "muon": f"muon by xla, adamw by {adamw}"}
    return names | {"optimizer": others.get(run.optim.name, run.optim.name)}
