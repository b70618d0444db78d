"""Weights that "data" shards, gathered for use: a layer's in its turn."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from dsv3_jax.mesh.sharding import is_variable, names_of, on_mesh, spec


def unshard_weights(v: Any, *, fsdp: bool, dtype: Any) -> Any:
    """Gather weights, in any structure, along "data" if fsdp shards them. Under `jax.jit`.

    Routed experts stay sharded: `expert_parallel` gathers them.

    They are cast to `dtype` first, except those that `model.parameters.param` marks as exact. Their
    gradients are summed along "data" and sharded again in that dtype, then cast back: a bfloat16
    run sums them in bfloat16. No device ever holds all of the layers' gradients. It does hold for
    the embedding and the head: `shard_map_over_batch` takes these tables unsharded and sums their
    gradients unsharded.
    """
    if not fsdp or not on_mesh():
        return v
    mesh = jax.sharding.get_abstract_mesh()

    def gather(v: nnx.Variable) -> nnx.Variable:
        names = names_of(v)
        if "expert" in names:
            return v
        exact = v.get_metadata().get("exact", False)

        def of(x: Array) -> Array:
            # How a layer reads it, and how it is stored: they differ along "data" alone.
            used = spec(names, x.shape, mesh)
            kept = spec(names, x.shape, mesh, fsdp=True)
            if used == kept:
                return x
            return gathered(x, used, kept, x.dtype if exact else jnp.dtype(dtype))

        return jax.tree.map(of, v)

    return jax.tree.map(gather, v, is_leaf=is_variable)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(x: Array, used: P, kept: P, dtype: Any) -> Array:
    """Shard an array as it is used, cast before; its gradient is summed and sharded as kept."""
    cast = jax.lax.with_sharding_constraint(x.astype(dtype), kept)  # cast before it is sent
    return jax.lax.with_sharding_constraint(cast, used)


def gathered_fwd(x: Array, used: P, kept: P, dtype: Any) -> tuple[Array, Array]:
    # The backward pass reads x's dtype alone: an empty slice has it.
    return gathered(x, used, kept, dtype), x[:0]


def gathered_bwd(used: P, kept: P, dtype: Any, like_x: Array, d: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(d, kept).astype(like_x.dtype),)


gathered.defvjp(gathered_fwd, gathered_bwd)
