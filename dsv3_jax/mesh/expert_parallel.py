"""Expert parallelism: every device runs the experts it holds, on the tokens of all its peers.

Along the mesh axis "expert" each device holds E/P experts and its own share of the batch. Along "tensor" each holds a
part of every expert's hidden units, and the parts' outputs are added. Under fsdp a layer's matrices are gathered along
"data" in the layer's turn. No token is dropped, and results depend on the mesh by the order of additions only.

`Layout.expert_comm` says how tokens reach other devices' experts, and how their sums return:

    gather      peers gather one another's tokens; a reduce-scatter adds what each computed of them
    all_to_all  a token goes to the devices that hold its experts, once to each, in rounds of a fixed size
    ragged      the same in one round of exactly the tokens that there are; not on CPU
    auto        `all_to_all` if a round of it is smaller than all the peers' tokens, else `gather`. Never `ragged`: it
                saves more bandwidth, but it has been tested by an emulation only, so it has to be asked for

The last two are in token_exchange.py. Decoding's few tokens are always gathered. These two files are the only ones
with hand-written collectives.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Layout, ModelConfig
from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.mesh.sharding import row_axes, spec
from dsv3_jax.mesh.token_exchange import all_to_all, ragged, send_capacity, to_local_ids
from dsv3_jax.ops.expert_stack import Experts, ExpertStack, GradCarry, open_stack, read_only, take_layer
from dsv3_jax.ops.varying import as_varying

# Names of the last axes of a stack of experts, w_gate, w_up and w_down, by which `sharding.RULES` shards it.
AXIS_NAMES = ("expert", "dim", "hidden"), ("expert", "dim", "hidden"), ("expert", "hidden", "dim")


class Sharded(NamedTuple):
    """How the mesh shards the tokens and experts of one call."""

    rows: tuple[str, ...]  # axes along which each device has tokens of its own
    stack: Experts  # the stack's PartitionSpecs
    peers: int  # devices along "expert" that share the experts out; 1: each has all

    @property
    def hidden(self) -> bool:
        """Whether hidden units are sharded."""
        return self.stack.w_gate[-1] is not None

    @property
    def width(self) -> bool:
        """Whether the width D is sharded."""
        return self.stack.w_gate[-2] is not None


def _sharded(tokens: int, experts: Experts, layout: Layout) -> Sharded:
    mesh = jax.sharding.get_abstract_mesh()
    stack = Experts._make(
        spec(names, w.shape, mesh, fsdp=layout.fsdp) for names, w in zip(AXIS_NAMES, experts, strict=True)
    )
    return Sharded(row_axes(tokens), stack, mesh.shape["expert"] if stack.w_gate[1] else 1)


def pick_expert_comm(
    cfg: ModelConfig, layout: Layout, tokens: int, peers: int
) -> Literal["gather", "all_to_all", "ragged"]:
    """Return the method that `Layout.expert_comm` means for so many tokens a device.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = preset("v3")  # a token's 8 experts are on at most 4 of 8 devices
        >>> [pick_expert_comm(cfg, Layout(), tokens=1000, peers=peers) for peers in (2, 8)]
        ['gather', 'all_to_all']
    """
    if layout.expert_comm != "auto":
        return layout.expert_comm
    return "all_to_all" if send_capacity(cfg, layout, tokens, peers) < tokens else "gather"


def grouped_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    stack: ExpertStack,
    kernels: Kernels,
    cfg: ModelConfig,
    layout: Layout,
) -> tuple[Float[Array, "n D"], ExpertStack, Float[Array, ""]]:
    """Run `Kernels.grouped_swiglu` on the mesh of the context.

    Returns: (y, the stack for the next use, copies of a token sent to another device, mean over tokens).
    """
    how = _sharded(x.shape[0], stack.weights, layout)
    grad = None if stack.grad is None else stack.grad.consume()

    def local(x, ids, gates, weights, grad, layer):
        held = ExpertStack(weights, grad, layer)
        if not how.width:
            x, gates = (as_varying(a, weights.w_gate) for a in (x, gates))
            y, held, sent = meet(x, ids, gates, held)
            return y, held.grad, sent
        one, held = take_layer(held)
        one = Experts(*(w[None] for w in _gather_width(one, how, x.dtype)))
        x, gates = (as_varying(a, one.w_gate) for a in (x, gates))
        y, _, sent = meet(x, ids, gates, read_only(one) if grad is None else open_stack(one))
        return y, held.grad, sent

    def meet(x, ids, gates, held: ExpertStack):
        """This device's tokens and all their experts, whose matrices are complete in width."""
        n, apart = x.shape[0], how.peers > 1 and "expert" in how.rows
        comm = pick_expert_comm(cfg, layout, n, how.peers) if apart else "gather"
        if comm == "gather":
            return _gathered(kernels.grouped_swiglu, x, ids, gates, held, how)
        if comm == "all_to_all":
            slots = send_capacity(cfg, layout, n, how.peers)
            y, held, sent = all_to_all(x, ids, gates, held, kernels, peers=how.peers, slots=slots)
        else:
            y, held, sent = ragged(x, ids, gates, held, kernels, peers=how.peers)
        return (jax.lax.psum(y, "tensor") if how.hidden else y), held, sent

    tokens = P(how.rows)
    in_grad = None if grad is None else GradCarry(how.stack, P())
    spread = jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, how.stack, in_grad, P()),
        out_specs=(tokens, in_grad, P()),
    )
    y, grad, sent = spread(x, expert_ids, gates, stack.weights, grad, stack.layer)
    return y, stack.at(stack.layer, grad), sent


def decode_experts(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    stack: ExpertStack,
    kernels: Kernels,
    layout: Layout,
) -> Float[Array, "n D"]:
    """Run `Kernels.decode_experts` on the mesh of the context: each device reads only experts that it holds."""
    how = _sharded(x.shape[0], stack.weights, layout)

    def local(x, ids, gates, weights, layer):
        held = ExpertStack(weights, None, layer)

        def run(x, ids, gates, held):
            if how.width:
                held = read_only(Experts(*(w[None] for w in _gather_width(take_layer(held)[0], how, x.dtype))))
            x, gates = (as_varying(a, held.weights.w_gate) for a in (x, gates))
            return kernels.decode_experts(x, ids, gates, held, local=how.peers == 1), held

        return _gathered(run, x, ids, gates, held, how)[0]

    tokens = P(how.rows)
    spread = jax.shard_map(local, in_specs=(tokens, tokens, tokens, how.stack, P()), out_specs=tokens)
    return spread(x, expert_ids, gates, stack.weights, stack.layer)


def _gathered(run, x, ids, gates, held: ExpertStack, how: Sharded):
    """(y of this device's tokens, the stack for the next use, copies of a token sent)."""
    shared, sent = how.peers > 1, 0.0
    if shared and "expert" in how.rows:
        x, ids, gates = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, ids, gates))
        sent = how.peers - 1.0
    if shared:
        ids, gates = to_local_ids(ids, gates, held.num_experts)
    y, held = run(x, ids, gates, held)
    if how.hidden:
        y = jax.lax.psum(y, "tensor")
    if shared and "expert" in how.rows:
        y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
    elif shared:
        y = jax.lax.psum(y, "expert")
    return y, held, jnp.asarray(sent, jnp.float32)


def _gather_width(one: Experts, how: Sharded, dtype) -> Experts:
    """One layer's matrices [E, …] cast, and gathered along "data", which shards their width D."""
    # If "data" does not shard the tokens, its devices all do the same with them, and JAX must know.
    to = "varying" if "data" in how.rows else "invarying"
    return Experts(
        *(
            jax.lax.all_gather(w.astype(dtype), "data", axis=names.index("dim"), tiled=True, to=to)
            for names, w in zip(AXIS_NAMES, one, strict=True)
        )
    )
