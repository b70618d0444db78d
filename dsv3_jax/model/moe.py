"""The DeepSeekMoE layer: router, routed experts, shared experts, and what is counted of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Execution, ModelConfig, check_inputs
from dsv3_jax.mesh import expert_parallel
from dsv3_jax.mesh.length import over_rows, shards_length
from dsv3_jax.mesh.sharding import on_mesh, shard_map_over_batch
from dsv3_jax.model.context import Context, from_zero, how_of, make_context
from dsv3_jax.model.layers import SwiGLU
from dsv3_jax.model.parameters import draws_together, param
from dsv3_jax.model.stack import CHOICE
from dsv3_jax.ops import balance, dispatch, routing
from dsv3_jax.ops.check_router import check_choice, check_replay, check_routing
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


class Sums(NamedTuple):
    """What the devices add up of the rows that they route."""

    load: Array  # float32 [E]: assignments of tokens that count
    sequence_loss: Array  # float32 []: of all sequences


class RoutedRows(NamedTuple):
    """What a device finds of the rows that it routes."""

    expert_ids: Array  # int32 [B, T, K]
    gates: Array  # float32 [B, T, K]
    scores: Array  # float32 [B, T, E]
    entropy: Array  # float32 [B, T]: of the scores
    near: Array  # bool [B, T], see `near_ties`
    log_sums: Array | None  # float32 [B, T]: of the logits, for the z-loss
    measure: Array | None  # float32 [B, T, E]: what the bias's rule takes of each token


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

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> moe = ds.MoE(ds.preset("tiny"), rngs=nnx.Rngs(0))
    >>> y, routing = jax.jit(moe)(jnp.ones((2, 8, 128)))
    >>> y.shape, routing.load.sum()  # 16 tokens, 4 experts each
    ((2, 8, 128), Array(64., dtype=float32))
    """

    @draws_together
    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        to_experts = (cfg.dim, cfg.num_experts)
        self.w_router = param(rngs, to_experts, ("dim", None), cfg.init_std, exact=True)
        self.bias = RouterBias(jnp.zeros((cfg.num_experts,), jnp.float32))
        self.router = routing.ROUTERS[cfg.router]
        self.rule = balance.rule_of(cfg)
        self.cfg = cfg
        shared = cfg.num_shared_experts * cfg.expert_dim
        self.shared = SwiGLU(cfg.dim, shared, cfg.init_std, rngs=rngs) if shared else None
        self.experts = Experts(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"] | None = None,
        *,
        tokens: Int[Array, "B T"] | None = None,
        expert_ids: Int[Array, "B T K"] | None = None,
        execution: Execution | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerRouting]:
        """Mix the experts, for training.

        Args:
            mask: tokens that count for load, balance losses and capacity. None means all.
            tokens: ids, for router "hash".
            expert_ids: experts in place of the router's choice, see `ops.routing.replay`.
            execution: which kernels compute; None means the best of the default device.
        Returns: (y, what the router did).
        Raises: ValueError if the router needs tokens and gets none, or a shape is wrong.
        """
        check_inputs(self.cfg.dim, x=x, mask=mask, tokens=tokens)
        if expert_ids is not None:
            check_expert_ids(self.cfg, expert_ids, x.shape[:2])
        positions = from_zero(*x.shape[:2])
        ctx = make_context(self.cfg, positions, how=how_of(execution), tokens=tokens)
        ctx = ctx._replace(given=expert_ids)
        if mask is not None:
            ctx = ctx._replace(mask=mask)
        routed, _ = self.route(x, ctx)
        y, _ = self.mix(x, routed, ctx)
        return y, routed

    @jax.named_scope("router")
    def route(
        self, x: Float[Array, "B T D"], ctx: Context
    ) -> tuple[LayerRouting, dict[str, Array]]:
        """Choose each token's experts, and measure the choice.

        Returns: (what the router did, metrics: "near_ties", see `near_ties`).
        """
        if self.router.reads_tokens and ctx.tokens is None:
            raise ValueError(
                f"tokens=None: router={self.cfg.router!r} chooses by token ids; give tokens [B, T]"
            )
        check_choice(self.cfg)
        if ctx.given is not None:
            check_replay(self.cfg)

        # Each device routes its own rows. Otherwise the compiler would gather the scores of all
        # tokens for the top k.
        weights = self.w_router[...], self.bias[...]
        route_rows = shard_map_over_batch(partial(self._route_rows, ctx.run), x)
        sums, rows = route_rows(weights, ctx.of_tokens(x))

        measure = None
        if self.rule and self.rule.of_batch:
            k = self.cfg.experts_per_token
            measure = self.rule.of_batch(rows.measure, ctx.mask, self.bias[...], k)
        routed = LayerRouting(
            expert_ids=rows.expert_ids,
            gates=rows.gates,
            score_entropy=rows.entropy,
            load=sums.load,
            balance_loss=self._balance_loss(sums, rows, ctx),
            bias_measure=measure,
            scores=rows.scores if "scores" in ctx.how.watch else None,
        )

        # A share of the tokens that count, in a microbatch of those of the complete batch. A head's
        # row may have positions without a token, where its length is sharded.
        count = ctx.divisor
        if count is None:
            count = jnp.maximum(ctx.mask.sum(dtype=jnp.float32), 1)
        return routed, {"near_ties": (rows.near & ctx.mask).sum(dtype=jnp.float32) / count}

    def _route_rows(
        self, run: Callable, weights: tuple[Array, Array], tokens: routing.Tokens
    ) -> tuple[Sums, RoutedRows]:
        """Route rows; in float32 from the logits on, as the reference does."""
        cfg = self.cfg
        k = cfg.experts_per_token
        w_router, bias = weights
        lead = tokens.mask.shape
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tokens)

        # scores, and the choice by them
        logits = run("exact_product", flat.x.astype(jnp.float32), w_router)
        logits = checkpoint_name(logits, CHOICE)
        routed = self.router.route(routing.Inputs(logits, bias, flat), cfg)
        ids, gates, scores = check_routing(routed, logits, cfg)
        ids = checkpoint_name(ids, CHOICE)

        # what is measured of each token
        of_tokens = self.rule.of_tokens if self.rule else None
        found = RoutedRows(
            expert_ids=ids,
            gates=gates,
            scores=scores,
            entropy=balance.entropy(jax.lax.stop_gradient(scores)),  # a metric, without a gradient
            near=near_ties(scores, bias, cfg),
            log_sums=jax.nn.logsumexp(logits, axis=-1) if cfg.balance.z_alpha else None,
            measure=of_tokens(scores, bias, k) if of_tokens else None,
        )
        rows = jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), found)

        # what is measured of the device's sequences
        load = balance.load(rows.expert_ids, cfg.num_experts, tokens.mask)
        loss = jnp.zeros((), jnp.float32)
        if cfg.balance.sequence_alpha:
            each = rows.scores, k, tokens.mask, tokens.given
            loss = balance.sequence_loss(*each, over_rows=over_rows).sum()
        return Sums(load, as_varying(loss, load)), rows

    def _balance_loss(self, sums: Sums, rows: RoutedRows, ctx: Context) -> Float[Array, ""]:
        """The weighted sum of the losses that `Balance` asks for."""
        weights = self.cfg.balance
        loss = weights.sequence_alpha * (sums.sequence_loss / len(ctx.mask))
        if weights.switch_alpha:
            tokens = rows.scores, rows.expert_ids, ctx.mask
            if shards_length():  # as one sequence they would be gathered
                switch = balance.switch_loss(*tokens, counts=sums.load)
            else:
                switch = balance.switch_loss(*(a.reshape(-1, *a.shape[2:]) for a in tokens))
            loss += weights.switch_alpha * switch
        if rows.log_sums is not None:
            loss += weights.z_alpha * balance.z_loss(rows.log_sums, ctx.mask, ctx.divisor)
        return loss

    def mix(
        self, x: Float[Array, "B T D"], routed: LayerRouting, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Mix each token's experts: for training, prefill or decoding, by the context.

        Returns: (y, metrics: "dropped", the share of assignments; and as
            `mesh.expert_parallel.grouped_swiglu`, a token's copies that go to other devices).
        """
        # Experts know no batch, so tokens become rows of one long sequence; where a length is
        # sharded, each device joins its own tokens later.
        flat, ids, gates = x, routed.expert_ids, routed.gates
        if not shards_length():
            flat, ids, gates = (a.reshape(-1, a.shape[-1]) for a in (flat, ids, gates))
        if ctx.how.edit_gates is not None:
            gates = ctx.how.edit_gates(ctx.layer, ids, gates)

        # Σ g_e FFN_e(x) over the chosen, and the shared experts, which every token uses.
        y, dropped, sent = self._run_experts(flat, ids, gates, ctx)
        y = y.reshape(x.shape)
        if self.shared is not None:
            y = y + self.shared(x, ctx)
        return y, {"dropped": dropped, **sent}

    @jax.named_scope("experts")
    def _run_experts(
        self, x: Array, ids: Array, gates: Array, ctx: Context
    ) -> tuple[Array, Array, dict[str, Array]]:
        """(y [tokens, D], share of assignments dropped, metrics of what is sent away)."""
        cfg = self.cfg
        how = ctx.how
        zero = jnp.zeros((), jnp.float32)
        nothing_sent = {"tokens_sent": zero}
        experts = self.experts.w_gate[...], self.experts.w_up[...], self.experts.w_down[...]
        args = (x, ids, gates)

        # Experts with room for a share of the tokens: what does not fit is dropped, and
        # padding first.
        if cfg.capacity_factor is not None and how.mode == "train":
            limits: dict[str, Any] = {"factor": cfg.capacity_factor, "mask": ctx.mask.reshape(-1)}
            y, dropped = ctx.run("capacity_swiglu", *args, *experts, **limits)
            return y, dropped, nothing_sent

        # So few tokens that reading weights is the cost: a loop reads the chosen experts' alone.
        few = gates.size <= dispatch.FEW_CHOICES * cfg.num_experts
        if how.mode == "decode" and few:
            if not on_mesh():
                return ctx.run("decode_experts", *args, *experts), zero, nothing_sent
            y = expert_parallel.decode_experts(
                *args, experts, kernels=how.kernels, layout=how.layout
            )
            return y, zero, nothing_sent

        # Tokens sorted by expert, each expert on its own rows; on a mesh, where the experts are.
        if not on_mesh():
            return ctx.run("grouped_swiglu", *args, *experts, complete=True), zero, nothing_sent
        y, sent = expert_parallel.grouped_swiglu(
            *args, experts, kernels=how.kernels, cfg=cfg, layout=how.layout
        )
        return y, zero, sent


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

    # The ids themselves: experts of this layer, or −1.
    if isinstance(expert_ids, jax.core.Tracer) or not np.size(expert_ids):
        return
    ids = np.sort(np.asarray(expert_ids).reshape(-1, k), axis=-1)
    wrong = ids[(ids < -1) | (ids >= cfg.num_experts)]
    if wrong.size:
        raise ValueError(
            f"{name} holds {wrong[0]}, which is neither one of {cfg.num_experts} experts nor -1"
        )

    # A token has K different experts, or −1 alone: sorted, equal ids are neighbours.
    free = ids[:, -1] < 0
    twice = ids[((ids[:, 1:] == ids[:, :-1]).any(-1) | (ids[:, 0] < 0)) & ~free]
    if twice.size:
        raise ValueError(f"{name} has {twice[0].tolist()} for a token, not {k} different experts")


NEAR = 1e-3  # scores that rounding to bfloat16 may reorder


def near_ties(
    scores: Float[Array, "n E"], bias: Float[Array, " E"], cfg: ModelConfig
) -> Bool[Array, " n"]:
    """Whether a token's K-th and (K+1)-th score for the choice are nearer than NEAR.

    False if no expert is left over, or the router does not choose by scores.
    """
    k = cfg.experts_per_token
    router = routing.ROUTERS[cfg.router]
    groups, kept = (cfg.num_groups, cfg.groups_per_token) if router.has_groups else (1, 1)
    nothing_left = k == cfg.num_experts // groups * kept
    if nothing_left or router.reads_tokens:
        return jnp.zeros_like(scores[:, 0], jnp.bool_)

    # The choice of one more expert, by the same scores: its last two are the K-th and the next.
    choice = jax.lax.stop_gradient(scores) + bias[None]
    ids = routing.choose(choice, k + 1, groups, kept, cfg.group_score)[:, -2:]
    two = jnp.take_along_axis(choice, ids, axis=-1)
    return two[:, 0] - two[:, 1] < NEAR
