"""Compare each implementation that a device may use with plain XLA in float32, gradients too.

An error counts relative to what it is an error of: one expert, one head, one token. A largest error
over all of them would hide a small expert that is wrong. Two measures see different faults, each
with its bound by dtype:

    factor  how far from 1 the factor is by which the numbers differ from the right ones, in the
            mean
    peak    the largest error over the largest number: a wrong or missing part, which leaves the
            mean as it is
"""

import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.kernels.cases import CASES, Case, Draw
from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.kernels.table import IN_FLOAT32, TABLE, Implementation

# (factor, peak), see above
BOUNDS = {"float32": (2e-5, 2e-4), "bfloat16": (7e-3, 4e-2), "8 bits": (6e-2, 0.25)}
# The axes that number the groups of an op's results, or of an argument's gradient.
HEADS = {
    "causal_attention": (0, 2),
    "cached_attention": (0, 1, 2),
    "q": (0, 2),
    "k": (0, 2),
    "v": (0, 2),
}


class Verdict(NamedTuple):
    """The result of one implementation in one case."""

    name: str  # see `Implementation.of`
    share: float  # the largest error, over its bound
    wrong: str  # what is wrong; "" if nothing is


def check(
    kernels: Kernels,
    *,
    large: bool,
    precisions: Iterable[str] = ("none",),
    ops: Iterable[str] = TABLE,
    also: Iterable[str] = (),
    names: Collection[str] | None = None,
    trying: Callable[[str], None] = lambda name: None,
) -> Iterator[Verdict]:
    """Check the implementations that "auto" may choose for a target, on JAX's default device.

    Args:
        large: at a model's shapes too.
        precisions: of `Execution`; a recipe of 8 bits is checked in one case of each op.
        also: names of implementations that run only if they are named.
        names: the implementations to check, as `Implementation.of` names them. None means all.
        trying: is called with an implementation's name before it runs.
    """
    for op, precision, dtype, found in rows_by_op(
        kernels, precisions=precisions, ops=ops, also=also
    ):
        rows = [row for row in found if names is None or row.of(op) in names]
        draw = Draw(jnp.dtype(dtype), np.random.default_rng(0))
        cases = CASES[op](draw, large and precision == "none")
        for case in itertools.islice(cases, (None if precision == "none" else 1) if rows else 0):
            yield from _check_case(
                op, rows, reference_of(op, precision), case, draw, precision, trying
            )


def rows_by_op(
    kernels: Kernels,
    *,
    precisions: Iterable[str] = ("none",),
    ops: Iterable[str] = TABLE,
    also: Iterable[str] = (),
) -> Iterator[tuple[str, str, str, list[Implementation]]]:
    """What `check` checks. Yields: (op, precision, dtype, implementations)."""
    for op, precision in itertools.product(ops, dict.fromkeys(precisions)):
        if precision not in {row.precision for row in TABLE[op]}:
            continue
        reference = reference_of(op, precision)
        target = replace(kernels.target, precision=precision)
        named = [row for row in target.here(op) if row.name in also]
        dtype = "float32" if op in IN_FLOAT32 or target.platform == "cpu" else "bfloat16"
        rows = [row for row in (*target.rows(op), *named) if row.name not in dict(kernels.missing)]
        rows = [
            row
            for row in rows
            if row.serves(dtype, 1) and (row.run, dtype) != (reference, "float32")
        ]
        yield op, precision, dtype, rows


def reference_of(op: str, precision: str) -> Callable[..., Any]:
    """Plain XLA's function of an op. For a recipe it is the one that rounds float32 numbers."""
    names = ("dense", "xla") if precision == "none" else (precision,)
    rows = TABLE["grouped_swiglu" if op == "decode_experts" else op]
    return [row.run for row in rows if row.name in names and row.precision == precision][-1]


def _check_case(
    op: str,
    rows: list[Implementation],
    reference: Callable[..., Any],
    case: Case,
    draw: Draw,
    precision: str,
    trying: Callable[[str], None] = lambda name: None,
) -> Iterator[Verdict]:
    settings = dict(case.settings)
    args, arrays = jax.device_put((case.args, case.arrays))
    shapes = jax.eval_shape(partial(reference, **settings), *args, **arrays)
    d_out = jax.tree.map(lambda y: jnp.asarray(draw(*y.shape), y.dtype), shapes)

    # The right numbers: plain XLA's, in float32 without shortcuts.
    widened = jax.tree.map(_in_float32, (args, arrays, d_out))
    with jax.default_matmul_precision("highest"):
        want = program(reference, case.wrt, case.settings)(*widened)

    # Their names: the results, then the gradients.
    parameters = list(inspect.signature(reference).parameters)
    of_gradients = tuple(parameters[i] for i in case.wrt)
    of_results = len(jax.tree.leaves(want)) - len(case.wrt)
    names = (op,) * of_results + of_gradients

    # Between two products of 8-bit numbers bfloat16 rounds once more, and may change the second
    # one's operands.
    exact = precision == "none" or op in ("product", "expand")
    bounds = BOUNDS[draw.dtype.name if exact else "8 bits"]

    for row in rows:
        if row.fits is not None and not row.fits(*args, **arrays, **settings):
            continue

        jax.block_until_ready(want)  # else its time would count as the implementation's
        trying(row.of(op))
        try:
            found = program(row.run, case.wrt, case.settings)(args, arrays, d_out)
            errors = _errors(names, found, want)
            share, wrong = _judge(names, jax.device_get(errors), bounds)
        except Exception as error:  # of a compiler or a library: any type
            share = np.inf
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

        yield Verdict(row.of(op), share, wrong and f"{wrong} ({case.label})")
        if share == np.inf:
            # raises if the device was lost: others are not to blame
            jax.block_until_ready(jnp.zeros(()))


def _in_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


@cache
def program(
    run: Callable[..., Any], wrt: tuple[int, ...], settings: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    """Compile a function (arguments, arguments by name, results' gradient) → (results, gradients).

    Results are there twice, alone and as a gradient's forward pass has them, because kernels then
    differ.
    """

    def call(args: tuple, arrays: dict[str, Any], d_out: Any) -> tuple[Any, ...]:
        def of(*moving: Any) -> Any:
            chosen = dict(zip(wrt, moving, strict=True))
            return run(*(chosen.get(i, x) for i, x in enumerate(args)), **arrays, **dict(settings))

        moving = [args[i] for i in wrt]
        if not wrt:
            return (of(),)
        again, pull_back = jax.vjp(of, *moving)
        return of(*moving), again, pull_back(d_out)

    return jax.jit(call)


@partial(jax.jit, static_argnums=0)
def _errors(names: tuple[str, ...], found: Any, want: Any) -> list[tuple[jax.Array, ...]]:
    """(Of the factor, of the peak) of each array's groups. A group of zeros must be zeros."""

    def measure(name: str, found: jax.Array, want: jax.Array) -> tuple[jax.Array, ...]:
        want = want.astype(jnp.float32)
        off = found.astype(jnp.float32) - want

        # Tokens and their gradients by token, stacks of matrices by matrix, others at once.
        of_tokens = name in (names[0], "x", "h")
        own = (0,) if of_tokens or want.ndim != 2 else ()
        own = HEADS.get(name, own)
        axes = tuple(i for i in range(want.ndim) if i not in own)

        # The factor by which all numbers are off together.
        factor = _share(jnp.abs((off * want).sum(axes)), jnp.square(want).sum(axes))
        # The number that is off most.
        peak = _share(jnp.abs(off).max(axes), jnp.abs(want).max(axes))
        return factor, peak

    arrays = zip(names, jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
    return [measure(*array) for array in arrays]


def _share(error: jax.Array, size: jax.Array) -> jax.Array:
    return jnp.where(error == 0, 0, error / size)


def _judge(names: tuple[str, ...], errors: list, bounds: tuple[float, float]) -> tuple[float, str]:
    """(The largest error over its bound, what is wrong). An error that is no number is infinite."""
    worst = 0.0, ""
    for name, shares in zip(names, errors, strict=True):
        for measure, share, bound in zip(("factor", "peak"), shares, bounds, strict=True):
            share = np.where(np.isfinite(share), share, np.inf)
            at = np.unravel_index(share.argmax(), share.shape)
            what = f"{'' if name == names[0] else 'gradient of '}{name}{[int(i) for i in at] or ''}"
            sentence = f"{what} is {share[at]:.2%} off by {measure}"
            worst = max(worst, (float(share[at]) / bound, sentence))
    return worst[0], worst[1] if worst[0] > 1 else ""
