"""Shapes and figures of the parts, and how they time a call and each implementation of an op.

A part is a generator: it yields a line on what it does next, or a `Figure`. Rates count useful work
alone: an implementation that computes every expert for every token gets no credit for it.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from dsv3_jax.config import ConfigError, Execution, ModelConfig, replace
from dsv3_jax.kernels import choose, table
from dsv3_jax.presets import preset
from experiments.apart import sentence

# Shapes that the parts measure: full ones for a GPU or TPU, and toy ones for a CPU.
V3, LITE, MINI = preset("v3"), preset("v2_lite"), preset("mini")
WIDE = replace(V3, num_layers=1, num_dense_layers=0, num_experts=32, mtp_depth=0)


@dataclass(frozen=True)
class Sizes:
    """Shapes of all parts, for a device with 80 GB or more; smaller ones skip what does not fit.

    B batch, T length, H heads, K and V widths of a head's keys and values.
    """

    gemm: int = 8192  # rows of a square matrix
    copied: int = 1 << 28  # numbers of an array in float32
    wide: ModelConfig = WIDE  # of the MoE layer
    layer_batch: tuple[int, int] = (4, 4096)  # B, T
    # name → model, tokens; the first one is measured first
    grouped: dict[str, tuple[ModelConfig, int]] = field(
        default_factory=lambda: {
            "V3, 32 experts": (WIDE, 8192), "V2-Lite": (LITE, 8192), "mini": (MINI, 4096)
        }
    )  # fmt: skip
    few_rows: tuple[int, ...] = (8, 16, 32, 64)  # tokens; of the model of `decode`
    attention: tuple[int, int, int, int, int] = (2, 4096, 128, 192, 128)  # B, T, H, K, V
    documents: int = 4  # packed in a row of it
    loss: tuple[int, int, int] = (8192, V3.dim, V3.vocab_size)  # tokens, width, vocabulary
    # tokens, and both widths of a weight
    eight_bits: tuple[int, int, int] = (8192, V3.dim, 2 * V3.expert_dim)
    step: ModelConfig = replace(LITE, num_layers=4)
    step_batch: tuple[int, int] = (8, 4096)  # B, T
    decode: ModelConfig = LITE
    decode_bar: int = 64  # the batch whose bar is held; it is measured first
    decode_batches: tuple[int, ...] = (1, 32, 128)  # others
    context: int = 4096  # cached tokens of each sequence
    decode_steps: int = 32
    drafts: ModelConfig = replace(LITE, mtp_depth=1)
    draft_batches: tuple[int, ...] = (1, 32)
    draft_prompt: int = 1024
    draft_tokens: int = 64
    exact: ModelConfig = replace(MINI, num_layers=2, mtp_depth=1)
    exact_tokens: int = 64
    seconds: float = 1.0  # that one timing may take, at least one call


_HEADED = replace(
    preset("tiny"), num_layers=1, num_dense_layers=0, num_experts=8, experts_per_token=2,
    num_groups=2, groups_per_token=1,
)  # fmt: skip
_PLAIN = replace(_HEADED, mtp_depth=0)

# A CPU runs every part within a minute: this only shows that the parts work.
TOY = Sizes(
    gemm=128, copied=1 << 16, wide=_PLAIN, layer_batch=(2, 64),
    grouped={"tiny": (_PLAIN, 64), "tiny, fewer tokens": (_PLAIN, 32)}, few_rows=(4,),
    attention=(1, 64, 2, 24, 16), documents=2, loss=(64, 32, 100), eight_bits=(128, 128, 128),
    step=_HEADED, step_batch=(2, 32), decode=_PLAIN, decode_bar=2, decode_batches=(1,),
    context=32, decode_steps=4, drafts=_HEADED, draft_batches=(3,), draft_prompt=30,
    draft_tokens=12, exact=_HEADED, exact_tokens=12, seconds=0.02,
)  # fmt: skip


# Figures

BFLOAT16 = Execution(compute_dtype="bfloat16")
MOST_BYTES = 4 << 30


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
RAN: dict[str, str] = {}


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


def seconds_of(call: Callable[[], Any], seconds: float, samples: int = 5) -> float:
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
    count = max(1, min(200, round(seconds / samples / max(once, 1e-7))))
    # a slow one: no more than two samples
    return statistics.median(sample(count) for _ in range(2 if once > seconds else samples))


def rate(
    name: str,
    work: float,
    call: Callable[[], Any],
    sizes: Sizes,
    *,
    unit: str = "FLOP/s",
    **figure: Any,
) -> Part:
    """Time a call that does so much work: its rate, and the implementations that ran."""
    yield name
    took = seconds_of(call, sizes.seconds)
    yield Figure(name, work / took, unit, ran=ran(), **figure)


def by_backend(
    op: str,
    label: str,
    call: Callable[[Recorder], Any],
    measure: Callable[[Recorder, str, bool], Part],
    operands: dict[str, int] | None = None,
) -> Part:
    """Measure each implementation of an op that this platform has.

    Args:
        call: calls the op; it is traced only, to see what "auto" chooses.
        measure: gets kernels, the label to use, and whether "auto" chooses these kernels.
        operands: bytes that an implementation makes of its operands, if it is no kernel. Those over
            MOST_BYTES are left out: they would compile for long, and then not run.
    """
    ran()
    # What was picked is noted; measuring it says what is wrong.
    with contextlib.suppress(Exception):
        jax.eval_shape(partial(call, kernels_for()))
    chosen, here = ran().get(op), choose.platform_of()
    for name in dict.fromkeys(row.name for row in table.TABLE[op] if here in row.platforms):
        title = f"{label}, {name}{' (chosen)' if name == chosen else ''}"
        needed = 0 if here == "tpu" and name == "ragged_dot" else (operands or {}).get(name, 0)
        if needed > MOST_BYTES:
            why = f"not available here: it would make an operand of {needed / 1e9:.0f} GB"
            yield Figure(title, None, why=why)
            continue

        def begin(name: str = name, title: str = title) -> Part:
            return measure(kernels_for(kernels=f"{op}={name}"), title, name == chosen)

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
