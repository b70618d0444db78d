"""Quantization of cached rows to 8 bits, with one scale a row."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsv3_jax.ops.dtypes import sum_dtype


def largest(dtype: Any) -> float:
    """Return the largest number of an 8-bit dtype: 127 for int8, 448 for float8_e4m3fn.

    Example:
        >>> largest(jnp.int8), largest(jnp.float8_e4m3fn)
        (127.0, 448.0)
    """
    dtype = jnp.dtype(dtype)
    return float(jnp.iinfo(dtype).max if dtype == np.int8 else jnp.finfo(dtype).max)


def quantize_rows(x: Float[Array, "*n X"], dtype: Any) -> tuple[Array, Float[Array, "*n 1"]]:
    """Round rows to an 8-bit dtype, after dividing each by its scale max|row| / largest(dtype).

    Args:
        x: rows, of a floating dtype.
        dtype: int8 or float8_e4m3fn.
    Returns: (rows [..., X] in `dtype`, float32 scales [..., 1]). The scale is 1 where a row is all
        zeros.

    Example:
        >>> rows, scales = quantize_rows(jnp.array([[254.0, -2.0]]), dtype=jnp.int8)
        >>> rows, scales
        (Array([[127,  -1]], dtype=int8), Array([[2.]], dtype=float32))
        >>> dequantize_rows(rows, scales, dtype=jnp.float32)
        Array([[254.,  -2.]], dtype=float32)
    """
    wide = x.astype(sum_dtype(x.dtype))
    scales = (jnp.abs(wide).max(axis=-1, keepdims=True) / largest(dtype)).astype(jnp.float32)
    scales = jnp.where(scales > 0, scales, 1)  # it is also 0 if the division underflows
    scaled = jnp.clip(wide / scales.astype(wide.dtype), -largest(dtype), largest(dtype))
    if jnp.dtype(dtype) == np.int8:
        scaled = jnp.round(scaled)
    return scaled.astype(dtype), scales


def dequantize_rows(rows: Array, scales: Float[Array, "*n 1"], dtype: Any) -> Array:
    """Return the rows of `quantize_rows` in `dtype`, to within half a step."""
    return rows.astype(dtype) * scales.astype(dtype)
