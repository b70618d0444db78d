"""Attention to a cache in blocks of rows, as many as the longest sequence has.

The cost follows what the cache holds, not its capacity. CPUs and TPUs have a loop that ends early.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.attention import softmax_step
from dsv3_jax.ops.cached_attention import Stored, masked_scores, weighted_sum
from dsv3_jax.ops.dtypes import sum_dtype
from dsv3_jax.ops.varying import as_varying


def cached_attention_in_blocks(
    queries: Sequence[Float[Array, "B G Q _"]],
    keys: Sequence[Stored],
    values: Stored,
    last: Int[Array, "B Q"],
    *,
    scale: float,
    block: int,
    take_out: bool = False,
) -> Float[Array, "B G Q V"]:
    """Compute `ops.cached_attention.cached_attention`, `block` rows at a time.

    A running softmax puts the blocks together, as in `ops.attention`.

    Args: take_out: a block is copied, where both products then read it: for a TPU, which copies it
        into its own memory.
    """
    capacity, width = values.rows.shape[2:]
    dtype = queries[0].dtype
    wide = sum_dtype(dtype)
    block = min(block, capacity)

    def visit(i, carry):
        # The last block overlaps the one before it: there its first rows do not count.
        first = i.astype(jnp.int32) * block
        start = jnp.minimum(first, capacity - block)

        def cut(stored):
            return jax.lax.dynamic_slice_in_dim(stored, start, block, 2)

        some_keys, some_values = jax.tree.map(cut, (list(keys), values))
        if take_out:
            some_keys, some_values = jax.lax.optimization_barrier((some_keys, some_values))

        s = masked_scores(queries, some_keys, first - start, last - start, scale)
        return softmax_step(carry, s, lambda p: weighted_sum(p, some_values, dtype, wide))

    # Every query sees row 0, so maxima are finite from the first block on.
    shape = queries[0].shape[:3]
    carry = (
        jnp.zeros((*shape, width), wide),
        jnp.full(shape, -jnp.inf, wide),
        jnp.zeros(shape, wide),
    )
    carry = tuple(as_varying(x, queries[0], values.rows) for x in carry)
    out, _, total = jax.lax.fori_loop(0, last.max() // block + 1, visit, carry)
    return (out / total[..., None]).astype(dtype)


def block_rows(keys: Sequence[Stored], values: Stored, numbers: int) -> int:
    """Rows of a block of at most so many numbers, of all arrays and sequences: a power of two."""
    batch, groups = values.rows.shape[:2]
    # The values may be one of the keys' arrays, and are then read once.
    arrays = {id(stored.rows): stored.rows for stored in (*keys, values)}
    width = sum(rows.shape[-1] for rows in arrays.values())
    rows = max(numbers // (batch * groups * width), 1)
    return 1 << (rows.bit_length() - 1)
