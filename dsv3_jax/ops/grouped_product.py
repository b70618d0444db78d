"""Products of sorted rows, each group of rows with its own matrix: y_i = x_i w_{group of i}.

Rows are sorted by group. Group g has `counts[g]` rows, after group g - 1's. A backend has three
functions, the product and its two gradients, because a kernel for one is no kernel for the others:

    forward  y [m, N] = x [m, K] · w [K, N] of each row's group
    dx       x' [m, K] = y' [m, N] · wᵀ
    dw       w' [G, K, N] = xᵀ y' over each group's rows

A backend computes a part of a block more for each group; RAGGED_DOT off TPUs computes all rows once
for each group. Rows after the last group belong to no group. Their results are undefined, and their
inputs must be finite. They cost time all the same in ROW_BLOCKS and in the forward and dx of
Mosaic's kernels, whose dw leaves them out.

    RAGGED_DOT  `jax.lax.ragged_dot`: a grouped kernel on TPU; every group multiplies every row on
                other platforms
    ROW_BLOCKS  a scan over blocks of rows, of static length: runs anywhere at any dtype, one
                product after another
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax.ops.sort_by_expert import sort_by_expert
from dsv3_jax.ops.varying import as_varying, zeros

LARGEST_BLOCK = 512  # rows: beyond it, a product on a GPU's or TPU's matrix unit gains little


@dataclass(frozen=True)
class GroupedProduct:
    """A backend: the product and its gradients."""

    name: str
    forward: Callable[..., Array]  # (x [m, K], w [G, K, N], counts [G]) -> [m, N] in x's dtype
    dx: Callable[..., Array]  # (dy [m, N], w [G, K, N], counts [G]) -> [m, K] in dy's dtype
    # (x [m, K], dy [m, N], counts [G], dtype) -> [G, K, N], accumulated in float32
    dw: Callable[..., Array]
    row_multiple: int = 1  # m must be a multiple of it
    sort: Callable = sort_by_expert  # or what gives the same
    casts: bool = True  # w must have the rows' dtype; False: it is taken in its own


def wide(dtype: Any) -> Any:
    """The dtype of sums: float32, or the dtype if it is wider."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


# XLA's ragged_dot

_FORWARD = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
_DX = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
_DW = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def ragged_dot(x: Array, w: Array, counts: Array) -> Array:
    """`GroupedProduct.forward` by `jax.lax.ragged_dot_general`."""
    return _ragged(x, w, counts, _FORWARD, x.dtype)


def ragged_dot_dx(dy: Array, w: Array, counts: Array) -> Array:
    """`GroupedProduct.dx` likewise."""
    return _ragged(dy, w, counts, _DX, dy.dtype)


def ragged_dot_dw(x: Array, dy: Array, counts: Array, dtype: Any) -> Array:
    """`GroupedProduct.dw` likewise."""
    return _ragged(x, dy, counts, _DW, dtype)


def _ragged(a: Array, b: Array, counts: Array, numbers: Any, dtype: Any) -> Array:
    return jax.lax.ragged_dot_general(a, b, counts, numbers, preferred_element_type=dtype)


RAGGED_DOT = GroupedProduct("ragged_dot", ragged_dot, ragged_dot_dx, ragged_dot_dw)


# A scan over blocks of rows


class RowBlocks(NamedTuple):
    """Blocks of rows, each of one group: as many as are known when the program is compiled.

    A group's last block may reach into the next group's rows. `left` says how many of a block's
    rows are its own. The blocks that are not needed have no rows, and start after the last row.
    """

    group: Array  # int32 [J]
    start: Array  # int32 [J]: first row
    left: Array  # int32 [J]: rows from `start` to the group's end


def row_blocks(counts: Int[Array, " G"], num_rows: int, size: int) -> RowBlocks:
    """Cut each group's rows into blocks of `size` rows."""
    num_groups = counts.shape[0]
    # Σ ceil(count / size) is never larger
    num_blocks = num_rows // size + min(num_groups, num_rows)
    blocks = -(-counts // size)
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    j = jnp.arange(num_blocks, dtype=jnp.int32)
    # The group of each block: how many groups have had all of theirs. A search would loop.
    group = jnp.minimum((ends[None] <= j[:, None]).sum(axis=1, dtype=jnp.int32), num_groups - 1)
    before = (j - (ends - blocks)[group]) * size
    needed = j < ends[-1]
    start = jnp.where(needed, starts[group] + before, num_rows)
    return RowBlocks(group, start, jnp.where(needed, counts[group] - before, 0))


def block_size(num_rows: int, num_groups: int) -> int:
    """Rows of a block: a power of two near a group's mean rows, from 16 to LARGEST_BLOCK.

    At most about as many rows are then computed in vain as there are.
    """
    mean = max(num_rows // num_groups, 1)
    return min(max(1 << (mean - 1).bit_length(), 16), LARGEST_BLOCK)


def row_blocks_product(x: Array, w: Array, counts: Array) -> Array:
    """`GroupedProduct.forward` by a scan over blocks: each overwrites the excess of the last."""
    return _over_blocks(x, w, counts, w.shape[2], lambda rows, one: rows @ one)


def row_blocks_dx(dy: Array, w: Array, counts: Array) -> Array:
    """`GroupedProduct.dx` likewise."""
    return _over_blocks(dy, w, counts, w.shape[1], lambda rows, one: rows @ one.T)


def _over_blocks(rows: Array, w: Array, counts: Array, width: int, product: Callable) -> Array:
    m = rows.shape[0]
    size = block_size(rows.shape[0], counts.shape[0])
    padded = jnp.pad(rows, ((0, size), (0, 0)))

    def visit(out, block):
        group, start, _ = block
        one = jax.lax.dynamic_index_in_dim(w, group, 0, keepdims=False)
        y = product(jax.lax.dynamic_slice_in_dim(padded, start, size, 0), one)
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0), None

    start = zeros((m + size, width), rows, w, counts)
    return jax.lax.scan(visit, start, row_blocks(counts, m, size))[0][:m]


def row_blocks_dw(x: Array, dy: Array, counts: Array, dtype: Any) -> Array:
    """`GroupedProduct.dw` by blocks of rows; the blocks of a group are added up in order."""
    m = x.shape[0]
    size = block_size(x.shape[0], counts.shape[0])
    x, dy = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, dy))

    def visit(dw, block):
        group, start, left = block
        own = (jnp.arange(size, dtype=jnp.int32) < left)[:, None]
        x_b, dy_b = (jax.lax.dynamic_slice_in_dim(a, start, size, 0) for a in (x, dy))
        part = jnp.dot(jnp.where(own, x_b, 0).T, dy_b, preferred_element_type=dw.dtype)
        before = jax.lax.dynamic_index_in_dim(dw, group, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw, before + part, group, 0), None

    start = as_varying(
        jnp.zeros((counts.shape[0], x.shape[1], dy.shape[1]), wide(dtype)), x, dy, counts
    )
    return jax.lax.scan(visit, start, row_blocks(counts, m, size))[0].astype(dtype)


ROW_BLOCKS = GroupedProduct("row_blocks", row_blocks_product, row_blocks_dx, row_blocks_dw)
