"""Decisions of a model's routers for one batch: the choices, and how close they were."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import LayerRouting
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops import balance, routing
from dsv3_jax.ops.cross_entropy import token_scores
from dsv3_jax.training.loss import targets


class Choices(NamedTuple):
    """Routing decisions of L layers for one batch."""

    expert_ids: Int32[Array, "L B T K"]
    gates: Float[Array, "L B T K"]
    # s + b of the expert over the best expert that was not chosen; NaN: there is none
    margin: Float[Array, "L B T K"]
    gate_entropy: Float[Array, "L B T"]
    score_entropy: Float[Array, "L B T"]
    mask: Bool[Array, "L B T"]  # positions that are counted
    coactivation: Float[Array, "L E E"]
    # the choice by the same scores without bias; the same ids if there is none
    without_bias: Int32[Array, "L B T K"]
    # nats of each token, given those before it in its row; NaN of a segment's first token
    nll: Float[Array, "B T"]


def biases(model: Transformer) -> Float[Array, "L E"] | None:
    """Return the routers' biases in the order of `RoutingStats.layers`; None if there are none.

    Example:
        >>> import numpy as np
        >>> from dsv3_jax.model.transformer import abstract
        >>> from dsv3_jax.presets import preset
        >>> model = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(preset("tiny")))
        >>> biases(model).shape
        (4, 16)
    """
    cfg = model.cfg
    if not routing.ROUTERS[cfg.router].reads_bias:
        return None
    sparse: Any = model.sparse  # modules, whose attributes mypy does not see
    modules: list[Any] = list(model.mtp)[: cfg.num_sparse_heads]
    trunk = [] if sparse is None else [sparse.moe.bias[...]]
    heads = [head.block.moe.bias[...][None] for head in modules]
    return jnp.concatenate([*trunk, *heads])


@partial(jax.jit, static_argnames="graphdef")
def decide(graphdef: nnx.GraphDef, state: nnx.State, batch: dict[str, Array]) -> Choices:
    """Run a model on a batch, and return its routers' decisions.

    Args: batch: tokens, segment_ids and positions, int32 [B, T].
    """
    model = nnx.merge(graphdef, state)
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    how = model.how(watch=frozenset({"scores"}))
    out = model.forward_hidden(tokens, segment_ids, batch["positions"], how=how)
    bias = biases(model)

    # The trunk's layers are stacked; all of its real positions count.
    parts = []
    trunk = model.cfg.num_sparse_layers
    if out.routing is not None:
        mask = jnp.broadcast_to(segment_ids != 0, out.routing.score_entropy.shape)
        parts.append(
            (_decisions(out.routing, None if bias is None else bias[:trunk], model.cfg), mask)
        )

    # Head k has T − k positions. They are padded to T, so that all layers are one array.
    for k, head in enumerate(out.mtp_routing, start=1):
        own = None if bias is None else bias[trunk + k - 1 : trunk + k]
        decisions = _decisions(jax.tree.map(lambda x: x[None], head), own, model.cfg)
        # A head that also reads token t + k counts only where that token is in the same document.
        reads_tokens = model.cfg.head_kind.reads_tokens
        mask = targets(tokens, segment_ids, k)[1] if reads_tokens else segment_ids[:, :-k] != 0
        parts.append(
            jax.tree.map(lambda x, k=k: jnp.pad(x, _padding(k, x.ndim)), (decisions, mask[None]))
        )
    (ids, gates, margin, score_entropy, without), mask = jax.tree.map(
        lambda *x: jnp.concatenate(x), *parts
    )

    # A layer at a time: chosen is [B, T, E].
    def count_pairs(layer) -> Array:
        ids, mask = layer
        chosen = (
            jax.nn.one_hot(ids, model.cfg.num_experts, dtype=jnp.float32).sum(-2) * mask[..., None]
        )
        return jnp.einsum("bte,btf->ef", chosen, chosen)

    coactivation = jax.lax.map(count_pairs, (ids, mask.astype(jnp.float32)))
    nll = token_nll(model, out.h, tokens, segment_ids)
    return Choices(
        ids, gates, margin, balance.entropy(gates), score_entropy, mask, coactivation, without, nll
    )


def token_nll(
    model: Transformer,
    h: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Compute each token's nats from the output at the token before; NaN of a segment's first.

    Args: h: as `ForwardOut.h`.
    """
    wanted, has_target = targets(tokens, segment_ids, 1)
    flat = h[:, :-1].reshape(-1, h.shape[-1])
    nll = token_scores(flat, model.head_matrix(), wanted.reshape(-1))[0].reshape(wanted.shape)
    return jnp.pad(jnp.where(has_target, nll, jnp.nan), ((0, 0), (1, 0)), constant_values=jnp.nan)


def _decisions(
    layer: LayerRouting, bias: Float[Array, "L E"] | None, cfg: ModelConfig
) -> tuple[Array, ...]:
    """Ids, gates, margin, score entropy, choice without bias of `Choices`; layers come first."""
    ids = layer.expert_ids
    scores = layer.scores
    assert scores is not None
    shape = ids.shape
    k = cfg.experts_per_token
    router = routing.ROUTERS[cfg.router]
    groups, kept = (cfg.num_groups, cfg.groups_per_token) if router.has_groups else (1, 1)
    how: dict[str, Any] = dict(groups=groups, groups_kept=kept, group_score=cfg.group_score)

    # The bias takes part in the choice alone; gates are of the scores.
    flat_ids = ids.reshape(-1, k)
    flat = scores.reshape(-1, cfg.num_experts)
    choice = flat if bias is None else (scores + bias[:, None, None]).reshape(flat.shape)
    without = flat_ids if bias is None else routing.choose(flat, k, **how)

    # The expert that one more choice would take. There is none if all are chosen, or if the tokens
    # decide and no score does.
    if k == cfg.num_experts // groups * kept or router.reads_tokens:
        margin = jnp.full(flat_ids.shape, jnp.nan, flat.dtype)
    else:
        runner_up = routing.choose(choice, k + 1, **how)[:, k:]
        chosen = jnp.take_along_axis(choice, flat_ids, -1)
        margin = chosen - jnp.take_along_axis(choice, runner_up, -1)
    return ids, layer.gates, margin.reshape(shape), layer.score_entropy, without.reshape(shape)


def _padding(k: int, ndim: int) -> list[tuple[int, int]]:
    """Pad the third axis, T, by k at its end."""
    return [(0, k if axis == 2 else 0) for axis in range(ndim)]
