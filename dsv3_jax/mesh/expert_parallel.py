"""Expert parallelism: every device runs the experts it holds, on the tokens of all its peers.

Along the mesh axis "expert" each device holds E/P experts and its own share of the batch. Along
"tensor" each holds a part of every expert's hidden units, and the parts' outputs are added. Under
fsdp a layer's matrices are gathered along "data" in the layer's turn. No token is dropped, and
results depend on the mesh by the order of additions only.

`Layout.expert_comm` says how tokens reach other devices' experts, and how their sums return:

    gather      peers gather one another's tokens; a reduce-scatter adds what each computed of them
    all_to_all  a token goes to the devices that hold its experts, once to each, in rounds of a
                fixed size; with `expert_nodes` in two hops, once to each node and on from there
    auto        `all_to_all` if a round of it is smaller than all the peers' tokens, else `gather`

`all_to_all` is in token_exchange.py. Decoding's few tokens are always gathered. These two files
are the only ones that send tokens by hand; elsewhere only sums (`psum`) are written out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Layout, ModelConfig
from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.mesh.rounds import round_size
from dsv3_jax.mesh.sharding import spec, token_axes
from dsv3_jax.mesh.token_exchange import Experts, exchange, to_local_ids
from dsv3_jax.ops.varying import as_varying

# Names of the axes of w_gate, w_up and w_down, by which `sharding.RULES` shards them.
AXIS_NAMES = ("expert", "dim", "hidden"), ("expert", "dim", "hidden"), ("expert", "hidden", "dim")


class Sharded(NamedTuple):
    """How the mesh shards the tokens and experts of one call."""

    rows: tuple[str, ...]  # axes along which each device has its own tokens
    experts: tuple[P, ...]  # of w_gate, w_up and w_down
    peers: int  # devices along "expert" that share the experts out; 1: each has all

    @property
    def hidden(self) -> bool:
        """Whether hidden units are sharded."""
        return self.experts[0][2] is not None

    @property
    def gathered(self) -> bool:
        """Whether "data" shards the experts, by number or by their width D."""
        return bool(_along_data(self.experts[0]))


def pick_expert_comm(
    cfg: ModelConfig, layout: Layout, tokens: int, peers: int
) -> Literal["gather", "all_to_all"]:
    """Return the method that `Layout.expert_comm` means for so many tokens a device.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = preset("v3")  # a token's 8 experts are on at most 4 of 8 devices
        >>> [pick_expert_comm(cfg, Layout(), tokens=1000, peers=peers) for peers in (2, 8)]
        ['gather', 'all_to_all']
    """
    if layout.expert_comm != "auto":
        return layout.expert_comm
    if layout.expert_nodes > 1:
        return "all_to_all"
    return "all_to_all" if round_size(cfg, layout, tokens, peers).tokens < tokens else "gather"


def grouped_swiglu(
    x: Float[Array, "*n D"],
    expert_ids: Int[Array, "*n K"],
    gates: Float[Array, "*n K"],
    experts: Experts,
    *,
    kernels: Kernels,
    cfg: ModelConfig,
    layout: Layout,
) -> tuple[Float[Array, "*n D"], dict[str, Float[Array, ""]]]:
    """Run `ops.dispatch.grouped_swiglu` on the mesh of the context.

    Returns: (y, metrics: "tokens_sent", copies of a token sent to another device, mean over tokens;
        with `expert_nodes` also "tokens_sent_far", those to another node).
    """

    def meet(
        how: Sharded,
        x: Array,
        ids: Array,
        gates: Array,
        experts: Experts,
        turned: tuple[Array, ...] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        tokens = x.shape[0]
        apart = how.peers > 1 and "expert" in how.rows
        comm = pick_expert_comm(cfg, layout, tokens, how.peers) if apart else "gather"
        if comm == "gather":
            run = partial(kernels, "grouped_swiglu", complete=how.peers == 1)
            return _gathered(run, how, x, ids, gates, experts, turned)

        y, by_hop = exchange(x, ids, gates, experts, kernels=kernels, cfg=cfg, layout=layout)
        if how.hidden:  # each device has a part of the hidden units
            y = jax.lax.psum(y, "tensor")
        if len(by_hop) == 1:
            return y, {"tokens_sent": by_hop[0]}
        far, near = by_hop
        return y, {"tokens_sent": far + near, "tokens_sent_far": far}

    turn = kernels.device.turns_experts and kernels.target.precision == "none"
    return _on_shards(meet, layout, x, expert_ids, gates, experts, turn=turn)


def decode_experts(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: Experts,
    *,
    kernels: Kernels,
    layout: Layout,
) -> Float[Array, "n D"]:
    """Run `ops.dispatch.decode_experts` on the mesh; a device reads only experts that it holds."""
    meet = partial(_gathered, partial(kernels, "decode_experts"))
    return _on_shards(meet, layout, x, expert_ids, gates, experts)[0]


def _on_shards(
    meet: Callable,
    layout: Layout,
    x: Array,
    ids: Array,
    gates: Array,
    experts: Experts,
    turn: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Call `meet(how, x, ids, gates, experts)` on each device, whose experts have all of D.

    It gets tokens [n, …]. Those of rows [B, T, …] are joined there: an array sharded by both axes
    has no sharding once they are one.

    Args: turn: gathered experts go along transposed as well.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = token_axes(x.shape[:-1])
    specs = tuple(
        spec(names, w.shape, mesh, fsdp=layout.fsdp)
        for names, w in zip(AXIS_NAMES, experts, strict=True)
    )
    how = Sharded(sum(axes, ()), specs, mesh.shape["expert"])

    def local(x: Array, ids: Array, gates: Array, experts: Experts) -> tuple[Array, dict]:
        shape = x.shape
        x, ids, gates = (a.reshape(-1, a.shape[-1]) for a in (x, ids, gates))

        # Under fsdp a layer's experts are gathered here, in the layer's turn.
        turned = ()
        if how.gathered and turn:
            turned = (_gather(jax.lax.stop_gradient(experts), how, x.dtype, (0, 2, 1)),)
        if how.gathered:
            experts = _gather(experts, how, x.dtype)

        # All of one type, so that the gradients of experts are summed over devices here, once.
        experts = tuple(as_varying(w, x) for w in experts)
        x, gates = (as_varying(a, experts[0]) for a in (x, gates))
        y, sent = meet(how, x, ids, gates, experts, *turned)
        return y.reshape(shape), sent

    tokens = P(*axes)
    in_specs = (tokens, tokens, tokens, specs)
    return jax.shard_map(local, in_specs=in_specs, out_specs=(tokens, P()))(x, ids, gates, experts)


def _gathered(
    run: Callable,
    how: Sharded,
    x: Array,
    ids: Array,
    gates: Array,
    experts: Experts,
    turned: tuple[Array, ...] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """(y of this device's tokens, copies of a token sent), by `run` on the tokens of all peers."""
    shared = how.peers > 1
    apart = shared and "expert" in how.rows

    # Every peer gets the tokens of all, and runs the experts that it holds.
    if apart:
        x, ids, gates = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, ids, gates))
    if shared:
        ids, gates = to_local_ids(ids, gates, experts[0].shape[0])
    settings = {} if turned is None else {"turned": turned}
    y = run(x, ids, gates, *experts, **settings)

    # The sums over hidden units, and over all peers' experts, for this device's own tokens.
    if how.hidden:
        y = jax.lax.psum(y, "tensor")
    if apart:
        y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
    elif shared:
        y = jax.lax.psum(y, "expert")
    return y, {"tokens_sent": jnp.asarray(how.peers - 1.0 if apart else 0.0, jnp.float32)}


def _gather(
    experts: tuple[Array, ...], how: Sharded, dtype: Any, order: Any = (0, 1, 2)
) -> tuple[Array, ...]:
    """The experts [E, …] cast, their axes in that order, and gathered along "data"."""
    # If "data" does not shard the tokens, its devices all do the same with them, and JAX must know.
    to = "varying" if "data" in how.rows else "invarying"

    def gather(of: P, w: Array) -> Array:
        axis = order[_along_data(of)[0]]
        return jax.lax.all_gather(
            w.astype(dtype).transpose(order), "data", axis=axis, tiled=True, to=to
        )

    return tuple(gather(of, w) for of, w in zip(how.experts, experts, strict=True))


def _along_data(spec: P) -> list[int]:
    """The axes of an array that "data" shards: one or none."""
    return [i for i, axes in enumerate(spec) if "data" in (axes or ())]
