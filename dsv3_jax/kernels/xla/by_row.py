"""Experts of a few tokens, without a loop: each assignment reads its expert's weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.xla.count_by_expert import count_by_expert
from dsv3_jax.ops.dispatch import take
from dsv3_jax.ops.dtypes import sum_dtype


def decode_by_row(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
) -> Float[Array, "n D"]:
    """Compute `ops.dispatch.decode_experts` by three float32 sums an assignment. No gradient.

    Each sum reads the weights of its expert in place. On a GPU XLA fuses the look-up of the expert
    into the sum, so no weight is copied, and eight kernels do it all. Rows are sorted by expert, so
    one expert's rows run side by side and find its weights in the cache. The cost grows with the
    number of assignments, not of experts.
    """
    n, num_choices = expert_ids.shape

    # The m = n K assignments: their experts and tokens. An expert that is elsewhere has the gate 0.
    expert_m = jnp.minimum(expert_ids.reshape(-1), w_gate.shape[0] - 1)
    rows_mD = jnp.repeat(x, num_choices, axis=0)
    row = None
    if n > 1:
        p = count_by_expert(expert_ids, w_gate.shape[0])
        expert_m = take(expert_m, p.order)
        rows_mD = take(x, p.order // num_choices)
        row = p.row

    def product(rows: Array, w: Array) -> Array:
        wide = sum_dtype(x.dtype)
        own = take(w, expert_m)
        return (rows.astype(wide)[:, :, None] * own.astype(wide)).sum(axis=1)

    h_mF = (jax.nn.silu(product(rows_mD, w_gate)) * product(rows_mD, w_up)).astype(x.dtype)
    out_mD = product(h_mF, w_down)

    # Each token's choices, weighted.
    out_nKD = out_mD.reshape(n, num_choices, -1) if row is None else take(out_mD, row)
    weights = gates.astype(x.dtype).astype(out_nKD.dtype)[..., None]
    return (out_nKD * weights).sum(axis=1).astype(x.dtype)
