"""Routers: which experts a token goes to, and the weight (gate) of each.

There are four: V3's sigmoid with a correction bias and a group limit, V2's softmax, plain top-k, and the dense softmax
over all experts. Gates and scores have the dtype of the logits, which is float32 in the models. If scores are equal,
the lower expert id is chosen first.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig


class Routing(NamedTuple):
    """The router's result for n tokens, E experts and K choices a token."""

    expert_ids: Array  # int32 [n, K]
    gates: Array  # float32 [n, K]: weight of each chosen expert
    scores: Array  # float32 [n, E]: the score of every expert without bias, for the balance losses


def sigmoid(
    logits: Float[Array, "n E"],
    bias: Float[Array, " E"],
    *,
    k: int,
    groups: int = 1,
    groups_kept: int = 1,
    group_score: str = "top2_sum",
    normalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Route with V3's sigmoid router: the bias affects which experts are chosen, and never their gates.

    s = sigmoid(logits);  ids = topk(s + bias) within the best groups;  g = scale · s[ids] / (Σ s[ids] + 1e-20)

    Args:
        logits: x W_rᵀ, float32.
        bias: loss-free correction of each expert, float32. It takes no gradient.
        k: K, experts for each token.
        groups: number of groups of consecutive experts; it divides E.
        groups_kept: a token's experts come from this many groups. With groups_kept = groups there is no limit.
        group_score: a group's score is the sum of its two largest s + bias ("top2_sum", V3) or the largest ("max", V2).
        normalize: divide the gates of a token by their sum.
        scale: factor of the gates.
    Returns: Routing: expert_ids int32 [n, K], gates [n, K] and scores s [n, E].

    Example:
        >>> logits, bias = jnp.array([[2.0, 1.0, 0.0, -1.0]]), jnp.array([-1.0, 0.0, 0.0, 1.0])
        >>> routed = sigmoid(logits, bias, k=2)
        >>> routed.expert_ids  # without the bias: 0 and 1
        Array([[3, 1]], dtype=int32)
        >>> routed.gates.round(1)  # in the ratio of sigmoid(-1) to sigmoid(1)
        Array([[0.3, 0.7]], dtype=float32)

    Source: DeepSeek-V3 report, section 2.1.2; arXiv 2408.15664.
    """
    scores = jax.nn.sigmoid(logits)
    choice = jax.lax.stop_gradient(scores + bias.astype(scores.dtype)[None])
    expert_ids = _choose(choice, k, groups, groups_kept, group_score)
    gates = _pick(scores, expert_ids)
    if normalize:
        # The division is done in log space. A quotient's gradient squares the sum, and 1e-20 squared is 0 in float32.
        # So a quotient's gradient would be NaN if all sigmoids underflow.
        gates = gates * jnp.exp(-jnp.log(gates.sum(-1, keepdims=True) + 1e-20))
    return Routing(expert_ids, gates * scale, scores)


def softmax(
    logits: Float[Array, "n E"],
    *,
    k: int,
    groups: int = 1,
    groups_kept: int = 1,
    group_score: str = "max",
    normalize: bool = False,
    scale: float = 1.0,
) -> Routing:
    """Route with V2's softmax router: the K largest probabilities within the best groups.

    s = softmax(logits);  ids = topk(s) within the best groups;  g = scale · s[ids]

    This is V2's "group_limited_greedy", and with one group V2-Lite's "greedy".

    Args:
        logits: x W_rᵀ, float32.
        k, groups, groups_kept, scale: as in `sigmoid`.
        group_score: a group's score is its largest s ("max", V2) or the sum of its two largest ("top2_sum").
        normalize: divide the gates of a token by their sum.
    Returns: Routing: expert_ids int32 [n, K], gates [n, K] and scores s [n, E].

    Example:
        >>> routed = softmax(jnp.array([[0.0, 3.0, 1.0, 2.0]]), k=2)
        >>> routed.expert_ids, routed.gates.round(1)
        (Array([[1, 3]], dtype=int32), Array([[0.6, 0.2]], dtype=float32))

    Source: DeepSeek-V2 report, section 2.2.
    """
    scores = jax.nn.softmax(logits, axis=-1)
    expert_ids = _choose(jax.lax.stop_gradient(scores), k, groups, groups_kept, group_score)
    gates = _pick(scores, expert_ids)
    if normalize:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return Routing(expert_ids, gates * scale, scores)


def topk(logits: Float[Array, "n E"], *, k: int) -> Routing:
    """Route to the K largest logits, with gates from a softmax over these K alone.

    Args:
        logits: x W_rᵀ, float32.
        k: K, experts for each token.
    Returns: Routing: expert_ids int32 [n, K], gates [n, K], and scores [n, E], the softmax over all experts.

    Example:
        >>> routed = topk(jnp.array([[0.0, 3.0, 1.0, 2.0]]), k=2)
        >>> routed.expert_ids, routed.gates.round(1)
        (Array([[1, 3]], dtype=int32), Array([[0.7, 0.3]], dtype=float32))

    Source: arXiv 1701.06538.
    Departs from the paper: there is no noise.
    """
    expert_ids = jax.lax.top_k(jax.lax.stop_gradient(logits), k)[1].astype(jnp.int32)
    return Routing(expert_ids, jax.nn.softmax(_pick(logits, expert_ids), axis=-1), jax.nn.softmax(logits, axis=-1))


def dense(logits: Float[Array, "n E"]) -> Routing:
    """Route to every expert, with gates from a softmax over all.

    Args: logits: x W_rᵀ, float32.
    Returns: Routing with K = E: expert_ids 0 … E - 1 in this order; gates and scores are the softmax.

    Example:
        >>> routed = dense(jnp.zeros((1, 2)))
        >>> routed.expert_ids, routed.gates
        (Array([[0, 1]], dtype=int32), Array([[0.5, 0.5]], dtype=float32))
    """
    n, num_experts = logits.shape
    gates = jax.nn.softmax(logits, axis=-1)
    return Routing(jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), (n, num_experts)), gates, gates)


def _pick(scores: Float[Array, "n E"], expert_ids: Int[Array, "n K"]) -> Float[Array, "n K"]:
    """Return each token's scores of its experts."""
    rows = jnp.arange(scores.shape[0], dtype=jnp.int32)[:, None]
    # A token's experts are distinct. With that said, the gradient's scatter needs no atomic adds on a GPU.
    return scores.at[rows, expert_ids].get(unique_indices=True, mode="promise_in_bounds")


def _choose(choice: Float[Array, "n E"], k: int, groups: int, groups_kept: int, group_score: str) -> Int[Array, "n K"]:
    """Return the ids of the k largest `choice` scores within the best groups."""
    if groups_kept < groups:
        n, num_experts = choice.shape
        grouped = choice.reshape(n, groups, num_experts // groups)
        if group_score == "max":
            group_scores = grouped.max(-1)
        else:
            group_scores = jax.lax.top_k(grouped, 2)[0].sum(-1)
        _, kept = jax.lax.top_k(group_scores, groups_kept)
        allowed = jax.nn.one_hot(kept, groups, dtype=jnp.bool_).any(axis=1)  # [n, G]
        # -inf, not 0: biases can be negative, and an expert outside the kept groups could then win with 0.
        choice = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(n, num_experts)
    return jax.lax.top_k(choice, k)[1].astype(jnp.int32)


def route(logits: Float[Array, "n E"], bias: Float[Array, " E"], cfg: ModelConfig) -> Routing:
    """Route with the router and settings in `cfg`.

    Args:
        logits: x W_rᵀ, float32.
        bias: loss-free correction; only the sigmoid router reads it.
        cfg: `router` is "sigmoid", "softmax", "topk" or "dense".
    Returns: Routing.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = preset("tiny")  # 4 of 16 experts, from 2 of 4 groups
        >>> route(jnp.arange(16.0)[None], jnp.zeros(16), cfg).expert_ids
        Array([[15, 14, 13, 12]], dtype=int32)
    """
    limits: dict[str, Any] = dict(
        k=cfg.experts_per_token,
        groups=cfg.num_groups,
        groups_kept=cfg.groups_per_token,
        group_score=cfg.group_score,
        normalize=cfg.normalize_gates,
        scale=cfg.routed_scale,
    )
    if cfg.router == "sigmoid":
        return sigmoid(logits, bias, **limits)
    if cfg.router == "softmax":
        return softmax(logits, **limits)
    if cfg.router == "topk":
        return topk(logits, k=cfg.experts_per_token)
    return dense(logits)
