"""Which drafts are accepted, and the token after them: one pass of the target over k drafts gives 1 to k + 1 tokens.

Accept draft x_j with probability min(1, p/q). At the first rejection draw from norm(max(p − q, 0)); if all are
accepted, draw one more from p. The text follows the target's p exactly, whatever q is.
Source: arXiv 2211.17192 and 2302.01318.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.sampling import Sampling, processed_logits


def probabilities(logits: Float[Array, "*n W"], sampling: Sampling) -> Float[Array, "*n W"]:
    """The distribution that `sample` draws from, at a temperature above 0.

    Example:
        >>> probabilities(jnp.log(jnp.array([0.6, 0.2, 0.2])), Sampling(temperature=1.0)).round(1)
        Array([0.6, 0.2, 0.2], dtype=float32)
    """
    return jax.nn.softmax(processed_logits(logits, **sampling._asdict()), axis=-1)


def accept(
    drafts: Int[Array, "B J"],
    q: Float[Array, "B J W"] | None,
    logits: Float[Array, "B F W"],
    key: Array,
    sampling: Sampling,
) -> tuple[Int[Array, " B"], Int[Array, "B F"]]:
    """Accept or reject drafts by the target's logits.

    Args:
        drafts: J drafted tokens a sequence; J may be 0.
        q: the distributions that they were drawn from; None means that each draft was certain. At temperature 0 q is
            not read: a draft is accepted if it is the target's argmax.
        logits: the target's, F = J + 1: at the token before the drafts and at each draft.
        key: for the draws. sampling: how the target chooses.
    Returns: (how many drafts are accepted, int32 [B]; tokens [B, F]: the accepted drafts, then the target's own token;
        entries beyond are arbitrary).

    Example:
        >>> logits = jax.nn.one_hot(jnp.array([[5, 6, 7]]), 8)  # the target chooses 5, then 6 and 7 after the drafts
        >>> drafts, key = jnp.array([[5, 2]]), jax.random.key(0)
        >>> count, tokens = accept(drafts, None, logits, key, Sampling(temperature=0.0))
        >>> count, tokens[:, :2]  # 5 is accepted, and 6 takes the place of 2
        (Array([1], dtype=int32), Array([[5, 6]], dtype=int32))
    """
    if sampling.temperature == 0.0:
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return _leading(drafts == best[:, :-1]), best
    p = probabilities(logits, sampling)
    uniform, draw = jax.random.split(key)
    if q is None:
        q = jax.nn.one_hot(drafts, p.shape[-1], dtype=p.dtype)
    count = jnp.zeros(p.shape[:1], jnp.int32)
    if drafts.shape[1]:
        index = drafts[..., None]
        of_p, of_q = (jnp.take_along_axis(x, index, axis=-1)[..., 0] for x in (p[:, :-1], q))
        count = _leading(jax.random.uniform(uniform, drafts.shape) * of_q < of_p)
    rest = jnp.maximum(p - jnp.concatenate([q, jnp.zeros_like(p[:, :1])], axis=1), 0)
    rest, own = (jnp.take_along_axis(x, count[:, None, None], axis=1)[:, 0] for x in (rest, p))
    # Rounding may reject although p equals q, and leave a rest of 0: then draw from p itself.
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, own)
    token = jax.random.categorical(draw, jnp.log(rest), axis=-1).astype(jnp.int32)
    index = jnp.arange(p.shape[1], dtype=jnp.int32)[None]
    tokens = jnp.concatenate([drafts, token[:, None]], axis=1)
    return count, jnp.where(index == count[:, None], token[:, None], tokens)


def _leading(accepted: Array) -> Array:
    """How many of a row's first entries are True."""
    return jnp.cumprod(accepted.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
