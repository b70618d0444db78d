"""A drafter's distribution q against the target's p: Kullback-Leibler divergence, total variation.

    KL  = Σ_w p_w ln(p_w / q_w)                      gradient by the drafter's logits: q − p
    TV  = ½ Σ_w |p_w − q_w| = 1 − Σ_w min(p_w, q_w)  gradient: q_w (s_w − Σ_v q_v s_v),
                                                     s = −1 where p > q, else 0

1 − TV is the probability that speculative sampling accepts a draft at temperature 1. KL bounds it
from one side only: TV² ≤ KL / 2 (Pinsker). The cross-entropy on the text's own tokens has KL's
minimum, p, if the text follows p.
Source: arXiv 2211.17192, section 3.3, for 1 − TV; DistillSpec, arXiv 2310.08461, for drafters
trained by both.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsv3_jax.ops.dtypes import sum_dtype

Distance = Literal["kl", "tv"]


def distance(
    log_p: Float[Array, "*n W"], log_q: Float[Array, "*n W"], kind: Distance
) -> Float[Array, "*n"]:
    """Compute KL(p, q) in nats, or TV(p, q).

    Example:
        >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
        >>> distance(p, q, "tv").round(3), distance(p, p, "kl")  # Σ min(p, q) = 0.6
        (Array(0.4, dtype=float32), Array(0., dtype=float32))
    """
    p = jnp.exp(log_p)
    if kind == "kl":
        return (p * (log_p - log_q)).sum(axis=-1)
    return jnp.maximum(p - jnp.exp(log_q), 0).sum(axis=-1)


def summed_distance(
    h: Float[Array, "n D"],
    target_h: Float[Array, "n D"],
    w: Float[Array, "D W"],
    mask: Bool[Array, " n"],
    kind: Distance,
    *,
    chunk: int = 1024,
) -> Float[Array, ""]:
    """Add up the distances of softmax(h w) to softmax(target_h w), in chunks of tokens.

    The target takes no gradient.

    Args:
        h: what the head gives to the unembedding. target_h: what the trunk gives to it, at the
            position before the drafted token.
        w: the unembedding.
        mask: positions where it is False do not count.

    Example:
        >>> h, w = jnp.eye(2), 3 * jnp.eye(2)
        >>> mask = jnp.array([True, True])
        >>> summed_distance(h, h[::-1], w, mask, "tv").round(2)  # 0.95 − 0.05, twice
        Array(1.81, dtype=float32)
    """
    n = h.shape[0]
    chunk = min(chunk, n)
    pad = ((0, -n % chunk), (0, 0))

    def log_probabilities(h_cD: Array) -> Array:
        logits_cW = jnp.dot(h_cD, w, preferred_element_type=sum_dtype(h.dtype))
        return jax.nn.log_softmax(logits_cW, axis=-1)

    @jax.checkpoint  # the logits of a chunk are computed again, not kept
    def of_chunk(both: tuple[Array, Array]) -> Array:
        log_q, log_p = map(log_probabilities, both)
        return distance(jax.lax.stop_gradient(log_p), log_q, kind)

    chunks = tuple(jnp.pad(x, pad).reshape(-1, chunk, x.shape[1]) for x in (h, target_h))
    found = jax.lax.map(of_chunk, chunks).reshape(-1)[:n]
    return jnp.where(mask, found, 0).sum()
