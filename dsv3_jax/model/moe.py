"""The DeepSeekMoE layer: router, routed experts, shared experts, and what is counted of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Execution, ModelConfig, check_inputs
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.mesh import expert_parallel
from dsv3_jax.mesh.sharding import on_mesh, shard_map_over_batch
from dsv3_jax.model.context import Context, from_zero, make_context
from dsv3_jax.model.layers import CHOICE, SwiGLU, draws_together, param
from dsv3_jax.ops import balance, dispatch, routing
from dsv3_jax.ops.varying import as_varying


class RouterBias(nnx.Variable):
    """The loss-free correction bias, float32 [E], without gradient: no optimizer updates it."""


class LayerRouting(NamedTuple):
    """The decisions of one layer's router for a batch, and their measures."""

    expert_ids: Array  # int32 [B, T, K]
    gates: Array  # float32 [B, T, K]
    # float32 [B, T]: of the scores of all experts; 1 is even, see balance.entropy
    score_entropy: Array
    load: Array  # float32 [E]: assignments of tokens that count
    balance_loss: Array  # float32 []: weighted; each loss has its own mean, see ops.balance
    # float32 [E]: what the bias's rule needs beside the load, see balance.RULES
    bias_measure: Array | None = None
    # float32 [B, T, E]: of all experts, without bias; None if nobody watches them
    scores: Array | None = None


class Experts(nnx.Module):
    """The routed experts' matrices: [E, D, F] twice and [E, F, D]; `layers` makes it a stack.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> Experts(preset("tiny"), rngs=nnx.Rngs(0)).w_gate.shape  # [E, D, F]
        (16, 128, 64)
    """

    def __init__(self, cfg: ModelConfig, layers: int | None = None, *, rngs: nnx.Rngs):
        lead = (cfg.num_experts,) if layers is None else (layers, cfg.num_experts)
        gate, up, down = expert_parallel.AXIS_NAMES
        self.w_gate = param(rngs, (*lead, cfg.dim, cfg.expert_dim), gate, cfg.init_std)
        self.w_up = param(rngs, (*lead, cfg.dim, cfg.expert_dim), up, cfg.init_std)
        self.w_down = param(rngs, (*lead, cfg.expert_dim, cfg.dim), down, cfg.init_std)


class MoE(nnx.Module):
    """y = Σ_chosen g_e FFN_e(x) + FFN_shared(x); the block adds the residual.

    Source: DeepSeekMoE (arXiv 2401.06066); DeepSeek-V3 report, section 2.1.2.

    Args:
        execution, kernels: how to compute; `kernels` defaults to the best of the default device.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> moe = ds.MoE(ds.preset("tiny"), rngs=nnx.Rngs(0))
    >>> y, routing = jax.jit(moe)(jnp.ones((2, 8, 128)))
    >>> y.shape, routing.load.sum()  # 16 tokens, 4 experts each
    ((2, 8, 128), Array(64., dtype=float32))
    """

    @draws_together
    def __init__(
        self,
        cfg: ModelConfig,
        execution: Execution | None = None,
        *,
        rngs: nnx.Rngs,
        kernels: Kernels | None = None,
    ):
        self.w_router = param(
            rngs, (cfg.dim, cfg.num_experts), ("dim", None), cfg.init_std, exact=True
        )
        self.bias = RouterBias(jnp.zeros((cfg.num_experts,), jnp.float32))
        self.rule = balance.rule_of(cfg)
        self.router = routing.ROUTERS[cfg.router]
        # as in arXiv 1701.06538, appendix A
        zeros = jnp.zeros((cfg.dim, cfg.num_experts), jnp.float32)
        self.w_noise = (
            nnx.Param(zeros, axes=("dim", None), exact=True) if self.router.has_noise else None
        )
        self.cfg = cfg
        self.kernels = kernels or prepare(execution)
        self.layout = (execution or Execution()).layout
        shared = cfg.num_shared_experts * cfg.expert_dim
        self.shared = (
            SwiGLU(cfg.dim, shared, cfg.init_std, rngs=rngs, kernels=self.kernels)
            if shared
            else None
        )
        self.experts = Experts(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"] | None = None,
        *,
        tokens: Int[Array, "B T"] | None = None,
        keys: Array | None = None,
        expert_ids: Int[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerRouting]:
        """Mix the experts, for training.

        Args:
            mask: tokens that count for load and balance losses. None means all.
            tokens: ids, for router "hash".
            keys: a random key for each row, for the noise of router "noisy_topk". None means no
                noise.
            expert_ids: experts in place of the router's choice, see `ops.routing.replay`.
        Returns: (y, what the router did).
        Raises: ValueError if the router needs tokens and gets none, or the shapes are others.
        """
        check_inputs(self.cfg.dim, x=x, mask=mask, tokens=tokens)
        if expert_ids is not None:
            check_expert_ids(self.cfg, expert_ids, x.shape[:2])
        ctx = make_context(self.cfg, from_zero(*x.shape[:2]), tokens=tokens, keys=keys)
        ctx = ctx._replace(expert_ids=expert_ids)
        return self.mix(x, ctx if mask is None else ctx._replace(mask=mask))[:2]

    def mix(
        self, x: Float[Array, "B T D"], ctx: Context
    ) -> tuple[Array, LayerRouting, dict[str, Array]]:
        """Train, prefill or decode, by the context. Returns (y [B, T, D], routing, metrics)."""
        routed, metrics = self.route(x, ctx)
        flat, ids, gates = (
            a.reshape(-1, a.shape[-1]) for a in (x, routed.expert_ids, routed.gates)
        )
        if ctx.options.edit_gates is not None:
            gates = ctx.options.edit_gates(ctx.layer, ids, gates)
        y, dropped, tokens_sent = self._run_experts(flat, ids, gates, ctx)
        y = y.reshape(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        metrics["dropped"] = dropped  # share of assignments; 0 without capacity_factor
        # copies of a token that go to another device's experts; 0 without a mesh
        metrics["tokens_sent"] = tokens_sent
        return y, routed, metrics

    @jax.named_scope("experts")
    def _run_experts(
        self, x: Array, ids: Array, gates: Array, ctx: Context
    ) -> tuple[Array, Array, Array]:
        """Returns: (y [tokens, D], share of assignments dropped, copies of a token sent away)."""
        none = jnp.zeros((), jnp.float32)
        kernels = self.kernels
        experts = self.experts.w_gate[...], self.experts.w_up[...], self.experts.w_down[...]
        factor = self.cfg.capacity_factor
        if factor is not None and ctx.options.may_drop:
            return *kernels("capacity_swiglu", x, ids, gates, *experts, factor=factor), none
        few = gates.size <= dispatch.FEW_CHOICES * self.cfg.num_experts
        decode = few and not ctx.options.may_drop
        if not on_mesh():
            if decode:
                return kernels("decode_experts", x, ids, gates, *experts), none, none
            return kernels("grouped_swiglu", x, ids, gates, *experts, complete=True), none, none
        if decode:
            y = expert_parallel.decode_experts(
                x, ids, gates, experts, kernels=kernels, layout=self.layout
            )
            return y, none, none
        y, sent = expert_parallel.grouped_swiglu(
            x, ids, gates, experts, kernels=kernels, cfg=self.cfg, layout=self.layout
        )
        return y, none, sent

    @jax.named_scope("router")
    def route(
        self, x: Float[Array, "B T D"], ctx: Context
    ) -> tuple[LayerRouting, dict[str, Array]]:
        """Choose each token's experts, and measure the choice, in float32 from the logits on.

        Returns: (what the router did, metrics).
        """
        if self.router.reads_tokens and ctx.tokens is None:
            raise ValueError(
                f"tokens=None: router={self.cfg.router!r} chooses by token ids; give tokens [B, T]"
            )
        cfg = self.cfg
        rule = self.rule
        keys = ctx.keys
        bias = self.bias[...]
        noisy = (
            (None, None)
            if keys is None or self.w_noise is None
            else (self.w_noise[...], jnp.asarray(ctx.layer))
        )

        def local(w_router, bias, w_noise, layer, x, mask, tokens, keys, given):
            flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            needs = {}
            logits = checkpoint_name(self.kernels("exact_product", flat, w_router), CHOICE)
            if tokens is not None:
                needs["tokens"] = tokens.reshape(-1)
            if keys is not None:
                needs["spread"] = self.kernels("exact_product", flat, w_noise)
                normal = routing.noise(keys, layer, x.shape[1], cfg.num_experts)
                needs["normal"] = normal.reshape(logits.shape)
            if given is not None:
                needs["given"] = given.reshape(-1, given.shape[-1])
            flat = routing.route(logits, bias, cfg, **needs)
            flat = flat._replace(expert_ids=checkpoint_name(flat.expert_ids, CHOICE))
            picked = jax.tree.map(lambda a: a.reshape(*x.shape[:2], -1), flat)
            load = balance.load(picked.expert_ids, cfg.num_experts, mask)
            sequence_loss = jnp.zeros((), jnp.float32)
            if cfg.balance.sequence_alpha:
                k = cfg.experts_per_token
                sequence_loss = balance.sequence_loss(picked.scores, k, mask, given).sum()
            log_sums = None
            if cfg.balance.z_alpha:
                log_sums = jax.nn.logsumexp(logits, axis=-1).reshape(x.shape[:2])
            # Metric only; stop_gradient skips a gradient that is always zero.
            entropy = balance.entropy(jax.lax.stop_gradient(picked.scores))
            of_tokens = None
            if rule and rule.of_tokens:
                of_tokens = rule.of_tokens(flat.scores, bias, cfg.experts_per_token)
                of_tokens = of_tokens.reshape(picked.scores.shape)
            near = near_ties(flat.scores, bias, cfg).reshape(x.shape[:2])
            sums = load, as_varying(sequence_loss, load)
            return sums, (picked, log_sums, entropy, of_tokens, near)

        # Each device its own rows: the compiler would gather all tokens' scores for the largest.
        weights = (self.w_router[...], bias, *noisy)
        sums, rows = shard_map_over_batch(
            local, weights, x, ctx.mask, ctx.tokens, keys, ctx.expert_ids
        )
        (load, sequence_loss), (picked, log_sums, entropy, of_tokens, near) = sums, rows
        loss = cfg.balance.sequence_alpha * (sequence_loss / len(x))
        if cfg.balance.switch_alpha:
            scores, ids = (a.reshape(-1, a.shape[-1]) for a in (picked.scores, picked.expert_ids))
            loss += cfg.balance.switch_alpha * balance.switch_loss(
                scores, ids, ctx.mask.reshape(-1)
            )
        if log_sums is not None:
            loss += cfg.balance.z_alpha * balance.z_loss(log_sums, ctx.mask, ctx.divisor)
        measure = (
            rule.of_batch(of_tokens, ctx.mask, bias, cfg.experts_per_token)
            if rule and rule.of_batch
            else None
        )
        kept = picked.scores if "scores" in ctx.options.watch else None
        routed = LayerRouting(picked.expert_ids, picked.gates, entropy, load, loss, measure, kept)
        return routed, {"near_ties": near.mean(dtype=jnp.float32)}


def check_expert_ids(
    cfg: ModelConfig, expert_ids: Any, lead: tuple[int, ...], name: str = "expert_ids"
) -> None:
    """Check experts that take the place of a router's choice. Under jit the shape alone is known.

    Args: lead: the shape without its last axis, K.
    Raises: ValueError for another shape, an id outside −1 … E − 1, or an expert twice for a token.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> check_expert_ids(preset("tiny"), jnp.full((2, 8, 4), 16), (2, 8))
        Traceback (most recent call last):
            ...
        ValueError: expert_ids holds 16, which is neither one of 16 experts nor -1
    """
    shape = (*lead, cfg.experts_per_token)
    k = cfg.experts_per_token
    dtype = getattr(expert_ids, "dtype", None)
    if getattr(expert_ids, "shape", None) != shape or dtype != jnp.int32:
        found = (
            f"{dtype} {expert_ids.shape}"
            if hasattr(expert_ids, "shape")
            else type(expert_ids).__name__
        )
        raise ValueError(f"{name} is {found}, not an array int32 {shape}")
    if isinstance(expert_ids, jax.core.Tracer) or not np.size(expert_ids):
        return
    ids = np.sort(np.asarray(expert_ids).reshape(-1, k), axis=-1)
    wrong = ids[(ids < -1) | (ids >= cfg.num_experts)]
    if wrong.size:
        raise ValueError(
            f"{name} holds {wrong[0]}, which is neither one of {cfg.num_experts} experts nor -1"
        )
    free = ids[:, -1] < 0
    twice = ids[((ids[:, 1:] == ids[:, :-1]).any(-1) | (ids[:, 0] < 0)) & ~free]
    if twice.size:
        raise ValueError(f"{name} has {twice[0].tolist()} for a token, not {k} different experts")


NEAR = 1e-3  # scores that rounding to bfloat16 may reorder


def near_ties(
    scores: Float[Array, "n E"], bias: Float[Array, " E"], cfg: ModelConfig
) -> Bool[Array, " n"]:
    """Whether a token's K-th and (K+1)-th score are nearer than NEAR; False if K is all."""
    k = cfg.experts_per_token
    router = routing.ROUTERS[cfg.router]
    groups, kept = (cfg.num_groups, cfg.groups_per_token) if router.has_groups else (1, 1)
    if k == cfg.num_experts // groups * kept or router.reads_tokens:
        return jnp.zeros_like(scores[:, 0], jnp.bool_)
    choice = jax.lax.stop_gradient(scores) + bias[None]
    ids = routing.choose(choice, k + 1, groups, kept, cfg.group_score)[:, -2:]
    two = jnp.take_along_axis(choice, ids, axis=-1)
    return two[:, 0] - two[:, 1] < NEAR
