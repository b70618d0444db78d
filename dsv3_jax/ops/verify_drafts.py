"""Which drafts are accepted, and the token after: a pass over k drafts gives 1 to k + 1 tokens.

Accept draft x_j with probability min(1, p/q). At the first rejection draw from max(p − q, 0),
scaled to sum to 1; if all are accepted, draw one more from p. The text follows the target's p
exactly, whatever q is.
Source: arXiv 2211.17192 and 2302.01318.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.sampling import Sampling, processed_logits, sample


class Drafts(NamedTuple):
    """J drafts a sequence, and their distributions; None at temperature 0, or if each is certain.

    Example:
        >>> Drafts(jnp.array([[5, 2]]), None).tokens.shape
        (1, 2)
    """

    tokens: Int[Array, "B J"]
    q: Float[Array, "B J W"] | None


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
    keys: Array,
    sampling: Sampling,
) -> tuple[Int[Array, " B"], Int[Array, "B F"]]:
    """Accept or reject drafts by the target's logits.

    Args:
        drafts: J drafted tokens a sequence; J may be 0.
        q: the distributions that they were drawn from. None means that each draft was certain: it
            is accepted if the target draws it too, and the text is the target's own for these keys.
        logits: the target's, F = J + 1: at the token before the drafts and at each draft.
        keys: [B, F], for the draw of each token. sampling: how the target chooses.
    Returns: (how many drafts are accepted, int32 [B]; tokens [B, F]: the accepted drafts, then the
        target's own token; entries beyond are arbitrary).

    Example:
        >>> logits = jax.nn.one_hot(jnp.array([[5, 6, 7]]), 8)  # the target chooses 5, then 6 and 7
        >>> drafts, keys = jnp.array([[5, 2]]), jax.random.split(jax.random.key(0), (1, 3))
        >>> count, tokens = accept(drafts, None, logits, keys, Sampling(temperature=0.0))
        >>> count, tokens[:, :2]  # 5 is accepted, and 6 takes the place of 2
        (Array([1], dtype=int32), Array([[5, 6]], dtype=int32))
    """
    # A certain draft is accepted if the target draws it too.
    if q is None or sampling.temperature == 0.0:
        own = sample(logits, keys, **sampling._asdict())
        return _leading(drafts == own[:, :-1]), own

    # Accept draft x_j with probability min(1, p/q), up to the first that is rejected.
    p_BFW = probabilities(logits, sampling)
    p_BJ = _of_tokens(p_BFW[:, :-1], drafts)
    q_BJ = _of_tokens(q, drafts)
    uniform_BJ = jax.vmap(jax.vmap(_uniform))(keys[:, :-1])
    count = _leading(uniform_BJ * q_BJ < p_BJ)

    # At that one draw from max(p − q, 0), scaled to sum to 1. After the last draft q is 0, so this
    # is p.
    q_BFW = jnp.concatenate([q, jnp.zeros_like(p_BFW[:, :1])], axis=1)
    rest_BW = _at(jnp.maximum(p_BFW - q_BFW, 0), count)
    # Rounding may reject although p equals q, and leave a rest of 0: then draw from p itself.
    rest_BW = jnp.where(rest_BW.sum(-1, keepdims=True) > 0, rest_BW, _at(p_BFW, count))
    keys_B = jax.vmap(lambda row, i: row[i])(keys, count)
    token = sample(jnp.log(rest_BW), keys_B, temperature=1.0)

    # The target's token goes behind the accepted drafts.
    place = jnp.arange(p_BFW.shape[1], dtype=jnp.int32)[None]
    tokens = jnp.concatenate([drafts, token[:, None]], axis=1)
    return count, jnp.where(place == count[:, None], token[:, None], tokens)


def _uniform(key: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(key, 0))


def _of_tokens(p: Float[Array, "B J W"], tokens: Int[Array, "B J"]) -> Float[Array, "B J"]:
    """Each token's probability."""
    return jnp.take_along_axis(p, tokens[..., None], axis=-1)[..., 0]


def _at(p: Float[Array, "B F W"], place: Int[Array, " B"]) -> Float[Array, "B W"]:
    """Each sequence's distribution at one place."""
    return jnp.take_along_axis(p, place[:, None, None], axis=1)[:, 0]


def _leading(accepted: Array) -> Array:
    """How many of a row's first entries are True."""
    return jnp.cumprod(accepted.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
