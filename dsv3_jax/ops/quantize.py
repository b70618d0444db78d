"""Rows of a cache in 8 bits, with a scale for each part of a row: latent and rope part have ranges of their own."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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
        scale = (top / largest(dtype)).astype(jnp.float32)
        scales.append(jnp.where(scale > 0, scale, 1))  # 0 too where the division underflows
    made = jnp.concatenate(scales, axis=-1)
    scaled = jnp.clip(wide / _spread(made, parts).astype(wide.dtype), -largest(dtype), largest(dtype))
    if jnp.dtype(dtype) == np.int8:
        scaled = jnp.round(scaled)
    return scaled.astype(dtype), made


def dequantize_rows(rows: Array, scales: Float[Array, "*n P"], parts: tuple[int, ...], dtype) -> Array:
    """The inverse of `quantize_rows`, to within half a step: rows [..., X] in `dtype`."""
    return rows.astype(dtype) * _spread(scales, parts).astype(dtype)


def _spread(scales: Array, parts: tuple[int, ...]) -> Array:
    """A scale for each number. A chain of selections, which runs at the speed of memory where a gather would not."""
    place = np.arange(sum(parts))
    spread = scales[..., :1]
    for i, end in enumerate(np.cumsum(parts)[:-1], start=1):
        spread = jnp.where((place < end).reshape((1,) * (scales.ndim - 1) + (-1,)), spread, scales[..., i : i + 1])
    return spread


def _split(x: Array, parts: tuple[int, ...]) -> list[Array]:
    return jnp.split(x, [int(end) for end in np.cumsum(parts)[:-1]], axis=-1)
