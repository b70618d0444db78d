"""A test of arrays before they are saved: the step's own test looks at the loss and the gradient, not at the update."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.cluster import processes


def first_nonfinite(trees: dict[str, Any], mesh: Mesh | None = None) -> str:
    """Name the first array whose norm is not finite in float32, by the name of its tree; "" if all are.

    The norm and not each number: a parameter of 1e30 is finite, but no product of it is. Single numbers count only if
    they are NaN, because optax begins some at infinity.

    Example:
        >>> trees = {"parameter": {"attn": {"w_o": jnp.ones((2, 3))}}, "optimizer state": (jnp.inf,)}
        >>> first_nonfinite(trees)
        ''
        >>> first_nonfinite(jax.tree.map(lambda x: x * 1e30, trees))
        'parameter attn.w_o'
    """
    finite = processes.fetch(_finite(trees), mesh)
    for kind in trees:
        for path, good in jax.tree_util.tree_leaves_with_path(finite[kind]):
            if not good:
                names = (getattr(key, "key", getattr(key, "name", None)) for key in path)
                return " ".join((kind, ".".join(str(name) for name in names if name not in (None, "value"))))
    return ""


@jax.jit
def _finite(trees):
    def finite(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return True
        return jnp.isfinite(jnp.sum(jnp.square(x.astype(jnp.float32)))) if x.ndim else ~jnp.isnan(x)

    return jax.tree.map(finite, trees)
