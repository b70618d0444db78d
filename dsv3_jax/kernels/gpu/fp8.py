"""Products in 8 bits on Hopper: which shapes the project's kernel multiplies. See hopper_fp8.py; asked for by name."""

import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

BLOCK = 128  # numbers that share a scale, and the step of every size


def scaled_product(a: Array, a_scales: Array, c: Array, c_scales: Array, dtype: Any) -> Array:
    """See `hopper_fp8.scaled_product`, which is imported when it is used: Pallas takes a second."""
    from dsv3_jax.kernels.gpu import hopper_fp8

    return hopper_fp8.scaled_product(a, a_scales, c, c_scales, dtype)


def _divided(*sizes: int) -> bool:
    return all(size % BLOCK == 0 for size in sizes)


def _product(x: Array, w: Array, axes: int = 1) -> bool:
    depth = math.prod(w.shape[:axes])
    return _divided(x.size // depth, depth, w.size // depth)


def _swiglu(x: Array, w_gate: Array, *others: Array) -> bool:
    return _divided(x.size // x.shape[-1], *w_gate.shape)


def _expand(c_kv: Array, k_rope: Array, w_uk: Array, w_uv: Array) -> bool:
    rows, latent = c_kv.size // c_kv.shape[-1], c_kv.shape[-1]
    return _divided(rows, latent, w_uk.shape[0] * (w_uk.shape[1] + w_uv.shape[1]))


# Whether an op's products and their gradients have whole tiles only: each size is contracted once.
FITS: dict[str, Callable[..., bool]] = {"product": _product, "swiglu": _swiglu, "expand": _expand}
