"""Which drafted tokens stand, and what comes after them: one pass of the target over k drafts gives 1 to k + 1 tokens.

Accept draft x_j with probability min(1, p/q); at the first rejection draw from norm(max(p − q, 0)); where all are
accepted, draw one more from p. What comes out follows the target's p exactly, whatever q is.
Source: arXiv 2211.17192 and 2302.01318.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.sampling import Sampling, processed_logits


def probabilities(logits: Float[Array, "*n W"], sampling: Sampling) -> Float[Array, "*n W"]:
    """What `sample` draws from, at a temperature above 0."""
    return jax.nn.softmax(processed_logits(logits, **sampling._asdict()), axis=-1)


def accept(
    drafts: Int[Array, "B J"],
    q: Float[Array, "B J W"] | None,
    logits: Float[Array, "B F W"],
    key: Array,
    sampling: Sampling,
) -> tuple[Int[Array, " B"], Int[Array, "B F"]]:
    """Compare drafts with the target.

    Args:
        drafts: J drafted tokens a sequence; J may be 0.
        q: the distributions that they were drawn from; not needed at temperature 0, where a draft stands if it is the
            target's argmax.
        logits: the target's, F = J + 1: at the token before the drafts and at each draft.
        key: for the draws. sampling: how the target chooses.
    Returns: (how many drafts stand, int32 [B]; the tokens [B, F]: the drafts that stand, then the target's own token;
        what lies beyond means nothing).
    """
    if sampling.temperature == 0.0:
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return _leading(drafts == best[:, :-1]), best
    p = probabilities(logits, sampling)
    uniform, draw = jax.random.split(key)
    if q is None:
        q = jnp.zeros_like(p[:, :0])
    else:
        at = drafts[..., None]
        of_p, of_q = (jnp.take_along_axis(x, at, axis=-1)[..., 0] for x in (p[:, :-1], q))
    count = jnp.zeros(p.shape[:1], jnp.int32)
    if drafts.shape[1]:
        count = _leading(jax.random.uniform(uniform, drafts.shape) * of_q < of_p)
    rest = jnp.maximum(p - jnp.concatenate([q, jnp.zeros_like(p[:, :1])], axis=1), 0)
    rest, own = (jnp.take_along_axis(x, count[:, None, None], axis=1)[:, 0] for x in (rest, p))
    # Rounding may reject where p and q are the same, and leave nothing over: then p itself is the rest.
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, own)
    token = jax.random.categorical(draw, jnp.log(rest), axis=-1).astype(jnp.int32)
    place = jnp.arange(p.shape[1], dtype=jnp.int32)[None]
    tokens = jnp.concatenate([drafts, token[:, None]], axis=1)
    return count, jnp.where(place == count[:, None], token[:, None], tokens)


def _leading(stands: Array) -> Array:
    """How many of a row's first entries are True."""
    return jnp.cumprod(stands.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
