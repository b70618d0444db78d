"""From logits to a token: greedy, temperature, top-k, top-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Sampling(NamedTuple):
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


GREEDY = Sampling()


def processed_logits(
    logits: Float[Array, "*n W"], *, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Float[Array, "*n W"]:
    """Logits after temperature, top-k and top-p, in that order; what is cut is −inf.

    Args:
        temperature: above 0.
        top_k: keep so many of the largest (ties with the last kept stay).
        top_p: keep the smallest set of largest tokens whose probability reaches it; at least one.
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        last = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < last, -jnp.inf, logits)
    if top_p is not None and top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # probability of everything larger
        last = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    return logits


def sample(
    logits: Float[Array, "*n W"],
    key: Array,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "*n"]:
    """One token a row, int32. Temperature 0 is greedy."""
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = processed_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return jax.random.categorical(key, kept, axis=-1).astype(jnp.int32)
