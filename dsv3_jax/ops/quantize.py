"""Quantization of cached rows to 8 bits, with one scale for each part of a row.

The latent part and the RoPE part of a row have different ranges, so each has its own scale.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def largest(dtype) -> float:
    """Return the largest number of an 8-bit dtype: 127 for int8, 448 for float8_e4m3fn.

    Example:
        >>> largest(jnp.int8), largest(jnp.float8_e4m3fn)
        (127.0, 448.0)
    """
    dtype = jnp.dtype(dtype)
    return float(jnp.iinfo(dtype).max if dtype == np.int8 else jnp.finfo(dtype).max)


def quantize_rows(x: Float[Array, "*n X"], parts: tuple[int, ...], dtype) -> tuple[Array, Float[Array, "*n P"]]:
    """Round rows to an 8-bit dtype, after dividing each part by its scale max|part| / largest(dtype).

    Args:
        x: rows, of a floating dtype.
        parts: widths of a row's P parts; they add up to X.
        dtype: int8 or float8_e4m3fn.
    Returns: (rows [..., X] in `dtype`, float32 scales [..., P]). The scale is 1 where a part is all zeros.

    Example:
        >>> rows, scales = quantize_rows(jnp.array([[127.0, -1.0, 254.0]]), parts=(2, 1), dtype=jnp.int8)
        >>> rows, scales
        (Array([[127,  -1, 127]], dtype=int8), Array([[1., 2.]], dtype=float32))
        >>> dequantize_rows(rows, scales, parts=(2, 1), dtype=jnp.float32)
        Array([[127.,  -1., 254.]], dtype=float32)
    """
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    scales = []
    for part in _split(wide, parts):
        top = jnp.abs(part).max(axis=-1, keepdims=True)
        scale = (top / largest(dtype)).astype(jnp.float32)
        scales.append(jnp.where(scale > 0, scale, 1))  # it is also 0 if the division underflows
    made = jnp.concatenate(scales, axis=-1)
    scaled = jnp.clip(wide / _spread(made, parts).astype(wide.dtype), -largest(dtype), largest(dtype))
    if jnp.dtype(dtype) == np.int8:
        scaled = jnp.round(scaled)
    return scaled.astype(dtype), made


def dequantize_rows(rows: Array, scales: Float[Array, "*n P"], parts: tuple[int, ...], dtype) -> Array:
    """Return rows [..., X] in `dtype` from the results of `quantize_rows`, to within half a step.

    Args:
        rows, scales: its results.
        parts: widths of a row's P parts, as given to it.
        dtype: of the result.

    Example:
        >>> rows, scales = jnp.array([[3, -1]], jnp.int8), jnp.array([[0.5]])
        >>> dequantize_rows(rows, scales, parts=(2,), dtype=jnp.float32)
        Array([[ 1.5, -0.5]], dtype=float32)
    """
    return rows.astype(dtype) * _spread(scales, parts).astype(dtype)


def _spread(scales: Array, parts: tuple[int, ...]) -> Array:
    """Return each number's scale [..., X]. A chain of selections runs at memory speed; a gather does not."""
    place = np.arange(sum(parts))
    spread = scales[..., :1]
    for i, end in enumerate(np.cumsum(parts)[:-1], start=1):
        spread = jnp.where((place < end).reshape((1,) * (scales.ndim - 1) + (-1,)), spread, scales[..., i : i + 1])
    return spread


def _split(x: Array, parts: tuple[int, ...]) -> list[Array]:
    """Cut the last axis into parts."""
    return jnp.split(x, [int(end) for end in np.cumsum(parts)[:-1]], axis=-1)
