"""Attention of a few new tokens to a cache, whatever the cache holds.

A layer's cache is a row of numbers for each token and key-value head, in two parts. Where the row is latent,
[c_kv, k_rope], the whole of it is the key and its first part the value, for all heads alike: absorbed MLA is
multi-query attention over one latent head. Where it is expanded, the first part is the key and the second the value.

Rows are visited block by block with a running softmax (as in `attention.py`), as many blocks as the longest sequence
has: the cost follows what is in the cache, not its capacity, and 8-bit rows become numbers one block at a time. On CPUs
with a compiler the native kernel does the same for float32 queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.cpu import calls
from dsv3_jax.ops.quantize import dequantize_rows
from dsv3_jax.ops.varying import as_varying

BLOCK_ELEMENTS = 1 << 16  # numbers visited at a time on a CPU: a quarter of a megabyte, measured best


class Stored(NamedTuple):
    """Remembered rows of all layers: L layers, B sequences, G key-value heads, S places, X numbers in P parts."""

    rows: Array  # [L, B, G, S, X] float32, bfloat16, int8 or float8_e4m3fn
    scales: Array | None  # float32 [L, B, G, S, P] of 8-bit rows


def cached_attention(
    q: Float[Array, "B G Q K"],
    stored: Stored,
    layer: Int[Array, ""],
    last: Int[Array, "B Q"],
    *,
    parts: tuple[int, int],
    shared: bool,
    scale: float,
    summed: bool = False,
    block: int | None = None,
) -> Float[Array, "B G Q V"]:
    """softmax(scale · q · keys of rows 0 … last) values, in float32.

    Args:
        q: queries of each key-value head. K is parts[0] + parts[1] where `shared`, else parts[0].
        stored, layer: the cache, and which layer of it.
        last: the last row that each query may see; at least 0.
        parts: widths of a row's two parts.
        shared: the whole row is the key and its first part the value; else the parts are key and value.
        scale: what scores are multiplied by.
        summed: with `shared`, add the parts' products; otherwise the score is one product.
        block: rows visited at a time; None suits the backend.
    Returns: V is parts[0] where `shared`, else parts[1]; in q's dtype.
    """
    batch, groups, capacity, width = stored.rows.shape[1:]
    if block is None and not summed and calls.serves(q.dtype) and stored.rows.dtype.name in calls.CACHE_DTYPES:
        scaled, values = q * jnp.asarray(scale, q.dtype), (0, parts[0]) if shared else parts
        return calls.cached_attention(scaled, *stored, layer, last, values=values, first_part=parts[0])
    if block is None:
        block = _block(batch * groups * width, capacity)
    block = min(block, capacity)
    wide, zero = np.promote_types(q.dtype, np.float32), jnp.zeros((), jnp.int32)
    q = q * jnp.asarray(scale, q.dtype)

    def read(array: Array, start: Array) -> Array:
        at = (layer, zero, zero, start, zero)
        return jax.lax.dynamic_slice(array, at, (1, batch, groups, block, array.shape[-1]))[0]

    def attend(start: Array, first: Array) -> tuple[Array, Array]:
        """Masked scores [B, G, Q, block] of the rows from `start`, those before `first` left out, and the values."""
        rows = read(stored.rows, start)
        if stored.scales is None:
            rows = rows.astype(q.dtype)
        else:
            rows = dequantize_rows(rows, read(stored.scales, start), parts, q.dtype)
        values = rows if shared else rows[..., parts[0] :]
        if shared and summed:
            s = _product(q[..., : parts[0]], rows[..., : parts[0]], wide)
            s = s + _product(q[..., parts[0] :], rows[..., parts[0] :], wide)
        else:
            s = _product(q, rows if shared else rows[..., : parts[0]], wide)
        place = start + jnp.arange(block, dtype=jnp.int32)
        seen = (place[None, None] <= last[:, :, None]) & (place >= first)[None, None]
        return jnp.where(seen[:, None], s, -jnp.inf), values

    if block == capacity:
        s, values = attend(zero, zero)
        weights = jax.nn.softmax(s, axis=-1).astype(q.dtype)
        return jnp.einsum("bgqs,bgsv->bgqv", weights, values)[..., : parts[0] if shared else None]

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
    # Row 0 is seen by all, so that maxima are finite from the first block on.
    start = (
        jnp.zeros((*shape, width if shared else parts[1]), wide),
        jnp.full(shape, -jnp.inf, wide),
        jnp.zeros(shape, wide),
    )
    start = tuple(as_varying(x, q, stored.rows) for x in start)
    out, _, total = jax.lax.fori_loop(0, last.max() // block + 1, visit, start)
    # The rope part rode along in the product: cutting it off here costs less than a copy of each block without it.
    return (out / total[..., None]).astype(q.dtype)[..., : parts[0] if shared else None]


def _product(q: Array, k: Array, wide) -> Array:
    return jnp.einsum("bgqk,bgsk->bgqs", q, k, preferred_element_type=wide)


def _block(elements_a_row: int, capacity: int) -> int:
    """Rows visited at a time. An accelerator would rather have all at once."""
    if jax.default_backend() != "cpu":
        return capacity
    rows = max(BLOCK_ELEMENTS // elements_a_row, 1)
    return max(1 << (rows.bit_length() - 1), 64)
