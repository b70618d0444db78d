"""Attention of a few new tokens to a cache.

A layer's cache is a row of numbers for each token and key-value head, in two parts. A latent row [c_kv, k_rope] is
shared by all heads: the whole row is the key, and its first part is the value. Absorbed MLA is therefore multi-query
attention over one latent head. In an expanded row the first part is the key and the second the value.

All rows at once, for accelerators: two batched products read each row once each, as it is stored. A row is never cut
before a product, and 8-bit rows are not multiplied with their scales: a compiler would write a copy of the cache.
Scales go to the scores and to the softmax's weights instead.

In blocks, for the CPU: rows are visited with a running softmax (as in `attention.py`), as many blocks as the longest
sequence has. The cost follows what the cache holds, not its capacity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.attention import scaled
from dsv3_jax.ops.quantize import dequantize_rows
from dsv3_jax.ops.varying import as_varying


class Stored(NamedTuple):
    """Cached rows of all layers: L layers, B sequences, G key-value heads, S slots, X numbers in P parts."""

    rows: Array  # [L, B, G, S, X] float32, bfloat16, int8 or float8_e4m3fn; zeros beyond the parts, if X is larger
    scales: Array | None  # float32 [L, B, G, S, P] of 8-bit rows


def write_rows(stored: Stored, new: Stored, layer: Int[Array, ""], first: Int[Array, " B"]) -> Stored:
    """Overwrite T rows of each sequence in one layer, from slot `first` on, by one scatter.

    Args:
        stored: the cache.
        new: rows [B, G, T, X] and scales [B, G, T, P], in the cache's dtypes.
        layer: which layer of the cache.
        first: int32, at most S - T.
    Returns: the cache, updated in place where it is donated or carried by a loop.
    """
    batch, groups, count = new.rows.shape[:3]
    # The heads are indexed as well: as part of the window, GPUs would first transpose the cache to move them inside.
    b = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    g = jnp.arange(groups, dtype=jnp.int32)[None, :, None]
    slot = first[:, None, None] + jnp.arange(count, dtype=jnp.int32)[None, None]

    def put(old: Array, new: Array) -> Array:
        place = old.at[jnp.asarray(layer, jnp.int32), b, g, slot]
        return place.set(new, mode="drop", unique_indices=True, wrap_negative_indices=False)

    return jax.tree.map(put, stored, new)


def cached_attention(
    q: Float[Array, "B G Q K"],
    stored: Stored,
    layer: Int[Array, ""],
    last: Int[Array, "B Q"],
    *,
    parts: tuple[int, int],
    shared: bool,
    scale: float,
    block: int | None = None,
) -> Float[Array, "B G Q V"]:
    """Attend to a cache: softmax(scale · q · keys of rows 0 … last) values, in float32.

    Args:
        q: queries of each key-value head. K is parts[0] + parts[1] if `shared`, else parts[0].
        stored, layer: the cache, and which layer of it.
        last: the last row that each query may see; at least 0.
        parts: widths of a row's two parts.
        shared: the whole row is the key and its first part the value; otherwise the parts are key and value.
        scale: factor of the scores.
        block: rows visited at a time. None means all at once.
    Returns: V is parts[0] if `shared`, else parts[1]; in q's dtype.

    Example:
        >>> rows = jnp.array([[5.0, 1.0], [5.0, 3.0], [9.0, 9.0]])  # key and value of three slots
        >>> stored, q, last = Stored(rows[None, None, None], None), jnp.zeros((1, 1, 1, 1)), jnp.array([[1]])
        >>> cached_attention(q, stored, jnp.int32(0), last, parts=(1, 1), shared=False, scale=1.0)  # mean of 1 and 3
        Array([[[[2.]]]], dtype=float32)
    """
    batch, groups, capacity, width = stored.rows.shape[1:]
    block = min(block or capacity, capacity)
    wide, zero = np.promote_types(q.dtype, np.float32), jnp.zeros((), jnp.int32)
    q = scaled(q, scale)
    begin, end = (0, parts[0]) if shared else (parts[0], sum(parts))  # of the value in a row

    def read(array: Array, start: Array) -> Array:
        index = (jnp.asarray(layer, jnp.int32), zero, zero, start, zero)
        return jax.lax.dynamic_slice(array, index, (1, batch, groups, block, array.shape[-1]))[0]

    def seen(start: Array, first: Array) -> Array:
        """Which of the rows from `start`, without those before `first`, each query sees: bool [B, 1, Q, block]."""
        slot = start + jnp.arange(block, dtype=jnp.int32)
        return ((slot[None, None] <= last[:, :, None]) & (slot >= first)[None, None])[:, None]

    if block == capacity:
        rows, scales = read(stored.rows, zero).astype(q.dtype), stored.scales
        s = jnp.einsum("bgqk,bgsk->bgqs", _as_wide_as_rows(q, width, parts, shared, scales), rows,
                       preferred_element_type=wide)  # fmt: skip
        if scales is None:
            weights = jax.nn.softmax(jnp.where(seen(zero, zero), s, -jnp.inf), axis=-1)
        else:
            scales = read(scales, zero).astype(wide)[:, :, None]
            s = s.reshape(batch, groups, -1, q.shape[2], capacity)  # a product for each part of the key
            s = sum(s[:, :, i] * scales[..., i] for i in range(s.shape[2]))
            weights = jax.nn.softmax(jnp.where(seen(zero, zero), s, -jnp.inf), axis=-1)
            weights = weights * scales[..., 0 if shared else 1]
        return jnp.einsum("bgqs,bgsv->bgqv", weights.astype(q.dtype), rows)[..., begin:end]

    def attend(start: Array, first: Array) -> tuple[Array, Array]:
        """Masked scores [B, G, Q, block] of the rows from `start`, without those before `first`, and the values."""
        rows = read(stored.rows, start)[..., : sum(parts)]
        if stored.scales is None:
            rows = rows.astype(q.dtype)
        else:
            rows = dequantize_rows(rows, read(stored.scales, start), parts, q.dtype)
        keys, values = (rows, rows) if shared else (rows[..., : parts[0]], rows[..., parts[0] :])
        s = jnp.einsum("bgqk,bgsk->bgqs", q, keys, preferred_element_type=wide)
        return jnp.where(seen(start, first), s, -jnp.inf), values

    def visit(i, carry):
        out, top, total = carry
        first = i.astype(jnp.int32) * block
        s, values = attend(jnp.minimum(first, capacity - block), first)
        new_top = jnp.maximum(top, s.max(-1))
        p = jnp.exp(s - new_top[..., None])
        keep = jnp.exp(top - new_top)
        part = jnp.einsum("bgqs,bgsv->bgqv", p.astype(q.dtype), values, preferred_element_type=wide)
        return out * keep[..., None] + part, new_top, total * keep + p.sum(-1)

    shape = q.shape[:3]
    # Every query sees row 0, so maxima are finite from the first block on.
    start = (
        jnp.zeros((*shape, sum(parts) if shared else parts[1]), wide),
        jnp.full(shape, -jnp.inf, wide),
        jnp.zeros(shape, wide),
    )
    start = tuple(as_varying(x, q, stored.rows) for x in start)
    out, _, total = jax.lax.fori_loop(0, last.max() // block + 1, visit, start)
    # The rope part went through the product: cutting it off here costs less than a copy of each block without it.
    return (out / total[..., None]).astype(q.dtype)[..., : parts[0] if shared else None]


def _as_wide_as_rows(
    q: Float[Array, "B G Q K"], width: int, parts: tuple[int, int], shared: bool, scales: Array | None
) -> Float[Array, "B G _ X"]:
    """Queries with zeros where a row holds no key; for 8-bit keys of two parts, all queries for each part in turn."""
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, width - q.shape[-1])))
    if not shared or scales is None:
        return q
    first, zero = np.arange(width).reshape(1, 1, 1, -1) < parts[0], jnp.zeros((), q.dtype)
    return jnp.concatenate([jnp.where(first, q, zero), jnp.where(first, zero, q)], axis=2)
