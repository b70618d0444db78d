"""Experts spread over a mesh: every device runs the experts it holds, on the tokens of all its peers.

Along the mesh axis "expert" each device holds E/n experts and its own share of the batch. Along "tensor" each holds a
part of every expert's hidden units, so that the parts' outputs are added up. Under fsdp a layer's matrices are gathered
along "data" in the layer's turn. No token is dropped, and nothing depends on the mesh but the order of additions.

How tokens come to other devices' experts, and their sums back, is `Layout.exchange`:

    gather      the peers gather one another's tokens, and a reduce-scatter adds up what each computed of them
    all_to_all  a token goes to the devices that hold its experts, once to each, in rounds of a fixed size
    ragged      the same in one round of just the tokens that there are; not on CPU
    auto        `all_to_all` where a round of it is smaller than all the peers' tokens, else `gather`. Never `ragged`,
                which saves more of the wire, but is held to the others by an emulation alone: it has to be asked for

The last two are in expert_exchange.py. Decoding's few tokens are always gathered. These two files are the only ones
with collectives written by hand.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Layout, ModelConfig
from dsv3_jax.mesh.sharding import row_axes, spec
from dsv3_jax.mesh.token_exchange import all_to_all, of_mine, places_a_round, ragged
from dsv3_jax.ops import dispatch
from dsv3_jax.ops.varying import as_varying

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


def exchange_of(cfg: ModelConfig, tokens: int, peers: int) -> Literal["gather", "all_to_all", "ragged"]:
    """What `Layout.exchange` comes to for so many tokens a device."""
    if cfg.layout.exchange != "auto":
        return cfg.layout.exchange
    return "all_to_all" if places_a_round(cfg, tokens, peers) < tokens else "gather"


def routed_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: dispatch.Experts,
    thread: dispatch.Experts,
    layer: Int[Array, ""],
    *,
    backend: str,
    cfg: ModelConfig,
) -> tuple[Float[Array, "n D"], dispatch.Experts, Float[Array, ""]]:
    """`dispatch.routed_swiglu_in_stack` on the mesh of the context.

    Arguments as there; cfg says how things lie, and how far a token's experts.
    Returns: (y, the thread, copies of a token that go to another device, mean over tokens).
    """
    cut = _cut(x.shape[0], experts, cfg.layout)

    def local(x, ids, gates, experts, thread, layer):
        if not cut.width:
            x, gates = (as_varying(a, experts.w_gate) for a in (x, gates))
            return meet(x, ids, gates, experts, thread, layer)
        one, thread = dispatch.take_layer(experts, thread, layer)
        stack = dispatch.Experts(*(w[None] for w in _whole(one, cut, x.dtype)))
        x, gates = (as_varying(a, stack.w_gate) for a in (x, gates))
        y, _, crossed = meet(x, ids, gates, stack, stack, jnp.zeros_like(layer))
        return y, thread, crossed

    def meet(x, ids, gates, experts, thread, layer):
        """This device's tokens and all their experts, whose matrices are whole in width."""
        n, apart = x.shape[0], cut.peers > 1 and "expert" in cut.rows
        exchange = exchange_of(cfg, n, cut.peers) if apart else "gather"
        if exchange == "gather":

            def run(x, ids, gates):
                return dispatch.routed_swiglu_in_stack(x, ids, gates, experts, thread, layer, backend=backend)

            return _gathered(run, x, ids, gates, experts.w_gate.shape[1], cut)
        args, static = (x, ids, gates, experts, thread, layer), dict(backend=backend, peers=cut.peers)
        if exchange == "all_to_all":
            y, thread, crossed = all_to_all(*args, **static, places=places_a_round(cfg, n, cut.peers))
        else:
            y, thread, crossed = ragged(*args, **static)
        return (jax.lax.psum(y, "tensor") if cut.hidden else y), thread, crossed

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
                held, at = dispatch.Experts(*(w[None] for w in _whole(one, cut, x.dtype))), jnp.zeros_like(layer)
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
        ids, gates = of_mine(ids, gates, held)
    y, more = run(x, ids, gates)
    if cut.hidden:
        y = jax.lax.psum(y, "tensor")
    if shared and "expert" in cut.rows:
        y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
    elif shared:
        y = jax.lax.psum(y, "expert")
    return y, more, jnp.asarray(crossed, jnp.float32)


def _whole(one: dispatch.Experts, cut: Cut, dtype) -> dispatch.Experts:
    """One layer's matrices [E, …] cast, and gathered along "data", which cuts their width D."""
    # Where "data" does not cut the tokens, all of its devices do the same with them, and JAX must know.
    to = "varying" if "data" in cut.rows else "invarying"
    return dispatch.Experts(
        *(
            jax.lax.all_gather(w.astype(dtype), "data", axis=names.index("dim"), tiled=True, to=to)
            for names, w in zip(NAMES, one, strict=True)
        )
    )
