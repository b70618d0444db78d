"""Grouped products by a scan over blocks of rows: anywhere, at any dtype, one after another.

A backend of `ops.grouped_product`. The number of blocks is known when the program is compiled, and
their rows are not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax.ops.dtypes import sum_dtype
from dsv3_jax.ops.grouped_product import GroupedProduct
from dsv3_jax.ops.varying import as_varying, zeros

LARGEST_BLOCK = 512  # rows: beyond it, a product on a GPU's or TPU's matrix unit gains little


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
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    blocks = -(-counts // size)
    ends = jnp.cumsum(blocks, dtype=jnp.int32)

    # Σ ceil(count / size) is never larger than this number of blocks.
    num_blocks = num_rows // size + min(num_groups, num_rows)
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
    return _over_blocks(x, w, counts, w.shape[2], lambda rows, own: rows @ own)


def row_blocks_dx(dy: Array, w: Array, counts: Array) -> Array:
    """`GroupedProduct.dx` likewise."""
    return _over_blocks(dy, w, counts, w.shape[1], lambda rows, own: rows @ own.T)


def _over_blocks(rows: Array, w: Array, counts: Array, width: int, product: Callable) -> Array:
    m = rows.shape[0]
    size = block_size(m, counts.shape[0])
    # so that the last group's last block may reach beyond the rows
    padded = jnp.pad(rows, ((0, size), (0, 0)))

    def visit(out, block):
        group, start, _ = block
        own = jax.lax.dynamic_index_in_dim(w, group, 0, keepdims=False)
        y = product(jax.lax.dynamic_slice_in_dim(padded, start, size, 0), own)
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0), None

    out = zeros((m + size, width), rows, w, counts)
    out, _ = jax.lax.scan(visit, out, row_blocks(counts, m, size))
    return out[:m]


def row_blocks_dw(x: Array, dy: Array, counts: Array, dtype: Any) -> Array:
    """`GroupedProduct.dw` by blocks of rows; the blocks of a group are added up in order."""
    m = x.shape[0]
    num_groups = counts.shape[0]
    size = block_size(m, num_groups)
    x, dy = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, dy))

    def visit(dw, block):
        group, start, left = block
        x_rows, dy_rows = (jax.lax.dynamic_slice_in_dim(a, start, size, 0) for a in (x, dy))

        # Rows of the next group add nothing.
        own = (jnp.arange(size, dtype=jnp.int32) < left)[:, None]
        own_rows = jnp.where(own, x_rows, 0)
        part = jnp.dot(own_rows.T, dy_rows, preferred_element_type=dw.dtype)

        before = jax.lax.dynamic_index_in_dim(dw, group, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw, before + part, group, 0), None

    dw = jnp.zeros((num_groups, x.shape[1], dy.shape[1]), sum_dtype(dtype))
    dw = as_varying(dw, x, dy, counts)
    dw, _ = jax.lax.scan(visit, dw, row_blocks(counts, m, size))
    return dw.astype(dtype)


ROW_BLOCKS = GroupedProduct("row_blocks", row_blocks_product, row_blocks_dx, row_blocks_dw)
