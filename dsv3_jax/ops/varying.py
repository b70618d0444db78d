"""What ops must know to run inside `shard_map`, where a value may differ from device to device along some mesh axes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def varying(x: Array) -> frozenset:
    """The mesh axes along which x differs; none outside `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


def zeros(shape: tuple[int, ...], *like: Array) -> Array:
    """Zeros of the first one's dtype, which loops may fill with what differs along the axes of any of them."""
    return as_varying(jnp.zeros(shape, like[0].dtype), *like)


def as_varying(x: Array, *like: Array) -> Array:
    """x, which may from now on differ along the axes of any of the others; its gradient is added up along these."""
    axes = frozenset().union(*map(varying, like)) - varying(x)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x
