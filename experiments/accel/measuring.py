"""What a part yields, and how it times a call and each implementation of an op.

A part is a generator: it yields a line on what it does next, or a `Figure`. Rates count useful work
alone: an implementation that computes every expert for every token gets no credit for it.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from dsv3_jax.config import ConfigError, Execution
from dsv3_jax.kernels import choose, table
from experiments.apart import sentence

BFLOAT16 = Execution(compute_dtype="bfloat16")
MOST_BYTES = 4 << 30
RAN: dict[str, str] = {}


@dataclass(frozen=True)
class Figure:
    """One figure, or why there is none."""

    name: str
    value: float | None
    unit: str = ""  # FLOP/s, B/s, s, B, tokens/s, or what is counted
    against: str = ""  # the bound that the value is divided by: see BOUNDS in table.py
    bound: str = ""  # the bound that this figure is
    bar: str = ""  # the bar that it must reach: see BARS in table.py
    ran: dict[str, str] = field(default_factory=dict)  # the implementation of each op that was used
    note: str = ""
    why: str = ""  # why there is no value


Part = Iterator[Figure | str]


class Recorder(choose.Kernels):
    """Kernels that note in RAN which implementation of each op was picked."""

    def pick(self, op: str, *arrays: Any, **settings: Any) -> table.Implementation:
        row = super().pick(op, *arrays, **settings)
        RAN[op] = row.name
        return row


def kernels_for(
    dtype: str = "bfloat16", kernels: str = "auto", precision: Any = "none"
) -> Recorder:
    """The kernels of the default device. Raises: ConfigError where they cannot run."""
    found = choose.prepare(Execution(compute_dtype=dtype, kernels=kernels, precision=precision))
    return Recorder(found.target, found.missing, found.wrong)


def ran() -> dict[str, str]:
    """Return what was picked since the last call."""
    found = dict(RAN)
    RAN.clear()
    return found


def longest() -> float:
    """Return the seconds that one timing may take, if that is more than one call."""
    return 0.02 if choose.platform_of() == "cpu" else 1.0


def seconds_of(call: Callable[[], Any], samples: int = 5) -> float:
    """Time a call: the median of several samples, after a call to compile and one to warm up.

    The calls of a sample are queued and awaited together, so the time to start one counts only
    where the device waits for it.
    """

    def sample(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            out = call()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / count

    sample(1)
    once = sample(1)
    seconds = longest()
    count = max(1, min(200, round(seconds / samples / max(once, 1e-7))))
    # a slow one: no more than two samples
    return statistics.median(sample(count) for _ in range(2 if once > seconds else samples))


def timed(name: str, call: Callable[[], Any], work: float = 0, **figure: Any) -> Part:
    """Time a call: its rate if it does so much work, else its seconds; what ran is noted."""
    yield name
    took = seconds_of(call)
    value, unit = (work / took, "FLOP/s") if work else (took, "s")
    yield Figure(name, value, **({"unit": unit, "ran": ran()} | figure))


def both_ways(
    title: str,
    run: Callable,
    args: Sequence[Any],
    dy: Any = None,
    flops: tuple[float, float] = (0, 0),
    bars: tuple[str, str] = ("", ""),
    **figure: Any,
) -> Part:
    """Time `run(*args)` and, if `dy` is the result's gradient, with the gradients of all of `args`.

    Args: flops, bars: of the two.
    """
    forward = jax.jit(run)
    yield from timed(f"{title}, forward", lambda: forward(*args), flops[0], bar=bars[0], **figure)
    if dy is None:
        return

    @jax.jit
    def both(dy: Any, *args: Any) -> Any:
        y, pull_back = jax.vjp(run, *args)
        return y, pull_back(dy)

    name = f"{title}, forward and backward"
    yield from timed(name, lambda: both(dy, *args), flops[1], bar=bars[1], **figure)


def by_backend(
    op: str,
    label: str,
    run: Callable,
    args: Sequence[Any],
    measure: Callable[[str, Callable, bool], Part],
    operands: Mapping[str, int] | None = None,
) -> Part:
    """Measure each implementation of an op that this platform has.

    Args:
        run: calls the op with kernels and `args`. It is traced to see what "auto" chooses.
        measure: gets a title, `run` with an implementation's kernels, and whether "auto" chooses
            it.
        operands: bytes that an implementation makes of its operands, if it is no kernel. Those over
            MOST_BYTES are left out: they would compile for long, and then not run.
    """
    ran()
    # What was picked is noted; measuring it says what is wrong.
    with contextlib.suppress(Exception):
        jax.eval_shape(partial(run, kernels_for()), *args)
    chosen, here = ran().get(op), choose.platform_of()
    for name in dict.fromkeys(row.name for row in table.TABLE[op] if here in row.platforms):
        title = f"{label}, {name}{' (chosen)' if name == chosen else ''}"
        needed = 0 if here == "tpu" and name == "ragged_dot" else (operands or {}).get(name, 0)
        if needed > MOST_BYTES:
            why = f"not available here: it would make an operand of {needed / 1e9:.0f} GB"
            yield Figure(title, None, why=why)
            continue

        def begin(name: str = name, title: str = title) -> Part:
            kernels = kernels_for(kernels=f"{op}={name}")
            return measure(title, partial(run, kernels), name == chosen)

        for found in or_why(title, begin):
            if isinstance(found, Figure) and (other := found.ran.get(op, name)) != name:
                why = f"not available here: it does not fit these shapes, and {other} ran instead"
                found = dataclasses.replace(found, value=None, why=why)
            yield found


def or_why(title: str, begin: Callable[[], Part]) -> Part:
    """Begin a part, and yield what it yields; one that fails says why, and the others go on."""
    ran()  # one that failed before left its picks
    try:
        yield from begin()
    except ConfigError as error:
        yield Figure(title, None, why=f"not available here: {sentence(error).split('; use ')[0]}")
    except Exception as error:  # of a compiler or a library: any type
        yield Figure(title, None, why=f"failed: {sentence(error)}")
