"""A test of the state before it is saved: the step's own test looks at the loss and the gradient, not at the update."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.cluster import processes
from dsv3_jax.training.step import TrainState


def first_nonfinite(state: TrainState, mesh: Mesh | None = None) -> str:
    """Name the first parameter or router bias whose norm is not finite in float32; "" if all are.

    The norm and not each number: a parameter of 1e30 is finite, but no product of it is.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.training.step import abstract_state
        >>> run = ds.replace(ds.recipe("tiny"), model=ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0))
        >>> state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_state(run))
        >>> first_nonfinite(state)
        ''
        >>> first_nonfinite(ds.replace(state, params=jax.tree.map(lambda x: x + 1e30, state.params)))
        'parameter dense.attn.kv_norm.scale'
    """
    trees = {"parameter": state.params, "router bias": state.bias}
    finite = processes.fetch(_finite(trees), mesh)
    for kind in trees:
        for path, good in jax.tree_util.tree_leaves_with_path(finite[kind]):
            if not good:
                return f"{kind} {'.'.join(str(key.key) for key in path if hasattr(key, 'key'))}"
    return ""


@jax.jit
def _finite(trees):
    """Whether the sum of squares of each array is finite."""
    return jax.tree.map(lambda x: jnp.isfinite(jnp.sum(jnp.square(x.astype(jnp.float32)))), trees)
