"""Routers: which experts a token goes to, and the weight (gate) of each.

`ROUTERS` lists them all: V3's sigmoid with a correction bias and a group limit, the same with V4's
scores, V2's softmax, top-k, the dense softmax over all experts, and a hash of the token's id. A new
router is a function and a row of `ROUTERS`, here or in a notebook.

Gates and scores have the dtype of the logits, which is float32 in the models. If scores are equal,
the lower expert id is chosen first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from dsv3_jax.config import ModelConfig, Table


class Routing(NamedTuple):
    """The router's result for n tokens, E experts and K choices a token."""

    expert_ids: Array  # int32 [n, K]
    gates: Array  # float32 [n, K]: weight of each chosen expert
    scores: Array  # float32 [n, E]: the score of every expert without bias, for the balance losses


def sigmoid(
    logits: Float[Array, "n E"],
    bias: Float[Array, " E"],
    *,
    normalize: bool = True,
    scale: float = 1.0,
    **limits: Any,
) -> Routing:
    """Route with V3's sigmoid router: the bias affects which experts are chosen, not their gates.

    s = sigmoid(logits);  ids = topk(s + bias) within the best groups;
    g = scale · s[ids] / (Σ s[ids] + 1e-20)

    Args:
        logits: x W_router, float32.
        bias: loss-free correction of each expert, float32. It takes no gradient.
        normalize: divide the gates of a token by their sum.
        scale: factor of the gates.
        limits: k, groups, groups_kept, group_score and given, see `choose`.
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
    expert_ids = choose(jax.lax.stop_gradient(scores + bias.astype(scores.dtype)[None]), **limits)
    return Routing(expert_ids, _gates(scores, expert_ids, normalize, scale), scores)


def sqrtsoftplus(
    logits: Float[Array, "n E"],
    bias: Float[Array, " E"],
    *,
    normalize: bool = True,
    scale: float = 1.0,
    **limits: Any,
) -> Routing:
    """Route as `sigmoid`, with scores that are not bounded by 1.

    s = √softplus(logits);  ids and g from s as in `sigmoid`

    Args: as in `sigmoid`.
    Returns: Routing: expert_ids int32 [n, K], gates [n, K] and scores s [n, E].

    Example:
        >>> routed = sqrtsoftplus(jnp.array([[8.0, 3.0, 0.0]]), jnp.zeros(3), k=2, normalize=False)
        >>> routed.expert_ids, routed.gates.round(2)  # √softplus(8) and √softplus(3)
        (Array([[0, 1]], dtype=int32), Array([[2.83, 1.75]], dtype=float32))

    Source: the affinity of DeepSeek-V4, "sqrtsoftplus" in its config.json.
    """
    # Far below 0, softplus(x) is e^x. There its square root is taken as e^(x/2): softplus
    # underflows, and the gradient of a square root at 0 is infinite.
    far = jnp.log(jnp.finfo(logits.dtype).eps).astype(logits.dtype)
    near = jnp.sqrt(jax.nn.softplus(jnp.maximum(logits, far)))
    scores = jnp.where(logits > far, near, jnp.exp(jnp.minimum(logits, far) / 2))

    expert_ids = choose(jax.lax.stop_gradient(scores + bias.astype(scores.dtype)[None]), **limits)
    return Routing(expert_ids, _gates(scores, expert_ids, normalize, scale), scores)


def softmax(
    logits: Float[Array, "n E"], *, normalize: bool = False, scale: float = 1.0, **limits: Any
) -> Routing:
    """Route with V2's softmax router: the K largest probabilities within the best groups.

    s = softmax(logits);  ids = topk(s) within the best groups;  g = scale · s[ids]

    This is V2's "group_limited_greedy", and with one group V2-Lite's "greedy".

    Args:
        logits: x W_router, float32.
        normalize, scale, limits: as in `sigmoid`; V2's groups are scored by their largest s,
            group_score="max".
    Returns: Routing: expert_ids int32 [n, K], gates [n, K] and scores s [n, E].

    Example:
        >>> routed = softmax(jnp.array([[0.0, 3.0, 1.0, 2.0]]), k=2)
        >>> routed.expert_ids, routed.gates.round(1)
        (Array([[1, 3]], dtype=int32), Array([[0.6, 0.2]], dtype=float32))

    Source: DeepSeek-V2 report, section 2.2.
    """
    scores = jax.nn.softmax(logits, axis=-1)
    expert_ids = choose(jax.lax.stop_gradient(scores), **limits)
    gates = _pick(scores, expert_ids)
    if normalize:
        # 1e-18 squared is not 0 in float32: given experts may have no probability at all.
        gates = gates / jnp.maximum(gates.sum(-1, keepdims=True), 1e-18)
    return Routing(expert_ids, gates * scale, scores)


def topk(logits: Float[Array, "n E"], *, k: int, given: Int[Array, "n K"] | None = None) -> Routing:
    """Route to the K largest logits, with gates from a softmax over these K alone.

    Args:
        logits: x W_router, float32.
        k: K, experts for each token.
        given: see `replay`.
    Returns: Routing: expert_ids int32 [n, K], gates [n, K], and scores [n, E], the softmax over all
        experts.

    Example:
        >>> routed = topk(jnp.array([[0.0, 3.0, 1.0, 2.0]]), k=2)
        >>> routed.expert_ids, routed.gates.round(1)
        (Array([[1, 3]], dtype=int32), Array([[0.7, 0.3]], dtype=float32))

    Source: arXiv 1701.06538.
    Departs from the paper: no noise is added to the logits.
    """
    expert_ids = choose(jax.lax.stop_gradient(logits), k, given=given)
    return Routing(
        expert_ids,
        jax.nn.softmax(_pick(logits, expert_ids), axis=-1),
        jax.nn.softmax(logits, axis=-1),
    )


def dense(logits: Float[Array, "n E"]) -> Routing:
    """Route to every expert, with gates from a softmax over all.

    Args: logits: x W_router, float32.
    Returns: Routing with K = E: expert_ids 0 … E - 1 in this order; gates and scores are the
        softmax.

    Example:
        >>> routed = dense(jnp.zeros((1, 2)))
        >>> routed.expert_ids, routed.gates
        (Array([[0, 1]], dtype=int32), Array([[0.5, 0.5]], dtype=float32))
    """
    n, num_experts = logits.shape
    gates = jax.nn.softmax(logits, axis=-1)
    expert_ids = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), (n, num_experts))
    return Routing(expert_ids, gates, gates)


def hash_tokens(
    logits: Float[Array, "n E"],
    tokens: Int[Array, " n"],
    *,
    normalize: bool = True,
    scale: float = 1.0,
    **limits: Any,
) -> Routing:
    """Route by the token's id: the K experts of largest hash(token, expert). No choice is trained.

    ids = topk(hash(token, ·));  s = sigmoid(logits);  g = scale · s[ids] / (Σ s[ids] + 1e-20)

    The hash is a fixed function of 32-bit integers, the same in all layers. It gives all experts
    the same share of the ids in expectation; the load is then as even as the tokens' frequencies
    allow.

    Args:
        logits: x W_router, float32: for the gates.
        tokens: ids.
        normalize, scale: as in `sigmoid`.
        limits: k and given, see `choose`.
    Returns: Routing: expert_ids int32 [n, K], gates [n, K] and scores s [n, E].

    Example:
        >>> routed = hash_tokens(jnp.zeros((3, 8)), jnp.array([5, 6, 5]), k=2)
        >>> routed.expert_ids, routed.gates[0]
        (Array([[2, 6],
               [6, 4],
               [2, 6]], dtype=int32), Array([0.5, 0.5], dtype=float32))

    Source: arXiv 2106.04426.
    Departs from the paper: K experts and gates from scores, as in DeepSeek-V4's first layers; there
    K = 1 without gate.
    """
    # Integers of 32 bits, which differ between a token's experts.
    of_expert = jnp.arange(logits.shape[-1], dtype=jnp.uint32) * np.uint32(0x85EBCA77)
    of_token = tokens.astype(jnp.uint32) * np.uint32(0x9E3779B1)
    mixed_nE = of_token[:, None] ^ of_expert[None]

    # MurmurHash3's last mixing: a bijection of 32-bit integers, so a token's experts have no ties.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed_nE = (mixed_nE ^ (mixed_nE >> np.uint32(shift))) * np.uint32(factor)

    expert_ids = choose(mixed_nE, **limits)
    scores = jax.nn.sigmoid(logits)
    return Routing(expert_ids, _gates(scores, expert_ids, normalize, scale), scores)


def _gates(
    scores: Float[Array, "n E"], expert_ids: Int[Array, "n K"], normalize: bool, scale: float
) -> Array:
    """Return scale · s[ids], divided by their sum if `normalize`."""
    gates = _pick(scores, expert_ids)
    if normalize:
        # The division is done in log space. A quotient's gradient squares the sum, and 1e-20
        # squared is 0 in float32. So a quotient's gradient would be NaN if all sigmoids underflow.
        gates = gates * jnp.exp(-jnp.log(gates.sum(-1, keepdims=True) + 1e-20))
    return gates * scale


def _pick(scores: Float[Array, "n E"], expert_ids: Int[Array, "n K"]) -> Float[Array, "n K"]:
    """Return each token's scores of its experts."""
    rows = jnp.arange(scores.shape[0], dtype=jnp.int32)[:, None]
    # A token's experts are distinct. Said so, the gradient's scatter needs no atomic adds on a GPU.
    return scores.at[rows, expert_ids].get(unique_indices=True, mode="promise_in_bounds")


def choose(
    choice: Real[Array, "n E"],
    k: int,
    groups: int = 1,
    groups_kept: int = 1,
    group_score: str = "top2_sum",
    given: Int[Array, "n K"] | None = None,
) -> Int[Array, "n K"]:
    """Return the ids of the k largest `choice` scores within the best groups, largest first; int32.

    Args:
        groups: number of groups of consecutive experts; it divides E.
        groups_kept: a token's experts come from this many groups. With groups_kept = groups there
            is no limit.
        group_score: a group's score is the sum of its two largest scores ("top2_sum", V3) or the
            largest ("max", V2).
        given: ids that take the choice's place, see `replay`.

    Example:
        >>> choose(jnp.array([[0.5, 0.0, 0.4, 0.3]]), 2, groups=2)  # 2 and 3 have the larger sum
        Array([[2, 3]], dtype=int32)
    """
    if groups_kept < groups:
        n, num_experts = choice.shape
        in_group_nGe = choice.reshape(n, groups, num_experts // groups)

        # The score of each group, and the best groups.
        if group_score == "max":
            scores_nG = in_group_nGe.max(-1)
        else:
            scores_nG = jax.lax.top_k(in_group_nGe, 2)[0].sum(-1)
        _, kept = jax.lax.top_k(scores_nG, groups_kept)
        allowed_nG = jax.nn.one_hot(kept, groups, dtype=jnp.bool_).any(axis=1)

        # -inf, not 0: biases can be negative, and an expert of other groups could win with 0.
        choice = jnp.where(allowed_nG[..., None], in_group_nGe, -jnp.inf)
        choice = choice.reshape(n, num_experts)

    _, best = jax.lax.top_k(choice, k)
    return replay(best.astype(jnp.int32), given)


def replay(chosen: Int[Array, "*n K"], given: Int[Array, "*n K"] | None) -> Int[Array, "*n K"]:
    """Put given ids in the place of the chosen ones, except −1: such tokens choose freely.

    Neither bias nor groups act on given ids, and gates come from the scores at them, with their
    gradient.

    Example:
        >>> replay(jnp.array([[0, 1], [2, 3]]), jnp.array([[3, 2], [-1, -1]]))
        Array([[3, 2],
               [2, 3]], dtype=int32)

    Source: arXiv 2510.11370 (routing replay).
    """
    return chosen if given is None else jnp.where(given[..., :1] < 0, chosen, given)


class Tokens(NamedTuple):
    """What belongs to each of n tokens, and a router may read; None where it is not there.

    In a model the first axes are [B, T]. A mesh shards all of it by rows.
    """

    x: Any = None  # [n, D]: what the layer reads
    mask: Any = None  # bool [n]: tokens that count for load and balance losses
    ids: Any = None  # int32 [n]: the tokens' own
    given: Any = None  # int32 [n, K]: experts in place of the router's choice, see `replay`


class Inputs(NamedTuple):
    """A router's inputs for n tokens. `Router` says which it needs beside the logits."""

    logits: Array  # float32 [n, E]: x W_router
    bias: Array  # float32 [E]: loss-free correction
    tokens: Tokens


class Router(NamedTuple):
    """A router, and what it needs.

    Its expert_ids are distinct for each token, and passed through `replay(ids, x.tokens.given)`;
    its gates come from the scores at the result. Else recorded routing cannot be replayed, and
    `check_router.check_replay` refuses it.
    """

    route: Callable[[Inputs, ModelConfig], Routing]
    reads_bias: bool = False  # balance rules move the bias
    reads_tokens: bool = False  # token ids are in the layers' context
    has_groups: bool = False  # `num_groups` and `groups_per_token` limit the choice


def _chosen(x: Inputs, cfg: ModelConfig) -> dict[str, Any]:
    return dict(k=cfg.experts_per_token, given=x.tokens.given)


def _gated(x: Inputs, cfg: ModelConfig) -> dict[str, Any]:
    return _chosen(x, cfg) | dict(normalize=cfg.normalize_gates, scale=cfg.routed_scale)


def _grouped(x: Inputs, cfg: ModelConfig) -> dict[str, Any]:
    return _gated(x, cfg) | dict(
        groups=cfg.num_groups, groups_kept=cfg.groups_per_token, group_score=cfg.group_score
    )


ROUTERS: Table[Router] = Table("router", {
    "sigmoid": Router(
        lambda x, cfg: sigmoid(x.logits, x.bias, **_grouped(x, cfg)),
        reads_bias=True,
        has_groups=True,
    ),
    "sqrtsoftplus": Router(
        lambda x, cfg: sqrtsoftplus(x.logits, x.bias, **_grouped(x, cfg)),
        reads_bias=True,
        has_groups=True,
    ),
    "softmax": Router(lambda x, cfg: softmax(x.logits, **_grouped(x, cfg)), has_groups=True),
    "topk": Router(lambda x, cfg: topk(x.logits, **_chosen(x, cfg))),
    "dense": Router(lambda x, cfg: dense(x.logits)),
    "hash": Router(
        lambda x, cfg: hash_tokens(x.logits, x.tokens.ids, **_gated(x, cfg)), reads_tokens=True
    ),
}, more="--import NAME imports a program that registers more")  # fmt: skip
register_router = ROUTERS.add
