"""Attention of a few new tokens to a cache.

A layer's cache is a few arrays with a row of numbers for each token and key-value head. Scores are
the sum of the products of queries with the rows of one or more arrays of keys. The values are an
array too: absorbed MLA scores latents and rotated keys, and the latents are its values. Plain
attention scores keys, and has separate values.

Each product reads all rows once, as they are stored. 8-bit rows are not multiplied with their
scales: a compiler would write a copy of the cache. Scales go to the scores and to the softmax's
weights.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.attention import scaled
from dsv3_jax.ops.dtypes import sum_dtype


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
        slot = first[:, None, None] + t.astype(np.int32)
        place = old.at[jnp.asarray(layer, jnp.int32), b, g, slot]
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
        queries: for each array of keys, the Q queries of each of G key-value heads: those of its
            query heads, for each new token.
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
    first = jnp.zeros((), jnp.int32)
    scores_BGQS = masked_scores(queries, keys, first, last, scale)
    return weighted_sum(jax.nn.softmax(scores_BGQS, axis=-1), values, queries[0].dtype)


def masked_scores(
    queries: Sequence[Float[Array, "B G Q _"]],
    keys: Sequence[Stored],
    first: Int[Array, ""],
    last: Int[Array, "B Q"],
    scale: float,
) -> Float[Array, "B G Q S"]:
    """Compute the scores of the rows `first` … `last`, -inf for others, in float32 or wider."""
    wide = sum_dtype(queries[0].dtype)
    total = 0
    for q, stored in zip(queries, keys, strict=True):
        # Rows may be wider than queries, and then end in zeros.
        excess = stored.rows.shape[-1] - q.shape[-1]
        q = jnp.pad(scaled(q, scale), [(0, 0), (0, 0), (0, 0), (0, excess)])
        rows = stored.rows.astype(q.dtype)
        scores = jnp.einsum("bgqk,bgsk->bgqs", q, rows, preferred_element_type=wide)
        if stored.scales is not None:
            scores = scores * stored.scales.astype(wide).swapaxes(2, 3)
        total += scores

    slot = jnp.arange(keys[0].rows.shape[2], dtype=jnp.int32)
    seen_BQS = (slot[None, None] <= last[:, :, None]) & (slot >= first)[None, None]
    return jnp.where(seen_BQS[:, None], total, -jnp.inf)


def weighted_sum(
    weights: Float[Array, "B G Q S"], values: Stored, dtype: Any, into: Any = None
) -> Float[Array, "B G Q V"]:
    """Add up the values by weights, which are rounded to `dtype` for the product.

    Args: into: the dtype of the sums. None means `dtype`.
    """
    if values.scales is not None:
        weights = weights * values.scales.astype(weights.dtype).swapaxes(2, 3)
    rows = values.rows.astype(dtype)
    return jnp.einsum("bgqs,bgsv->bgqv", weights.astype(dtype), rows, preferred_element_type=into)
