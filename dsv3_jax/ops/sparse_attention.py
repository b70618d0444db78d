"""Attention of each query to its own chosen tokens: softmax over k of S tokens, O(T k) products.

Expanded, each head has its own keys and values. Absorbed, all heads read the same rows [c_kv,
k_rope], see `mla.py`, and a query gathers k rows for all its heads. That is how sparse MLA trains,
prefills and decodes: gathering expanded rows would move H (N + R + V) / (C + R) times as many
numbers, 71 times in V3.
Source: DeepSeek-V3.2 report, section 2.1 ("instantiate DSA under MLA").
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.attention import MAX_SCORES
from dsv3_jax.ops.cached_attention import Stored, cached_attention
from dsv3_jax.ops.indexer import by_query


def sparse_attention(
    queries: Sequence[Float[Array, "B T G Q _"]],
    keys: Sequence[Stored],
    values: Stored,
    ids: Int[Array, "B T k"],
    *,
    scale: float,
    most: int = MAX_SCORES,
    attend: Callable[..., Array] = cached_attention,
) -> Float[Array, "B T G Q V"]:
    """Attend to chosen tokens: softmax(scale · Σ_i q_i · keys_i) values over ids, in float32.

    Args:
        queries: for each array of keys, Q queries of each of G key-value heads.
        keys, values: arrays [B, G, S, …] with a row for each token, cached or of the same text.
        ids: from `indexer.index_choose`; a query's first is not -1.
        scale: factor of the scores.
        most: numbers that are gathered or scored at a time.
        attend: computes `cached_attention` of the chosen rows.
    Returns: V is the width of `values`; in the queries' dtype.

    Example:
        >>> numbers = [5.0, 9.0, 5.0], [1.0, 9.0, 3.0]
        >>> key, value = (Stored(jnp.array(x).reshape(1, 1, 3, 1), None) for x in numbers)
        >>> q, ids = jnp.zeros((1, 1, 1, 1, 1)), jnp.array([[[2, 0, -1]]])
        >>> sparse_attention([q], [key], value, ids, scale=1.0).item()  # mean of 1 and 3
        2.0
    """
    batch, _, groups, each, _ = queries[0].shape

    def one(queries: list[Array], ids: Array) -> Array:
        # Gather the rows that this query chose.
        place = jnp.maximum(ids, 0)[:, None, :, None]
        take = partial(jnp.take_along_axis, indices=place, axis=2, mode="promise_in_bounds")
        some_keys, some_values = jax.tree.map(take, (list(keys), values))

        # It sees those before the first -1.
        count = (ids >= 0).sum(-1, keepdims=True, dtype=jnp.int32)
        last = jnp.broadcast_to(count - 1, (batch, each))
        return attend(queries, some_keys, some_values, last, scale=scale)

    # Numbers that one query a sequence gathers, or scores.
    width = max(each, sum(stored.rows.shape[-1] for stored in keys))
    held = batch * groups * ids.shape[2] * width
    return by_query(one, most // held, list(queries), ids)
