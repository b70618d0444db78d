"""Attention of a few new tokens to a cache.

A layer's cache is a few arrays with a row of numbers for each token and key-value head. Scores are
the sum of the products of queries with the rows of one or more arrays of keys. The values are an
array too: absorbed MLA scores latents and rotated keys, and the latents are its values. Plain
attention scores keys, and has separate values.

All rows at once, for accelerators: each product reads the rows once, as they are stored. 8-bit rows
are not multiplied with their scales: a compiler would write a copy of the cache. Scales go to the
scores and to the softmax's weights.

In blocks, for CPUs and TPUs: rows are visited with a running softmax (as in `attention.py`), as
many blocks as the longest sequence has. The cost follows what the cache holds, not its capacity.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.attention import scaled, softmax_step
from dsv3_jax.ops.varying import as_varying


class Stored(NamedTuple):
    """One cached array: B sequences, G key-value heads, S slots, X numbers a row."""

    # [B, G, S, X] float32, bfloat16, int8 or float8_e4m3fn; may end in zeros, that no query reads
    rows: Array
    scales: Array | None  # float32 [B, G, S, 1] of 8-bit rows


def write_rows(stored: Any, new: Any, layer: Int[Array, ""], first: Int[Array, " B"]) -> Any:
    """Overwrite T rows of each sequence in one layer, from slot `first` on; a scatter an array.

    Args:
        stored: arrays [L, B, G, S, X] of L layers, in any structure.
        new: the same with [B, G, T, X], in the dtypes of `stored`.
        layer: which of the layers.
        first: int32, at most S - T.
    Returns: `stored`, updated in place where it is donated or carried by a loop.
    """

    def put(old: Array, new: Array) -> Array:
        batch, groups, count = new.shape[:3]
        # The heads are indexed too: GPUs would first transpose the cache to have them in a window.
        b, g, t = np.ogrid[:batch, :groups, :count]
        place = old.at[
            jnp.asarray(layer, jnp.int32), b, g, first[:, None, None] + t.astype(np.int32)
        ]
        return place.set(new, mode="drop", unique_indices=True, wrap_negative_indices=False)

    return jax.tree.map(put, stored, new)


def cached_attention(
    queries: Sequence[Float[Array, "B G Q _"]],
    keys: Sequence[Stored],
    values: Stored,
    last: Int[Array, "B Q"],
    *,
    scale: float,
) -> Float[Array, "B G Q V"]:
    """Attend to a cache at once: softmax(scale · Σ_i q_i · keys_i of rows 0 … last) values.

    Args:
        queries: for each array of keys, queries of each key-value head.
        keys, values: cached arrays of the layer.
        last: the last row that each query may see; at least 0.
        scale: factor of the scores.
    Returns: V is the width of `values`; in the queries' dtype.

    Example:
        >>> numbers = [5.0, 5.0, 9.0], [1.0, 3.0, 9.0]
        >>> key, value = (Stored(jnp.array(x).reshape(1, 1, 3, 1), None) for x in numbers)
        >>> q, last = jnp.zeros((1, 1, 1, 1)), jnp.array([[1]])
        >>> cached_attention([q], [key], value, last, scale=1.0)  # the mean of 1 and 3
        Array([[[[2.]]]], dtype=float32)
    """
    weights = jax.nn.softmax(_scores(queries, keys, jnp.zeros((), jnp.int32), last, scale), axis=-1)
    return _weighted(weights, values, queries[0].dtype)


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
    """Compute `cached_attention`, `block` rows at a time.

    Args: take_out: a block is copied, where both products then read it: for a TPU, which copies it
        into its own memory.
    """
    (capacity, width), dtype = values.rows.shape[2:], queries[0].dtype
    block = min(block, capacity)
    wide = np.promote_types(dtype, np.float32)

    def visit(i, carry):
        first = i.astype(jnp.int32) * block
        start = jnp.minimum(first, capacity - block)  # the last block overlaps the one before
        some_keys, some_values = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, block, 2), (list(keys), values)
        )
        if take_out:
            some_keys, some_values = jax.lax.optimization_barrier((some_keys, some_values))
        s = _scores(queries, some_keys, first - start, last - start, scale)
        return softmax_step(carry, s, lambda p: _weighted(p, some_values, dtype, wide))

    shape = queries[0].shape[:3]
    # Every query sees row 0, so maxima are finite from the first block on.
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
    width = sum(
        stored.rows.shape[-1] for stored in {id(x.rows): x for x in (*keys, values)}.values()
    )
    batch, groups = values.rows.shape[:2]
    return 1 << (max(numbers // (batch * groups * width), 1).bit_length() - 1)


def _scores(
    queries, keys: Sequence[Stored], first: Array, last: Array, scale: float
) -> Float[Array, "B G Q S"]:
    """Scores of the rows `first` … `last`, -inf for others, in float32 or wider."""
    wide = np.promote_types(queries[0].dtype, np.float32)
    total = 0
    for q, stored in zip(queries, keys, strict=True):
        q = jnp.pad(scaled(q, scale), [(0, 0)] * 3 + [(0, stored.rows.shape[-1] - q.shape[-1])])
        s = jnp.einsum(
            "bgqk,bgsk->bgqs", q, stored.rows.astype(q.dtype), preferred_element_type=wide
        )
        total += s if stored.scales is None else s * stored.scales.astype(wide).swapaxes(2, 3)

    slot = jnp.arange(keys[0].rows.shape[2], dtype=jnp.int32)
    seen = (slot[None, None] <= last[:, :, None]) & (slot >= first)[None, None]
    return jnp.where(seen[:, None], total, -jnp.inf)


def _weighted(weights: Array, values: Stored, dtype: Any, into: Any = None) -> Array:
    """The sum of the values by weights [B, G, Q, S], rounded to `dtype` for the product."""
    if values.scales is not None:
        weights = weights * values.scales.astype(weights.dtype).swapaxes(2, 3)
    rows = values.rows.astype(dtype)
    return jnp.einsum("bgqs,bgsv->bgqv", weights.astype(dtype), rows, preferred_element_type=into)
