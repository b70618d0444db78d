"""Before the first step: settings are checked, text is read, and the folder is claimed."""

import importlib.metadata
import os
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
from dsv3_jax.data.batches import Batch, check_vocab
from dsv3_jax.data.source import Batches, Source, open_source
from dsv3_jax.data.text_settings import TextSettings
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.kernels import choose, xla_flags
from dsv3_jax.mesh import sharding
from dsv3_jax.model.counting import train_flops_per_token
from dsv3_jax.ops import balance
from dsv3_jax.report.speed import gemm_flops
from dsv3_jax.report.units import format_bytes, format_duration
from dsv3_jax.training import chats, from_optax, lora, optim, warm_start
from dsv3_jax.training.checkpoint import last_step
from dsv3_jax.training.provenance import made_from
from dsv3_jax.training.run_folder import RUN_FILE, changes, claim, own_tokenizer, read_run, settled
from dsv3_jax.training.step import abstract_state, split_trainable

EXPECTED_MFU = (0.3, 0.6)  # shares of the GEMM peak that training reaches, for the estimate of its time


@dataclass(frozen=True)
class Prepared:
    """All that the loop needs beside the state."""

    run: RunConfig
    kernels: choose.Kernels
    tokenizer: Tokenizer
    source: Source
    batches: Batches
    held_out: list[Batch]
    rows: np.ndarray | None  # of the global batch that this process holds; None: all
    peak: float | None  # FLOP/s of a GEMM on the run's devices; None: not measured
    options: xla_flags.Options  # of the training step's compilation
    changed: dict[str, tuple[int, int]]  # settings that differ from those of the run so far: name → (before, now)


def prepare(
    run: RunConfig,
    out: Path,
    mesh: Mesh | None,
    step: int | None = None,
    stop_after: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    source: Source | None = None,
    *,
    time_device: bool = True,
) -> Prepared:
    """Check a run, read its text and claim its folder. A run that `optimizer` trains is named by it.

    Several processes call it together, and are all refused where one is.

    Args: source: data in place of the text that the run names, see `loop.fit`. time_device: measure a GEMM.
    Raises: as `loop.fit`.
    """
    optim.check(run.optim, optimizer)
    if optimizer is not None:
        name = from_optax.name_of(optimizer, split_trainable(run, abstract_state(run).params)[0])
        run = replace(run, optim=replace(run.optim, name=name))
    kernels = processes.by_each(lambda: choose.prepare(run.execution, mesh=mesh))
    # First: what is checked from here on then comes out alike in all processes.
    _agree(run, mesh, (step, stop_after), chosen(kernels, run, mesh))
    balance.rule_of(run.model)  # refuses one that the router cannot have
    if mesh is not None:
        sharding.check(mesh, run)
        processes.check_layout(run.execution.layout)
    forced = kernels.target.forced("optimizer")
    if run.optim.moments_dtype != "float32" and forced is not None and forced.name == "cpu":
        raise ConfigError(
            f"kernels={run.execution.kernels!r} is for float32 means, not moments_dtype={run.optim.moments_dtype!r}; "
            "use 'auto' or 'xla'"
        )
    if kernels.target.platform == "cpu":
        processes.by_each(lambda: check_memory(run, jax.process_count(), optimizer))
    own = own_tokenizer(out)  # of a run that has begun: the file it was made from may be gone
    begun = (out / RUN_FILE).exists()
    given = run.data.tokenizer
    if begun and given != "bytes" and own.exists() and not Path(given).exists():
        run = replace(run, data=replace(run.data, tokenizer=str(own)))
    words = processes.by_each(lambda: tokenizer.load(run.data.tokenizer))
    changed = processes.by_each(lambda: changes(read_run(out), run) if begun else {})
    if not begun:  # before anything is written
        warm_start.check(run, words)
    elif (taken := last_step(out) if step is None else step) > run.steps:
        raise ConfigError(f"steps={run.steps} is below the {taken} steps that the run in {out} has taken")
    text = processes.by_each(lambda: chats.text_of(run, out))
    source = processes.by_each(lambda: _read(run, words, text, source))
    processes.agree({"text": source.fingerprint})
    rows = None if mesh is None else processes.rows_held(mesh, run.data.batch_size)
    made = made_from(source, words)
    processes.by_first(lambda: _claim(out, run, chosen(kernels, run, mesh), text, made))
    run = settled(run, out)
    return Prepared(
        run,
        kernels,
        words,
        source,
        source.train_batches(rows),
        source.val_batches(run.eval_batches),
        rows,
        _peak(run, mesh, kernels) if time_device else None,
        _options(run, mesh, kernels),
        changed,
    )


def check_memory(run: RunConfig, hosts: int = 1, optimizer: optax.GradientTransformation | None = None) -> None:
    """Check that this host's memory can hold its part of parameters and gradients, in float32, and optimizer state.

    Without the check, the system ends this process, and maybe others, when memory runs out.

    Raises: ConfigError with both sizes.

    Example:
        >>> import dsv3_jax as ds
        >>> check_memory(ds.recipe("v3"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        dsv3_jax.config.ConfigError: dim=7168 and num_layers=61 are too large: ...
    """
    state = abstract_state(run, optimizer=optimizer)
    gradients = split_trainable(run, state.params)[0]
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, gradients, state.opt))) / hosts
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > memory:
        raise ConfigError(
            f"dim={run.model.dim} and num_layers={run.model.num_layers} are too large: the training state of "
            f"{format_bytes(needed)} does not fit in this host's memory of {format_bytes(memory)}; "
            "`dsv3 plan` shows what a mesh would hold"
        )


def _claim(out: Path, run: RunConfig, kernels: dict[str, str], text: TextSettings | None, made: dict[str, Any]) -> None:
    claim(out, run, kernels, made)
    if text is not None:
        chats.keep(run, out, text)


def chosen(kernels: choose.Kernels, run: RunConfig, mesh: Mesh | None) -> dict[str, str]:
    """The implementation of each op that a run uses.

    Example:
        >>> import dsv3_jax as ds
        >>> kernels = choose.Kernels(choose.Target("cpu", "xla"))
        >>> chosen(kernels, ds.recipe("tiny"), None)["product"]
        'xla'
    """
    return kernels.chosen(*_conditions(run, mesh))


def _conditions(run: RunConfig, mesh: Mesh | None) -> tuple[str, int, str, str]:
    """The arguments of `Kernels.chosen` and `Kernels.describe`."""
    return run.execution.compute_dtype, _devices(mesh), run.optim.moments_dtype, run.optim.name


def _devices(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.size


def _options(run: RunConfig, mesh: Mesh | None, kernels: choose.Kernels) -> xla_flags.Options:
    return xla_flags.known(xla_flags.training_options(kernels.target.platform, run.execution, _devices(mesh)))


def describe(found: Prepared, step: int, mesh: Mesh | None) -> list[str]:
    """Lines to print before training: the text, the kernels, and how long it may take."""
    run = found.run
    lines = [found.source.describe()]
    lines.append(found.kernels.describe(*_conditions(run, mesh)))
    lines.append(xla_flags.describe(found.options))
    lines.append("" if run.optim.name == "adamw" else f"optimizer: {OPTIMIZERS.get(run.optim.name, run.optim.name)}")
    lines.append(lora.describe(run.lora, abstract_state(run).params) if run.lora.rank else "")
    lines += [f"{name}={now}, before {before}" for name, (before, now) in found.changed.items()]
    if "steps" in found.changed:
        lines.append("the learning rate's schedule is that of the new number of steps from here on")
    if step < run.steps and found.peak:
        tokens = run.data.batch_size * run.data.seq_len
        flops = flops_per_token(run) * tokens * (run.steps - step)
        slow, fast = (flops / (share * found.peak) for share in EXPECTED_MFU)
        lines.append(
            f"{run.steps - step:,} steps of {tokens:,} tokens: between {format_duration(fast)} and "
            f"{format_duration(slow)}, estimated from matrix products at {found.peak / 1e9:,.0f} GFLOP/s here"
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


def _read(run: RunConfig, words: Tokenizer, text: TextSettings | None, source: Source | None) -> Source:
    """Raises: ValueError for a tokenizer larger than the vocabulary, or text that cannot be read."""
    check_vocab(words, run.model.vocab_size)
    if source is not None:
        return source
    return open_source(run.data, words, text, quiet=not processes.is_first())


def _agree(run: RunConfig, mesh: Mesh | None, steps: tuple[int | None, int | None], kernels: dict[str, str]) -> None:
    """Raises: ConfigError if another process has another run, first or last step, version or kernels."""
    facts: dict[str, Any] = {"run": to_dict(run), "mesh": mesh and dict(mesh.shape), "kernels": kernels}
    facts |= {"step": steps[0], "stop_after": steps[1]}
    versions = {name: importlib.metadata.version(name) for name in ("dsv3-jax", "jax")}
    processes.agree(facts | {"versions": versions})


def _peak(run: RunConfig, mesh: Mesh | None, kernels: choose.Kernels) -> float:
    """FLOP/s of a GEMM on the run's devices: a machine's CPU devices share its cores, others add up."""
    devices = jax.process_count() if mesh is None or kernels.target.platform == "cpu" else mesh.size
    return devices * gemm_flops(run.execution.compute_dtype)
