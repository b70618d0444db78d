"""Experts spread over a mesh: every device runs the experts it holds, on the tokens of all its peers.

Along the mesh axis "expert" each device holds E/n experts and its own share of the batch. Along "tensor" each holds a
part of every expert's hidden units, so that the parts' outputs are added up. Under fsdp a layer's matrices are gathered
along "data" in the layer's turn. No token is dropped, and nothing depends on the mesh but the order of additions.

How tokens come to other devices' experts, and their sums back, is `Layout.exchange`:

    gather    the n peers gather one another's tokens, and a reduce-scatter adds up what each computed of them

The only file with collectives written by hand.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Layout
from dsv3_jax.ops import dispatch
from dsv3_jax.ops.varying import as_varying
from dsv3_jax.sharding import row_axes, spec

# The last axes of a stack of experts, w_gate, w_up and w_down, by which `sharding.RULES` cuts it.
NAMES = ("expert", "dim", "hidden"), ("expert", "dim", "hidden"), ("expert", "hidden", "dim")


class Cut(NamedTuple):
    """How the mesh in force cuts the tokens and experts of one call."""

    rows: tuple[str, ...]  # axes along which each device has tokens of its own
    stack: dispatch.Experts  # the stack's PartitionSpecs
    peers: int  # devices along "expert" that share the experts out; 1: each has all

    @property
    def hidden(self) -> bool:
        return self.stack.w_gate[-1] is not None

    @property
    def width(self) -> bool:
        return self.stack.w_gate[-2] is not None


def _cut(tokens: int, experts: dispatch.Experts, layout: Layout) -> Cut:
    mesh = jax.sharding.get_abstract_mesh()
    stack = dispatch.Experts._make(
        spec(names, w.shape, mesh, fsdp=layout.fsdp) for names, w in zip(NAMES, experts, strict=True)
    )
    return Cut(row_axes(tokens), stack, mesh.shape["expert"] if stack.w_gate[1] else 1)


def routed_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: dispatch.Experts,
    thread: dispatch.Experts,
    layer: Int[Array, ""],
    *,
    backend: str,
    layout: Layout,
) -> tuple[Float[Array, "n D"], dispatch.Experts, Float[Array, ""]]:
    """`dispatch.routed_swiglu_in_stack` on the mesh of the context.

    Arguments as there, and how things lie.
    Returns: (y, the thread, copies of a token that go to another device, mean over tokens).
    """
    cut = _cut(x.shape[0], experts, layout)

    def local(x, ids, gates, experts, thread, layer):
        def run(x, ids, gates):
            if not cut.width:
                x, gates = (as_varying(a, experts.w_gate) for a in (x, gates))
                return dispatch.routed_swiglu_in_stack(x, ids, gates, experts, thread, layer, backend=backend)
            one, after = dispatch.take_layer(experts, thread, layer)
            one = _whole(one, cut)
            x, gates = (as_varying(a, one.w_gate) for a in (x, gates))
            return dispatch.routed_swiglu(x, ids, gates, *one, backend=backend), after

        return _gathered(run, x, ids, gates, experts.w_gate.shape[1], cut)

    tokens = P(cut.rows)
    spread = jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, cut.stack, cut.stack, P()),
        out_specs=(tokens, cut.stack, P()),
    )
    return spread(x, expert_ids, gates, experts, thread, layer)


def few_tokens_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: dispatch.Experts,
    layer: Int[Array, ""],
    *,
    layout: Layout,
) -> Float[Array, "n D"]:
    """`dispatch.few_tokens_swiglu` on the mesh of the context: each device reads only experts that it holds."""
    cut = _cut(x.shape[0], experts, layout)

    def local(x, ids, gates, experts, layer):
        def run(x, ids, gates):
            held, at = experts, layer
            if cut.width:
                one, _ = dispatch.take_layer(experts, experts, layer)
                held, at = dispatch.Experts(*(w[None] for w in _whole(one, cut))), jnp.zeros_like(layer)
            x, gates = (as_varying(a, held.w_gate) for a in (x, gates))
            return dispatch.few_tokens_swiglu(x, ids, gates, held, at, all_here=cut.peers == 1), None

        return _gathered(run, x, ids, gates, experts.w_gate.shape[1], cut)[0]

    tokens = P(cut.rows)
    spread = jax.shard_map(local, in_specs=(tokens, tokens, tokens, cut.stack, P()), out_specs=tokens)
    return spread(x, expert_ids, gates, experts, layer)


def _gathered(run, x, ids, gates, held: int, cut: Cut):
    """(y of this device's tokens, what else `run` gives, copies of a token that travel)."""
    shared, crossed = cut.peers > 1, 0.0
    if shared and "expert" in cut.rows:
        x, ids, gates = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, ids, gates))
        crossed = cut.peers - 1.0
    if shared:
        ids, gates = _of_mine(ids, gates, held)
    y, more = run(x, ids, gates)
    if cut.hidden:
        y = jax.lax.psum(y, "tensor")
    if shared and "expert" in cut.rows:
        y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
    elif shared:
        y = jax.lax.psum(y, "expert")
    return y, more, jnp.asarray(crossed, jnp.float32)


def _of_mine(ids: Array, gates: Array, held: int) -> tuple[Array, Array]:
    """Choices among this device's experts, counted from 0; others go to one expert too many and weigh nothing."""
    ids = ids - jax.lax.axis_index("expert").astype(ids.dtype) * held
    here = (ids >= 0) & (ids < held)
    return jnp.where(here, ids, held), jnp.where(here, gates, 0)


def _whole(one: dispatch.Experts, cut: Cut) -> dispatch.Experts:
    """One layer's matrices [E, …] gathered along "data", which cuts their width D."""
    # Where "data" does not cut the tokens, all of its devices do the same with them, and JAX must know.
    to = "varying" if "data" in cut.rows else "invarying"
    return dispatch.Experts(
        *(
            jax.lax.all_gather(w, "data", axis=names.index("dim"), tiled=True, to=to)
            for names, w in zip(NAMES, one, strict=True)
        )
    )
