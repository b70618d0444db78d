"""The DeepSeekMoE layer: router, routed experts, shared experts, and what is counted of them.

The routed experts' matrices of all layers are in one `Experts` module beside the layers, not inside them. A loop over
layers then reads expert `[layer, e]` in place and never copies all of a layer's experts. A MoE that is used alone owns
its experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Execution, ModelConfig
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.mesh import expert_parallel
from dsv3_jax.mesh.sharding import on_mesh, shard_map_over_batch
from dsv3_jax.model.context import Context, from_zero, make_context
from dsv3_jax.model.layers import Frozen, SwiGLU, merge_frozen, param
from dsv3_jax.ops import balance, dispatch, expert_stack, routing
from dsv3_jax.ops.expert_stack import ExpertStack
from dsv3_jax.ops.varying import as_varying


class RouterBias(nnx.Variable):
    """The loss-free correction bias, float32 [E]: it takes no gradient, and no optimizer updates it."""


class LayerRouting(NamedTuple):
    """The decisions of one layer's router for a batch, and their measures."""

    expert_ids: Array  # int32 [B, T, K]
    gates: Array  # float32 [B, T, K]
    score_entropy: Array  # float32 [B, T]: of the scores of all experts; 1 is even, see balance.entropy
    load: Array  # float32 [E]: assignments of tokens that count
    balance_loss: Array  # float32 []: weighted, averaged over sequences
    dropped: Array  # float32 []: share of assignments dropped; 0 without capacity_factor
    tokens_sent: Array  # float32 []: copies of a token that are sent to another device's experts; 0 without a mesh
    bias_measure: Array | None = None  # float32 [E]: what the bias's rule needs beside the load, see balance.RULES
    scores: Array | None = None  # float32 [B, T, E]: of all experts, without bias; None if the context keeps none


class Experts(nnx.Module):
    """The routed experts' matrices of `layers` layers: [L, E, D, F] twice and [L, E, F, D].

    Example:
        >>> from dsv3_jax.presets import preset
        >>> Experts(preset("tiny"), layers=3, rngs=nnx.Rngs(0)).w_gate.shape  # [L, E, D, F]
        (3, 16, 128, 64)
    """

    def __init__(self, cfg: ModelConfig, layers: int, *, rngs: nnx.Rngs):
        lead = (layers, cfg.num_experts)
        gate, up, down = expert_parallel.AXIS_NAMES
        self.w_gate = param(rngs, (*lead, cfg.dim, cfg.expert_dim), gate, cfg.init_std)
        self.w_up = param(rngs, (*lead, cfg.dim, cfg.expert_dim), up, cfg.init_std)
        self.w_down = param(rngs, (*lead, cfg.expert_dim, cfg.dim), down, cfg.init_std)

    @property
    def adapted(self) -> bool:
        """Whether low-rank adapters change the matrices, see `training.lora`."""
        value = self.w_gate.get_value()
        return isinstance(value, Frozen) and value.left is not None

    def open(self, kernels: Kernels, *, train: bool) -> ExpertStack:
        """The matrices as a stack: one that takes a gradient, to be closed after its last layer, or a read-only one."""
        weights = expert_stack.Experts(*(merge_frozen(w)[...] for w in (self.w_gate, self.w_up, self.w_down)))
        frozen = isinstance(self.w_gate.get_value(), Frozen) and not self.adapted
        return kernels.open_experts(weights, frozen=frozen) if train else expert_stack.read_only(weights)


class MoE(nnx.Module):
    """y = Σ_chosen g_e FFN_e(x) + FFN_shared(x); the block adds the residual.

    Source: DeepSeekMoE (arXiv 2401.06066); DeepSeek-V3 report, section 2.1.2.

    Args:
        execution, kernels: how to compute; `kernels` defaults to the best of the default device.
        stacked: the experts' matrices are in the context's stack. False: the module owns those of one layer.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> moe = ds.MoE(ds.preset("tiny"), rngs=nnx.Rngs(0))
    >>> y, routing = moe(jnp.ones((2, 8, 128)))
    >>> y.shape, routing.load.sum()  # 16 tokens, 4 experts each
    ((2, 8, 128), Array(64., dtype=float32))
    """

    def __init__(
        self,
        cfg: ModelConfig,
        execution: Execution | None = None,
        *,
        rngs: nnx.Rngs,
        kernels: Kernels | None = None,
        stacked: bool = False,
    ):
        self.w_router = param(rngs, (cfg.dim, cfg.num_experts), ("dim", None), cfg.init_std, exact=True)
        self.bias = RouterBias(jnp.zeros((cfg.num_experts,), jnp.float32))
        self.rule, self.router = balance.rule_of(cfg), routing.ROUTERS[cfg.router]
        zeros = jnp.zeros((cfg.dim, cfg.num_experts), jnp.float32)  # as in arXiv 1701.06538, appendix A
        self.w_noise = nnx.Param(zeros, axes=("dim", None), exact=True) if self.router.has_noise else None
        self.cfg, self.kernels = cfg, kernels or prepare(execution)
        self.layout = (execution or Execution()).layout
        shared = cfg.num_shared_experts * cfg.expert_dim
        self.shared = SwiGLU(cfg.dim, shared, cfg.init_std, rngs=rngs, kernels=self.kernels) if shared else None
        self.experts = None if stacked else Experts(cfg, 1, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"] | None = None,
        *,
        tokens: Int[Array, "B T"] | None = None,
        keys: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerRouting]:
        """Mix the experts that the module owns.

        Args:
            mask: tokens that count for load and balance losses. None means all.
            tokens: ids, for router "hash".
            keys: a random key for each row, for the noise of router "noisy_topk". None means no noise.
        Returns: (y, what the router did).
        Raises: ValueError if the module owns no experts, or the router needs tokens and gets none.
        """
        if self.experts is None:
            raise ValueError("stacked=True: this MoE owns no experts; call `mix` with a stack in the context")
        ctx = make_context(self.cfg, from_zero(*x.shape[:2]), tokens=tokens, keys=keys)
        stack = self.experts.open(self.kernels, train=True)
        y, stack, routing = self.mix(x, ctx._replace(experts=stack, mask=ctx.mask if mask is None else mask))
        return self.kernels.close_experts(y, stack), routing

    def mix(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, ExpertStack, LayerRouting]:
        """Mix the experts of the context's stack.

        Returns: (y [B, T, D], the stack for the next layer, what the router did).
        """
        cfg, stack = self.cfg, ctx.experts
        assert stack is not None
        picked, log_sums = self.route(x, ctx)
        flat, ids, gates, scores = (a.reshape(-1, a.shape[-1]) for a in (x, *picked))
        load, sequence_loss, score_entropy, measure = self._measure(picked, ctx.mask)
        if ctx.muted is not None:
            gates = jnp.where((ctx.muted[0] == ctx.layer) & (ctx.muted[1] == ids), 0.0, gates)
        y, stack, dropped, tokens_sent = self._run_experts(flat, ids, gates, stack, ctx.may_drop)
        y = y.reshape(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        balance_loss = cfg.balance.sequence_alpha * sequence_loss
        if cfg.balance.switch_alpha:
            balance_loss += cfg.balance.switch_alpha * balance.switch_loss(scores, ids, ctx.mask.reshape(-1))
        if log_sums is not None:
            balance_loss += cfg.balance.z_alpha * balance.z_loss(log_sums, ctx.mask)
        stats = LayerRouting(
            picked.expert_ids, picked.gates, score_entropy, load, balance_loss, dropped, tokens_sent, measure,
            picked.scores if ctx.keep_scores else None,
        )  # fmt: skip
        return y, stack, stats

    @jax.named_scope("experts")
    def _run_experts(
        self, x: Array, ids: Array, gates: Array, stack: ExpertStack, may_drop: bool
    ) -> tuple[Array, ExpertStack, Array, Array]:
        """Returns: (y [tokens, D], the stack for the next layer, share of assignments dropped, copies sent away)."""
        none = jnp.zeros((), jnp.float32)
        few = stack.grad is None and gates.size <= dispatch.FEW_CHOICES * self.cfg.num_experts
        if self.cfg.capacity_factor is not None and may_drop and stack.grad is not None:
            factor = self.cfg.capacity_factor
            y, stack, dropped = self.kernels.capacity_swiglu(x, ids, gates, stack, factor=factor)
            return y, stack, dropped, none
        if on_mesh() and few:
            return expert_parallel.decode_experts(x, ids, gates, stack, self.kernels, self.layout), stack, none, none
        if on_mesh():
            y, stack, sent = expert_parallel.grouped_swiglu(x, ids, gates, stack, self.kernels, self.cfg, self.layout)
            return y, stack, none, sent
        if few:
            return self.kernels.decode_experts(x, ids, gates, stack), stack, none, none
        return *self.kernels.grouped_swiglu(x, ids, gates, stack), none, none

    @jax.named_scope("router")
    def route(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[routing.Routing, Array | None]:
        """Choose each token's experts; logits and all that follows in float32, as the reference does.

        Returns: (choice, [B, T, …]; ln Σ exp of each token's logits, [B, T], if the z-loss needs it).
        """
        if self.router.reads_tokens and ctx.tokens is None:
            raise ValueError(f"tokens=None: router={self.cfg.router!r} chooses by token ids; give tokens [B, T]")
        keys = ctx.keys
        noisy = (None, None) if keys is None or self.w_noise is None else (self.w_noise[...], jnp.asarray(ctx.layer))

        def local(w_router, bias, w_noise, layer, x, tokens, keys):
            flat, needs = x.reshape(-1, x.shape[-1]).astype(jnp.float32), {}
            logits = self.kernels.exact_product(flat, w_router)
            if tokens is not None:
                needs["tokens"] = tokens.reshape(-1)
            if keys is not None:
                needs["spread"] = self.kernels.exact_product(flat, w_noise)
                needs["normal"] = routing.noise(keys, layer, x.shape[1], self.cfg.num_experts).reshape(logits.shape)
            picked = routing.route(logits, bias, self.cfg, **needs)
            log_sums = jax.nn.logsumexp(logits, axis=-1).reshape(x.shape[:2]) if self.cfg.balance.z_alpha else None
            return (), (jax.tree.map(lambda a: a.reshape(*x.shape[:2], -1), picked), log_sums)

        # Each device its own rows: the compiler would gather the scores of all tokens to find each one's largest.
        weights = (self.w_router[...], self.bias[...], *noisy)
        return shard_map_over_batch(local, weights, x, ctx.tokens, keys)[1]

    def _measure(self, picked: routing.Routing, mask: Bool[Array, "B T"]) -> tuple[Array, Array, Array, Array | None]:
        """(load [E]; sequence-wise loss without its weight, mean over sequences, 0 if it has none; each token's entropy
        of scores [B, T]; what the bias's rule needs beside the load [E])."""
        cfg, of_tokens, of_batch = self.cfg, self.rule and self.rule.of_tokens, self.rule and self.rule.of_batch

        def local(bias, picked, mask):
            load = balance.load(picked.expert_ids, cfg.num_experts, mask)
            total = jnp.zeros((), jnp.float32)
            if cfg.balance.sequence_alpha:
                total = balance.sequence_loss(picked.scores, cfg.experts_per_token, mask).sum()
            # Metric only; stop_gradient skips a gradient that is always zero.
            entropy = balance.entropy(jax.lax.stop_gradient(picked.scores))
            tokens = None
            if of_tokens:
                flat = of_tokens(picked.scores.reshape(-1, cfg.num_experts), bias, cfg.experts_per_token)
                tokens = flat.reshape(picked.scores.shape)
            return (load, as_varying(total, load)), (entropy, tokens)

        bias = self.bias[...]
        (load, total), (entropy, tokens) = shard_map_over_batch(local, (bias if of_tokens else None,), picked, mask)
        measure = of_batch(tokens, mask, bias, cfg.experts_per_token) if of_batch else None
        return load, total / mask.shape[0], entropy, measure
