"""A product of one row, computed as a product of two."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


def in_two_rows(
    multiply: Callable[..., Array],
    x: Float[Array, "..."],
    *weights: Float[Array, "..."],
    **settings: int,
) -> Float[Array, "..."]:
    """Compute `product` or `swiglu` of one row beside a row of zeros: no more bytes on a GPU.

    For one row XLA would write w times x, as large as w, and read it again to add it up.

    Args: multiply: `ops.products.product` or `ops.products.swiglu`.

    Example:
        >>> from dsv3_jax.ops.products import product
        >>> in_two_rows(product, jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [0.0, 3.0]]))
        Array([1., 6.], dtype=float32)
    """
    lead = x.ndim - settings.get("axes", 1)
    one_row = x.reshape(1, *x.shape[lead:])
    two_rows = jnp.pad(one_row, [(0, 1)] + [(0, 0)] * (x.ndim - lead))
    y = multiply(two_rows, *weights, **settings)[0]
    return y.reshape(*x.shape[:lead], *y.shape)
