"""Types of values inside `shard_map`: along which mesh axes a value differs between devices.

JAX checks these types. A value that starts as zeros and is then summed with varying values must be
declared varying.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def varying(x: Array) -> frozenset:
    """Return the mesh axes along which x varies; none outside `shard_map`.

    Example:
        >>> varying(jnp.ones(2))
        frozenset()
    """
    return jax.typeof(x).manual_axis_type.varying


def zeros(shape: tuple[int, ...], *like: Array) -> Array:
    """Return zeros in the dtype of the first array in `like`, varying along the axes of them all.

    Example:
        >>> zeros((2,), jnp.ones(3, jnp.bfloat16))
        Array([0, 0], dtype=bfloat16)
    """
    return as_varying(jnp.zeros(shape, like[0].dtype), *like)


def as_varying(x: Array, *like: Array) -> Array:
    """Declare that x also varies along the axes of all arrays in `like`.

    The gradient of x is summed over the axes that are added.

    Example:
        >>> def axes(x):
        ...     print(varying(jnp.zeros(1)), varying(as_varying(jnp.zeros(1), x)))
        ...     return x
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> rows = jax.sharding.PartitionSpec("data")
        >>> _ = jax.shard_map(axes, mesh=mesh, in_specs=rows, out_specs=rows)(jnp.ones(1))
        frozenset() frozenset({'data'})
    """
    axes = frozenset().union(*map(varying, like)) - varying(x)
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x
