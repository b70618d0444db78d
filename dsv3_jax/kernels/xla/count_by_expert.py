"""Sort few assignments by expert: each one is compared with all others."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax.ops.sort_by_expert import SortedRows, sort_by_expert

# assignments up to which a GPU counts those before each one: fewer launches than sort and scatter
FEW = 1024


def count_by_expert(expert_ids: Int[Array, "n K"], num_experts: int) -> SortedRows:
    """Compute `ops.sort_by_expert.sort_by_expert`, for a GPU.

    Example:
        >>> count_by_expert(jnp.array([[2, 0], [0, 1]]), num_experts=3).order
        Array([1, 2, 3, 0], dtype=int32)
    """
    flat = expert_ids.reshape(-1)
    if flat.size > FEW:
        return sort_by_expert(expert_ids, num_experts)

    # A key for each assignment, in its place in the order by expert, then by place.
    place = jnp.arange(flat.size, dtype=jnp.int32)
    key = flat * flat.size + place
    first = jnp.arange(num_experts, dtype=jnp.int32) * flat.size

    # One sum counts the keys from `low` to `high`: those before each one, of the experts before,
    # and of each expert.
    low = jnp.concatenate([jnp.zeros(flat.size + num_experts, jnp.int32), first])
    high = jnp.concatenate([key, first, first + flat.size])
    between = (low[:, None] <= key[None]) & (key[None] < high[:, None])
    counted = between.sum(axis=1, dtype=jnp.int32)
    row, starts, counts = jnp.split(counted, [flat.size, flat.size + num_experts])

    # Each row's assignment is the one whose row it is.
    order = jnp.where(row[None] == place[:, None], place[None], 0).sum(axis=1, dtype=jnp.int32)
    return SortedRows(order, row.reshape(expert_ids.shape), counts, starts)
