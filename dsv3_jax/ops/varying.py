"""Types of values inside `shard_map`: along which mesh axes a value varies, that is, differs between devices.

JAX checks these types. A value that starts as zeros and is then summed with varying values must be declared varying.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def varying(x: Array) -> frozenset:
    """Return the mesh axes along which x varies; none outside `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


def zeros(shape: tuple[int, ...], *like: Array) -> Array:
    """Return zeros in the dtype of the first array in `like`, varying along the axes of all arrays in `like`."""
    return as_varying(jnp.zeros(shape, like[0].dtype), *like)


def as_varying(x: Array, *like: Array) -> Array:
    """Declare that x also varies along the axes of all arrays in `like`.

    The gradient of x is summed over the axes that are added.
    """
    axes = frozenset().union(*map(varying, like)) - varying(x)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x
