"""Experts spread over a mesh: every device runs the experts it holds, on the tokens of all its peers.

Along the mesh axis "expert" each device holds E/n experts and its own share of the batch. For one layer the n peers
gather one another's tokens, each computes Σ_k g_k FFN_k(x) over the chosen experts that it holds, and a
reduce-scatter adds the parts up and leaves every device with its own tokens' sums. No token is dropped, and nothing
depends on the mesh but the order of additions. The only file with collectives written by hand.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsv3_jax.ops import dispatch

AXES = ("data", "expert")  # of the mesh; the batch is cut over both


def routed_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: dispatch.Experts,
    thread: dispatch.Experts,
    layer: Int[Array, ""],
    *,
    backend: str,
) -> tuple[Float[Array, "n D"], dispatch.Experts]:
    """`dispatch.routed_swiglu_in_stack` on the mesh of the context, with the experts cut along its axis "expert".

    Arguments and result as there; n must be divisible by the mesh's size and E by its expert axis.
    """

    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in AXES if mesh.shape[axis] > 1)
    held = experts.w_gate.shape[1] // mesh.shape["expert"]

    def local(x, ids, gates, experts, thread, layer):
        if "expert" in axes:
            x, ids, gates = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, ids, gates))
            ids = ids - jax.lax.axis_index("expert").astype(ids.dtype) * held
            here = (ids >= 0) & (ids < held)
            # What other devices hold goes to one expert too many, behind the last, and weighs nothing.
            ids, gates = jnp.where(here, ids, held), jnp.where(here, gates, 0)
        y, thread = dispatch.routed_swiglu_in_stack(x, ids, gates, experts, thread, layer, backend=backend)
        if "expert" in axes:
            y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        return y, thread

    # An axis of size 1 is left out, so that nothing is added up along it.
    tokens, stack = P(axes), P(None, "expert") if "expert" in axes else P()
    spread = jax.shard_map(local, in_specs=(tokens, tokens, tokens, stack, stack, P()), out_specs=(tokens, stack))
    return spread(x, expert_ids, gates, experts, thread, layer)


def on_mesh() -> bool:
    """Whether a mesh of more than one device is in force."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1
