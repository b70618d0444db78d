"""Which experts a token goes to, and how much each counts.

Four routers: V3's sigmoid with a correction bias and a group limit, V2's softmax, plain top-k, and the dense
softmax over all experts that the field starts from. All run in float32 (float64 stays).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig


class Routing(NamedTuple):
    """A decision for n tokens."""

    expert_ids: Array  # int32 [n, K]
    gates: Array  # [n, K]: weight of each chosen expert
    scores: Array  # [n, E]: every expert's unbiased score, for the balance losses


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
    """V3's router: the bias helps to choose, and never to weigh.

    s = sigmoid(logits);  ids = topk(s + bias) within the best groups;  g = scale · s[ids] / (Σ s[ids] + 1e-20)

    Args:
        logits: x W_rᵀ.
        bias: loss-free correction, no gradient flows into it.
        k: K, experts a token. groups, groups_kept: G groups of which a token may use so many.
        group_score: "top2_sum" (V3) or "max" (V2) of a group's choice scores.
    Source: DeepSeek-V3 report, section 2.1.2; arXiv 2408.15664.
    """
    scores = jax.nn.sigmoid(logits)
    choice = jax.lax.stop_gradient(scores + bias.astype(scores.dtype)[None])
    expert_ids = _choose(choice, k, groups, groups_kept, group_score)
    gates = jnp.take_along_axis(scores, expert_ids, axis=-1)
    if normalize:
        # Divided in log space: a quotient's gradient squares the sum, and 1e-20 squared is 0 in float32, so that
        # it would be nan where all sigmoids underflow.
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
    """V2's router: softmax over all experts, then the K largest, within the best groups ("group_limited_greedy").

    One group is V2-Lite's "greedy". Source: DeepSeek-V2 report, section 2.2.
    """
    scores = jax.nn.softmax(logits, axis=-1)
    expert_ids = _choose(jax.lax.stop_gradient(scores), k, groups, groups_kept, group_score)
    gates = jnp.take_along_axis(scores, expert_ids, axis=-1)
    if normalize:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return Routing(expert_ids, gates * scale, scores)


def topk(logits: Float[Array, "n E"], *, k: int) -> Routing:
    """The plain sparse router: softmax over the K largest logits (arXiv 1701.06538, without its noise)."""
    kept, expert_ids = jax.lax.top_k(logits, k)
    return Routing(expert_ids.astype(jnp.int32), jax.nn.softmax(kept, axis=-1), jax.nn.softmax(logits, axis=-1))


def dense(logits: Float[Array, "n E"]) -> Routing:
    """The mixture before sparsity: every expert, weighed by a softmax."""
    n, num_experts = logits.shape
    gates = jax.nn.softmax(logits, axis=-1)
    return Routing(jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), (n, num_experts)), gates, gates)


def _choose(choice: Float[Array, "n E"], k: int, groups: int, groups_kept: int, group_score: str) -> Int[Array, "n K"]:
    if groups_kept < groups:
        n, num_experts = choice.shape
        grouped = choice.reshape(n, groups, num_experts // groups)
        if group_score == "max":
            group_scores = grouped.max(-1)
        else:
            group_scores = jax.lax.top_k(grouped, 2)[0].sum(-1)
        _, kept = jax.lax.top_k(group_scores, groups_kept)
        allowed = jax.nn.one_hot(kept, groups, dtype=jnp.bool_).any(axis=1)  # [n, G]
        # -inf, not 0: biases can be negative, and 0 would then let a forbidden expert win.
        choice = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(n, num_experts)
    return jax.lax.top_k(choice, k)[1].astype(jnp.int32)


def route(logits: Float[Array, "n E"], bias: Float[Array, " E"], cfg: ModelConfig) -> Routing:
    """The router that `cfg.router` names."""
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
