"""`dsv3 plan`: a model on a mesh, on paper. What the figures are stands in `cost.py`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import tyro
from rich.console import Console

from dsv3_jax.config import ModelConfig, RunConfig, replace
from dsv3_jax.mesh import sharding
from dsv3_jax.model.counting import short
from dsv3_jax.planning import devices
from dsv3_jax.planning.cost import Cost, batch_parts, check_decode, decode_cost, train_cost
from dsv3_jax.planning.devices import DEVICES, Device
from dsv3_jax.planning.hlo import Traffic


@dataclass
class Plan:
    """What a training and a decoding step cost each device of a mesh: memory, FLOPs, and bytes sent. Allocates nothing.

    Compiles both for fake CPU devices, or with --target for TPUs that need not be there.
    """

    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    mesh: str = "data=1"
    """devices of the training step, as data=N,expert=N,tensor=N"""
    batch: int | None = None
    """sequences an optimizer step; none: one for each part of the batch and microbatch"""
    seq_len: int | None = None
    """tokens of a sequence; none: the recipe's"""
    microbatches: int = 1
    """parts that a batch is computed in, one after the other"""
    only: Literal["train", "decode"] | None = None
    """one of the two steps alone"""
    decode_mesh: str | None = None
    """devices of the decoding step; none: those of --mesh"""
    decode_batch: int | None = None
    """sequences that decode side by side; none: 32 for each part of the batch"""
    context: int | None = None
    """tokens of each sequence in the cache; none: 4,096, or as many as the model can"""
    weight_dtype: Literal["float32", "bfloat16"] | None = None
    """of the weights that decode; none: the compute dtype"""
    device: Literal["h800", "h100", "v5p", "v5e", "v6e"] | None = None
    """does it fit in such devices, and how fast can they be at best?"""
    memory: str | None = None
    """bytes of a device, such as 80GB or 95.7GiB, instead of --device's own"""
    target: str | None = None
    """compile for these TPUs with their own compiler, such as tpu:v5p:8x8x8; needs the extra `tpu`"""


def plan(args: Plan, run: RunConfig, name: str) -> int:
    """Print what `args` ask for; `run` is the preset's recipe. Returns the exit code.

    Raises: ConfigError, one sentence, before anything is compiled.
    """
    device = DEVICES[args.device] if args.device else None
    memory = devices.parse_bytes(args.memory) if args.memory else device.memory if device else None
    train_sizes = sharding.parse_mesh(args.mesh)
    decode_sizes = sharding.parse_mesh(args.decode_mesh or args.mesh)
    sizes = {"train": train_sizes, "decode": decode_sizes}
    steps = [step for step in sizes if args.only in (None, step)]
    if args.target is None:
        devices.fake_cpus(max(math.prod(sizes[step].values()) for step in steps))
    jobs = [_job(step, args, run, sizes[step]) for step in steps]
    say("model", name)
    for rows, length, work in jobs:
        with Console(stderr=True).status("compiling"):
            cost = work()
        for what, amount in describe(cost, rows, length, memory, device):
            say(what, amount)
    return 0


def _job(step: str, args: Plan, run: RunConfig, sizes: dict[str, int]) -> tuple[int, int, Callable[[], Cost]]:
    """(sequences, tokens of each, what compiles and counts it), checked."""
    mesh = devices.tpu_mesh(args.target, sizes) if args.target else sharding.make_mesh(**sizes)
    parts = batch_parts(mesh)
    if step == "train":
        data = replace(
            run.data,
            batch_size=parts * args.microbatches if args.batch is None else args.batch,
            seq_len=run.data.seq_len if args.seq_len is None else args.seq_len,
        )
        run = replace(run, model=args.model, data=data, optim=replace(run.optim, microbatches=args.microbatches))
        sharding.check(mesh, run)
        return data.batch_size, data.seq_len, partial(train_cost, run, mesh, target=args.target)
    rows = 32 * parts if args.decode_batch is None else args.decode_batch
    context = min(4096, args.model.max_positions) if args.context is None else args.context
    check_decode(args.model, mesh, rows, context)
    options = {"weight_dtype": args.weight_dtype, "target": args.target}
    return rows, context, partial(decode_cost, args.model, mesh, rows, context, **options)


def say(what: str, amount: str) -> None:
    print(f"{what:22s} {amount}")


def describe(cost: Cost, rows: int, length: int, memory: float | None, device: Device | None) -> list[tuple[str, str]]:
    """The lines of a program's cost: (what, how much)."""
    where = ",".join(f"{axis}={size}" for axis, size in cost.mesh.items() if size > 1) or "one device"
    count = math.prod(cost.mesh.values())
    lines = [
        (cost.program, f"{rows:,} sequences of {length:,} tokens on {where} ({count:,} devices), each device:"),
        *((f"  {kind}", in_bytes(amount)) for kind, amount in cost.held.items()),
        *((f"  {kind}", in_bytes(amount)) for kind, amount in cost.made.items()),
    ]
    if cost.temporaries is not None:
        lines.append(("  other temporaries", in_bytes(max(0, cost.temporaries - sum(cost.made.values())))))
    verdict = ""
    if cost.refused:
        verdict = f" and more: the compiler gave up. {cost.refused}"
    elif memory is not None:
        verdict = f": {'fits' if cost.fits(memory) else 'does not fit'} in {in_bytes(memory)}"
    lines.append(("  in all", in_bytes(cost.total) + verdict))
    lines.append(("  computed", f"{short(cost.flops)}FLOP, {short(cost.flops / (cost.tokens / count))}FLOP a token"))
    if not cost.refused:
        known = cost.sent.known()
        lines.append(("  sent", in_bytes(known.wire)))
        lines += [
            (f"    {kind}", f"{in_bytes(amount)} along {axes}") for (kind, axes), amount in _largest(known) if amount
        ]
        if cost.sent.unbounded:
            turn = in_bytes(cost.sent.wire - known.wire)
            loops = f"{turn} in each turn of loops of unknown length, of which there are {cost.sent.unbounded}"
            lines.append(("    and", loops))
    if device is not None and not cost.refused:
        least = cost.least_seconds(device)
        spelled = ", ".join(f"{in_seconds(s)} for {what}" for what, s in least.items() if s)
        lines.append(("  a step takes at least", f"{in_seconds(max(least.values()))}: {spelled}"))
    return lines + [("  note", note) for note in cost.notes] + [("  compiled in", f"{cost.seconds:.1f} s")]


def _largest(sent: Traffic) -> list[tuple[tuple[str, str], float]]:
    """Bytes sent by kind and axes, the largest first."""
    total: dict[tuple[str, str], float] = {}
    for c in sent.collectives:
        key = c.kind, "+".join(c.axes)
        total[key] = total.get(key, 0.0) + c.wire
    return sorted(total.items(), key=lambda item: -item[1])


def in_bytes(count: int | float) -> str:
    """1234567 → '1.235 MB'."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count:.4g} B"


def in_seconds(seconds: int | float) -> str:
    """0.0123 → '12.3 ms'."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
