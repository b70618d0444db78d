"""Grouped products on TPU: XLA's `ragged_dot`, a grouped kernel there, and megablox of JAX's wheel.

    RAGGED_DOT  XLA's forward, dx and dw; for dx XLA first writes the experts out transposed
    MEGABLOX    XLA's forward and dw, and megablox's dx, which reads the experts as they are

The compiler (libtpu) chooses the tiles of `ragged_dot` itself: the whole contracted size, few
columns, and as many rows as VMEM holds on the chip. A tiling that is set here would have to know
the chip.
"""

import importlib
from dataclasses import replace
from typing import Any

from jaxtyping import Array

from dsv3_jax.ops import grouped_product

ROWS = 128  # of a tile; libtpu refuses a number of rows that its tiles do not divide
LANES = 128  # columns of a register
VMEM = 12 << 20  # bytes for a megablox tile: 16 MB is the limit on v5p, and 32 MB on v6e


def tiles(k: int, n: int) -> tuple[int, int, int]:
    """The tile (rows, contracted, columns) of a product [m, k] x [k, n] in bfloat16.

    Tiles of this form were the fastest in the timings that tokamax ships for v5p and v6e.

    >>> tiles(7168, 4096), tiles(1408, 2048)
    ((128, 7168, 256), (128, 1408, 1024))
    """
    contracted = k if k <= 8192 else _divisor(k, 8192)
    rows = 4 * ROWS * contracted  # bytes of x
    columns = 4 * contracted + 8 * ROWS  # bytes of w and y for each column
    return ROWS, contracted, _divisor(n, (VMEM - rows) // columns)


def _divisor(size: int, limit: int) -> int:
    """The largest multiple of LANES up to `limit` that divides size; else min(LANES, size)."""
    whole = (d for d in range(limit - limit % LANES, 0, -LANES) if size % d == 0)
    return next(whole, min(size, LANES))


RAGGED_DOT = replace(grouped_product.RAGGED_DOT, row_multiple=ROWS)


def megablox_dx(dy: Array, w: Array, counts: Array) -> Array:
    """`GroupedProduct.dx` by megablox."""
    return _megablox().gmm(
        dy, w, counts, dy.dtype, tiles(dy.shape[1], w.shape[1]), transpose_rhs=True
    )


def _megablox() -> Any:
    """The module; its package has a function of the same name."""
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


MEGABLOX = replace(RAGGED_DOT, name="megablox", dx=megablox_dx)


def fits(
    x: Array, expert_ids: Array, gates: Array, w_gate: Array, *others: Array, **settings
) -> bool:
    """Whether both widths of the experts are multiples of a register's columns."""
    return all(size % LANES == 0 for size in w_gate.shape[-2:])
