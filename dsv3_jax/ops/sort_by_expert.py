"""Sort assignments by expert: where each row goes, and how many rows each expert has."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class SortedRows(NamedTuple):
    """Assignments in order of expert. n tokens with K choices each make n·K assignments."""

    order: Array  # int32 [n·K]: assignment (token·K + choice) of each sorted row
    row: Array  # int32 [n, K]: sorted row of each assignment, the inverse of `order`
    counts: Array  # int32 [E]: rows of each expert
    starts: Array  # int32 [E]: first row of each expert

    @property
    def total(self) -> Array:
        """Rows of all experts; no launch of its own, unlike a sum."""
        return self.starts[-1] + self.counts[-1]


def sort_by_expert(expert_ids: Int[Array, "n K"], num_experts: int) -> SortedRows:
    """Sort assignments by expert; within one expert, earlier tokens come first.

    Example:
        >>> rows = sort_by_expert(jnp.array([[2, 0], [0, 1]]), num_experts=3)
        >>> rows.order, rows.counts  # expert 0 has assignments 1 and 2, 1 has 3, and 2 has 0
        (Array([1, 2, 3, 0], dtype=int32), Array([2, 1, 1], dtype=int32))
    """
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)

    # The inverse permutation: row[order[r]] = r.
    places = jnp.arange(order.size, dtype=jnp.int32)
    row = jnp.zeros_like(order).at[order].set(places, unique_indices=True)

    counts = jax.ops.segment_sum(jnp.ones(flat.shape, jnp.int32), flat, num_segments=num_experts)
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    return SortedRows(order, row.reshape(expert_ids.shape), counts, starts)
