"""Rows of a cache in 8 bits, with a scale for each part of a row: latent and rope part have ranges of their own."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

QUANTIZED = ("int8", "float8_e4m3")  # as users spell them


def largest(dtype) -> float:
    """The largest number of an 8-bit dtype: 127 of int8, 448 of float8_e4m3fn."""
    dtype = jnp.dtype(dtype)
    return float(jnp.iinfo(dtype).max if dtype == np.int8 else jnp.finfo(dtype).max)


def quantize_rows(x: Float[Array, "*n X"], parts: tuple[int, ...], dtype) -> tuple[Array, Float[Array, "*n P"]]:
    """Round rows to an 8-bit dtype, each part by its own scale max|part| / largest.

    Args:
        x: rows. parts: widths of a row's parts, which add up to X. dtype: int8 or float8_e4m3fn.
    Returns: (rows [..., X] in `dtype`, scales [..., P] float32); a part that is 0 has scale 1.
    """
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    scales = []
    for part in _split(wide, parts):
        top = jnp.abs(part).max(axis=-1, keepdims=True)
        scales.append(jnp.where(top > 0, top / largest(dtype), 1).astype(jnp.float32))
    spread = jnp.concatenate(
        [jnp.broadcast_to(s, (*s.shape[:-1], n)) for s, n in zip(scales, parts, strict=True)], axis=-1
    )
    scaled = jnp.clip(wide / spread.astype(wide.dtype), -largest(dtype), largest(dtype))
    if jnp.dtype(dtype) == np.int8:
        scaled = jnp.round(scaled)
    return scaled.astype(dtype), jnp.concatenate(scales, axis=-1)


def dequantize_rows(rows: Array, scales: Float[Array, "*n P"], parts: tuple[int, ...], dtype) -> Array:
    """The inverse of `quantize_rows`, to within half a step: rows [..., X] in `dtype`."""
    which = np.repeat(np.arange(len(parts)), parts)
    return rows.astype(dtype) * scales[..., which].astype(dtype)


def _split(x: Array, parts: tuple[int, ...]) -> list[Array]:
    return jnp.split(x, [int(end) for end in np.cumsum(parts)[:-1]], axis=-1)
