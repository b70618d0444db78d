"""The DeepSeekMoE layer: router, routed experts, shared experts, and what is counted of them.

The routed experts' matrices of all layers stand in one `Experts` module beside the layers, not inside them: a
loop over layers then reads expert `[layer, e]` where it lies and never copies a layer's whole set.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.mesh import expert_parallel
from dsv3_jax.mesh.sharding import by_rows, on_mesh
from dsv3_jax.model.layers import SwiGLU, param
from dsv3_jax.ops import balance, dispatch, routing
from dsv3_jax.ops.products import few_rows_product, product
from dsv3_jax.ops.varying import as_varying


class RouterBias(nnx.Variable):
    """The loss-free correction bias, float32 [E]: no gradient and no optimizer ever touch it."""


class LayerRouting(NamedTuple):
    """What one layer's router did with a batch."""

    expert_ids: Array  # int32 [B, T, K]
    gates: Array  # float32 [B, T, K]
    score_entropy: Array  # float32 [B, T]: of the scores of all experts; 1 is even, see balance.entropy
    load: Array  # float32 [E]: assignments of tokens that count
    balance_loss: Array  # float32 []: weighted, averaged over sequences
    dropped: Array  # float32 []: share of assignments dropped; 0 but for dispatch="capacity"
    crossed: Array  # float32 []: copies of a token that go to another device's experts; 0 without a mesh


class Experts(nnx.Module):
    """The routed experts' matrices of `layers` layers: [L, E, D, F] twice and [L, E, F, D]."""

    def __init__(self, cfg: ModelConfig, layers: int, *, rngs: nnx.Rngs):
        lead = (layers, cfg.num_experts)
        gate, up, down = expert_parallel.NAMES
        self.w_gate = param(rngs, (*lead, cfg.dim, cfg.expert_dim), gate, cfg.init_std)
        self.w_up = param(rngs, (*lead, cfg.dim, cfg.expert_dim), up, cfg.init_std)
        self.w_down = param(rngs, (*lead, cfg.expert_dim, cfg.dim), down, cfg.init_std)

    def arrays(self) -> dispatch.Experts:
        return dispatch.Experts(self.w_gate[...], self.w_up[...], self.w_down[...])


class MoE(nnx.Module):
    """y = Σ_chosen g_e FFN_e(x) + FFN_shared(x); the block adds the residual.

    Source: DeepSeekMoE (arXiv 2401.06066); DeepSeek-V3 report, section 2.1.2.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.w_router = param(rngs, (cfg.dim, cfg.num_experts), ("dim", None), cfg.init_std, exact=True)
        self.bias = RouterBias(jnp.zeros((cfg.num_experts,), jnp.float32))
        shared = cfg.num_shared_experts * cfg.expert_dim
        self.shared = SwiGLU(cfg.dim, shared, cfg.init_std, rngs=rngs) if shared else None
        self.cfg = cfg

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        experts: dispatch.Experts,
        thread: dispatch.Experts,
        layer: Int[Array, ""],
    ) -> tuple[Array, LayerRouting, dispatch.Experts]:
        """Args: x; mask of tokens that count for load; the stack of experts, its thread, and which layer of it.

        To be called once for each layer of the stack, and then `end_thread`.
        Returns: (y [B, T, D], what the router did, the thread).
        """
        cfg = self.cfg
        picked = self.route(x)
        flat, ids, gates, scores = (a.reshape(-1, a.shape[-1]) for a in (x, *picked))
        load, sequence_loss, score_entropy = self._measure(picked, mask)
        dropped = crossed = jnp.zeros((), jnp.float32)
        if cfg.dispatch == "capacity":
            one, thread = dispatch.take_layer(experts, thread, layer)
            one = jax.tree.map(lambda w: w.astype(x.dtype), one)
            y, dropped = dispatch.capacity_swiglu(flat, ids, gates, *one, factor=cfg.capacity_factor)
        else:
            backend = pick_backend(cfg.dispatch)
            if on_mesh():
                y, thread, crossed = expert_parallel.routed_swiglu(
                    flat, ids, gates, experts, thread, layer, backend=backend, cfg=cfg
                )
            else:
                y, thread = dispatch.routed_swiglu_in_stack(
                    flat, ids, gates, experts, thread, layer, backend=backend, once=True
                )
        y = y.reshape(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        balance_loss = cfg.balance.sequence_alpha * sequence_loss
        if cfg.balance.switch_alpha:
            balance_loss += cfg.balance.switch_alpha * balance.switch_loss(scores, ids, mask.reshape(-1))
        stats = LayerRouting(picked.expert_ids, picked.gates, score_entropy, load, balance_loss, dropped, crossed)
        return y, stats, thread

    def decode(
        self, x: Float[Array, "B T D"], experts: dispatch.Experts | dispatch.WideExperts, layer: Int[Array, ""]
    ) -> Array:
        """The layer for a few tokens, its experts in the stack or already side by side. Returns y [B, T, D]."""
        flat, ids, gates, _ = (a.reshape(-1, a.shape[-1]) for a in (x, *self.route(x, few_rows_product)))
        if isinstance(experts, dispatch.WideExperts):
            y = dispatch.wide_swiglu(flat, ids, gates, experts, self.cfg.num_experts)
        elif on_mesh():
            y = expert_parallel.few_tokens_swiglu(flat, ids, gates, experts, layer, layout=self.cfg.layout)
        else:
            y = dispatch.few_tokens_swiglu(flat, ids, gates, experts, layer)
        y = y.reshape(x.shape)
        return y if self.shared is None else y + self.shared.decode(x)

    def route(self, x: Float[Array, "B T D"], product: Callable = product) -> routing.Routing:
        """Each token's experts, [B, T, …]; logits and all that follows in float32, as the reference does."""

        def local(w_router, bias, x):
            logits = product(x.reshape(-1, x.shape[-1]).astype(jnp.float32), w_router)
            picked = routing.route(logits, bias, self.cfg)
            return (), jax.tree.map(lambda a: a.reshape(*x.shape[:2], -1), picked)

        # Row by row, for the compiler would gather the scores of all tokens to find each one's largest.
        return by_rows(local, (self.w_router[...], self.bias[...]), x)[1]

    def _measure(self, picked: routing.Routing, mask: Bool[Array, "B T"]) -> tuple[Array, Array, Array]:
        """(load [E]; the sequence-wise loss without its weight, mean over sequences; 0 where it has none; each token's
        entropy of scores [B, T])."""
        cfg = self.cfg

        def local(picked, mask):
            load = balance.load(picked.expert_ids, cfg.num_experts, mask)
            total = jnp.zeros((), jnp.float32)
            if cfg.balance.sequence_alpha:
                total = balance.sequence_loss(picked.scores, cfg.experts_per_token, mask).sum()
            # Looked at, never learnt from: without the stop its zero gradient would be worked out as well.
            return (load, as_varying(total, load)), balance.entropy(jax.lax.stop_gradient(picked.scores))

        (load, total), score_entropy = by_rows(local, (), picked, mask)
        return load, total / mask.shape[0], score_entropy


def end_thread(cfg: ModelConfig, x: Array, thread: dispatch.Experts) -> Array:
    """x, the output of a stack's last layer, as it is; see `dispatch.end_thread`."""
    return dispatch.end_thread(x, thread, backend=pick_backend(cfg.dispatch))


def pick_backend(dispatch_name: str) -> str:
    """The dispatch backend that "auto" means here: `blocks` on CPU, `ragged_dot` elsewhere."""
    if dispatch_name != "auto":
        return dispatch_name
    return "blocks" if jax.default_backend() == "cpu" else "ragged_dot"
