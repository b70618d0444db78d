"""Sorting assignments by expert: where each row goes, and how many each expert has."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Plan(NamedTuple):
    """Assignments in order of expert. n tokens with K choices each make n·K assignments."""

    order: Array  # int32 [n·K]: assignment (token·K + choice) at each sorted place
    place: Array  # int32 [n, K]: sorted place of each assignment, the inverse of `order`
    counts: Array  # int32 [E]: rows of each expert
    starts: Array  # int32 [E]: where they begin


def plan(expert_ids: Int[Array, "n K"], num_experts: int) -> Plan:
    """Sort assignments by expert; earlier tokens first within one."""
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    counts = jax.ops.segment_sum(jnp.ones(flat.shape, jnp.int32), flat, num_segments=num_experts)
    return Plan(order, place.reshape(expert_ids.shape), counts, jnp.cumsum(counts, dtype=jnp.int32) - counts)
