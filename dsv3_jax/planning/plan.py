"""`dsv3 plan`: print the predicted cost of a model on a mesh. `cost.py` explains the figures."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import tyro
from rich.console import Console

from dsv3_jax.config import ConfigError, Execution, Lora, ModelConfig, RunConfig, replace
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.shape import parse_mesh
from dsv3_jax.planning import devices
from dsv3_jax.planning.cost import (
    PACKED,
    Cost,
    batch_parts,
    check_decode,
    choose_kernels,
    decode_cost,
    train_cost,
)
from dsv3_jax.planning.devices import ACCELERATORS, Accelerator
from dsv3_jax.report.units import format_bytes, format_count, format_seconds


@dataclass
class PlanOptions:
    """Predict memory, FLOPs and bytes sent of training and decoding, for each device of a mesh.

    Both steps are compiled for fake CPU devices, or with --target for GPUs or TPUs that need not
    exist. Nothing is allocated.
    """

    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    execution: Annotated[Execution, tyro.conf.arg(name="")]
    lora: Lora = field(default_factory=Lora)
    mesh: str = "data=1"
    """devices, as data=N,expert=N,tensor=N"""
    batch: int | None = None
    """sequences in a step. Default: one for each part of the mesh's batch and microbatch"""
    seq_len: int | None = None
    """tokens of a sequence. Default: the recipe's"""
    microbatches: int = 1
    """parts of a batch that are computed one after the other"""
    only: Literal["train", "decode"] | None = None
    """predict one of the two steps. Default: both"""
    decode_batch: int | None = None
    """sequences decoded together. Default: 32 a part of the mesh's batch"""
    context: int | None = None
    """cached tokens a sequence. Default: 4,096 or max_positions"""
    weight_dtype: Literal["float32", "bfloat16", "fp8", "int4"] | None = None
    """dtype of weights in decoding, and of those that LoRA freezes; fp8 and int4 for the latter
    alone. Default: the compute dtype"""
    device: Literal["h800", "h100", "v5p", "v5e", "v6e"] | None = None
    """report whether each step fits this device, and its shortest time. Default: the target's"""
    memory: str | None = None
    """a device's memory, as 80GB or 95.7GiB. Default: --device's"""
    target: str | None = None
    """compile with its own compiler: gpu:h100:8 (extra plan-gpu), tpu:v5p:2x2x1 (extra plan-tpu)"""


def plan(options: PlanOptions, run: RunConfig, name: str) -> int:
    """Print the cost of each step.

    Args:
        run: the preset's recipe.
        name: of the model, to print.
    Returns: the exit code.
    Raises: ConfigError before anything is compiled.
    """
    device = device_of(options)
    memory = device.memory if device else None
    if options.memory:
        memory = devices.parse_bytes(options.memory)
    jobs = jobs_of(options, run)
    print_row("model", name)
    for rows, length, compute_cost in jobs:
        with Console(stderr=True).status("compiling"):
            cost = compute_cost()
        for label, value in cost_lines(cost, rows, length, memory, device):
            print_row(label, value)
    return 0


def device_of(options: PlanOptions) -> Accelerator | None:
    """Return the device that options name; None if they name none."""
    kind = options.device or (devices.parse_target(options.target).kind if options.target else None)
    return ACCELERATORS[kind] if kind else None


def jobs_of(options: PlanOptions, run: RunConfig) -> list[tuple[int, int, Callable[[], Cost]]]:
    """Check the steps; return of each (sequences, their tokens, function that computes the cost).

    Raises: ConfigError before anything is compiled.
    """
    freezes = options.lora.rank > 0 and options.only != "decode"
    if options.weight_dtype in PACKED and not freezes:
        raise ConfigError(
            f"weight_dtype={options.weight_dtype!r} is for weights that LoRA freezes in training; "
            "give --lora.rank, or bfloat16"
        )
    sizes = {
        step: parse_mesh(options.mesh)
        for step in ("train", "decode")
        if options.only in (None, step)
    }
    # A target's program is compiled by this process too, which needs no device.
    devices.fake_cpus(
        1 if options.target else max(math.prod(size.values()) for size in sizes.values())
    )
    return [_job(step, options, run, size) for step, size in sizes.items()]


def _job(
    step: str, options: PlanOptions, run: RunConfig, sizes: dict[str, int]
) -> tuple[int, int, Callable[[], Cost]]:
    if options.target:
        mesh = devices.target_mesh(options.target, sizes)
    else:
        mesh = sharding.make_mesh(**sizes)
    # It raises here what would else be raised after the first lines are printed.
    choose_kernels(options.execution, mesh)
    parts = batch_parts(mesh)

    if step == "train":
        # One sequence for each part and microbatch, unless the options say more.
        batch = parts * options.microbatches if options.batch is None else options.batch
        length = run.data.seq_len if options.seq_len is None else options.seq_len
        data = replace(run.data, batch_size=batch, seq_len=length)
        optim = replace(run.optim, microbatches=options.microbatches)

        # Adapters need a start; which one it is costs nothing.
        start = "any" if options.lora.rank else None
        run = replace(run, model=options.model, execution=options.execution, data=data, optim=optim)
        run = replace(run, lora=options.lora, start=start)
        sharding.check_run(mesh, run)
        cost = partial(train_cost, run, mesh, frozen=options.weight_dtype, target=options.target)
        return data.batch_size, data.seq_len, cost

    rows = 32 * parts if options.decode_batch is None else options.decode_batch
    context = min(4096, options.model.max_positions) if options.context is None else options.context
    check_decode(options.model, options.execution, mesh, rows, context)
    cost = partial(decode_cost, options.model, options.execution, mesh, rows, context)
    wide = None if options.weight_dtype in PACKED else options.weight_dtype
    return rows, context, partial(cost, weight_dtype=wide, target=options.target)


def print_row(label: str, value: str) -> None:
    """Print a label and its value in two columns.

    Example:
        >>> print_row("  in all", "16 GB: fits in 80 GB")
          in all               16 GB: fits in 80 GB
    """
    print(f"{label:22s} {value}")


def cost_lines(
    cost: Cost, rows: int, length: int, memory: float | None, device: Accelerator | None
) -> list[tuple[str, str]]:
    """Return the lines of a program's cost: (label, value)."""
    sizes = (f"{axis}={size}" for axis, size in cost.mesh.items() if size > 1)
    mesh = ",".join(sizes) or "one device"
    count = math.prod(cost.mesh.values())
    task = f"{rows:,} sequences of {length:,} tokens on {mesh} ({count:,} devices), each device:"
    lines = [(cost.program, task), *_memory_lines(cost, memory)]

    per_token = format_count(cost.flops / (cost.tokens / count))
    work = f"{format_count(cost.flops)} FLOPs, {per_token} FLOPs a token"
    lines.append(("  computed", work))

    # Without a program nothing is known of what is sent, nor of time.
    if not cost.compile_error:
        lines += _sent_lines(cost)
        if device is not None:
            least = cost.least_seconds(device)
            parts = [f"{format_seconds(s)} for {resource}" for resource, s in least.items() if s]
            longest = format_seconds(max(least.values()))
            lines.append(("  a step takes at least", f"{longest}: {', '.join(parts)}"))
    lines += [("  note", note) for note in cost.notes]
    return [*lines, ("  compiled in", f"{cost.seconds:.1f} s")]


def _memory_lines(cost: Cost, memory: float | None) -> list[tuple[str, str]]:
    """Return what each device holds, kind by kind and in all."""
    kinds = cost.persistent | cost.transient
    lines = [(f"  {kind}", format_bytes(amount)) for kind, amount in kinds.items()]
    if cost.temporaries is not None:
        others = max(0, cost.temporaries - sum(cost.transient.values()))
        lines.append(("  other temporaries", format_bytes(others)))

    verdict = ""
    if cost.compile_error:
        verdict = f" and more: the compiler ran out of memory. {cost.compile_error}"
    elif memory is not None:
        verdict = f": {'fits' if cost.fits(memory) else 'does not fit'} in {format_bytes(memory)}"
    lines.append(("  in all", format_bytes(cost.total) + verdict))
    return lines


def _sent_lines(cost: Cost) -> list[tuple[str, str]]:
    """Return what each device sends, the largest kind first."""
    known = cost.sent.known()
    lines = [("  sent", format_bytes(known.wire))]
    by_kind = known.by("kind", "axes")
    for (kind, axes), amount in sorted(by_kind.items(), key=lambda item: -item[1]):
        if amount:
            lines.append((f"    {kind}", f"{format_bytes(amount)} along {'+'.join(axes)}"))

    # Rounds whose number depends on the data.
    if cost.sent.unknown_loops:
        iteration = format_bytes(cost.sent.wire - known.wire)
        number = cost.sent.unknown_loops
        loops = f"{iteration} in each iteration of loops of unknown length ({number})"
        lines.append(("    and", loops))
    return lines
