"""Sampling of the next token from logits: greedy, temperature, top-k, top-p."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Sampling(NamedTuple):
    """Settings of `sample`.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.9)
        Sampling(temperature=0.8, top_k=None, top_p=0.9)
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int | None = None  # None keeps all tokens
    top_p: float | None = None  # None keeps all tokens

    @property
    def is_greedy(self) -> bool:
        """Whether all rows take their likeliest token."""
        return self.temperature == 0.0


class RowSampling(NamedTuple):
    """Settings of each row's own. A program takes them as arrays, and so serves all of them.

    Example:
        >>> RowSampling(jnp.zeros(2), jnp.array([8, 8]), jnp.ones(2)).is_greedy
        False
    """

    temperature: Float[Array, " B"]  # 0 takes the likeliest token
    top_k: Int[Array, " B"]  # the size of the vocabulary, or more, keeps all tokens
    top_p: Float[Array, " B"]  # 1 keeps all tokens

    @property
    def is_greedy(self) -> bool:
        """False: the program does not know the temperatures."""
        return False


GREEDY = Sampling()


def processed_logits(
    logits: Float[Array, "*n W"],
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Array, "*n W"]:
    """Apply temperature, then top-k, then top-p. Tokens that are cut get −inf.

    Args:
        logits: float32, W tokens in the last axis. The largest one, divided by the temperature, is
            at most 3.4e38, float32's largest number: with an infinite one the softmax is NaN.
        temperature: above 0.
        top_k: keep the top_k largest logits, and all that equal the smallest of these. None keeps
            all.
        top_p: keep the fewest tokens, largest first, whose probabilities sum to at least top_p, and
            all that equal the smallest of these. None keeps all.
    Returns: logits whose softmax is the distribution to sample from.

    Example:
        >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
        >>> kept = processed_logits(logits, temperature=1.0, top_p=0.7)
        >>> jax.nn.softmax(kept).round(1)  # 0.5 / 0.8, 0.3 / 0.8
        Array([0.6, 0.4, 0. , 0. ], dtype=float32)
    """
    logits = logits / temperature

    if top_k is not None and top_k < logits.shape[-1]:
        last = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < last, -jnp.inf, logits)

    if top_p is not None and top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        logits = jnp.where(logits < _last_kept(ordered, top_p), -jnp.inf, logits)
    return logits


def _last_kept(ordered: Array, top_p: Array | float) -> Array:
    """The smallest logit that top-p keeps, [..., 1], of logits in order, the largest first."""
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # of all larger tokens
    return jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)


def processed_by_rows(
    logits: Float[Array, "B *F W"], sampling: RowSampling
) -> Float[Array, "B *F W"]:
    """Compute `processed_logits` with settings of each row's own.

    Temperature 0 keeps the largest logit alone, and so makes the draw certain.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]] * 3))
        >>> rows = RowSampling(*map(jnp.array, ([0.0, 1.0, 1.0], [3, 3, 2], [1.0, 0.4, 1.0])))
        >>> jnp.isfinite(processed_by_rows(logits, rows)).sum(-1)
        Array([1, 1, 2], dtype=int32)
    """
    of_row = (-1, *(1,) * (logits.ndim - 1))
    temperature, top_k, top_p = (x.reshape(of_row) for x in sampling)
    num_tokens = logits.shape[-1]
    is_greedy = temperature == 0

    # Temperature, then top-k and top-p. To sort a vocabulary takes long, so only if a row asks.
    kept = logits / jnp.where(is_greedy, 1.0, temperature)
    cuts = ((top_k < num_tokens) | (top_p < 1.0)) & ~is_greedy
    kept = jax.lax.cond(cuts.any(), lambda x: _cut(x, top_k, top_p), lambda x: x, kept)

    # Temperature 0: the likeliest token alone.
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    token = jax.lax.broadcasted_iota(best.dtype, logits.shape, logits.ndim - 1)
    return jnp.where(is_greedy & (token != best), -jnp.inf, kept)


def _cut(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Top-k, then top-p, each row by its own. A token that equals the smallest one stays."""
    ordered = jnp.sort(logits, axis=-1, descending=True)

    place = jnp.minimum(top_k, logits.shape[-1]) - 1
    place = jnp.broadcast_to(place, (*logits.shape[:-1], 1))
    least = jnp.take_along_axis(ordered, place, axis=-1)
    ordered = jnp.where(ordered < least, -jnp.inf, ordered)

    least = jnp.where(top_p < 1.0, jnp.maximum(least, _last_kept(ordered, top_p)), least)
    return jnp.where(logits < least, -jnp.inf, logits)


def row_keys(seed: Array | int, texts: Int[Array, " B"], samples: Int[Array, " B"]) -> Array:
    """Two keys [B, 2] for each row of a batch: of its draws, and of its drafts'.

    Args: seed: of all rows, or one each. texts: a hash of each row's prompt, of 32 bits. samples:
        which of the prompt's samples it is.

    Example:
        >>> row_keys(0, jnp.array([-7, -7, 9]), jnp.array([0, 1, 0])).shape
        (3, 2)
    """

    def keys(seed: Array, text: Array, sample: Array) -> Array:
        of_text = jax.random.fold_in(jax.random.key(seed), text)
        return jax.random.split(jax.random.fold_in(of_text, sample))

    return jax.vmap(keys)(jnp.broadcast_to(seed, texts.shape), texts, samples)


def keys_at(keys: Array, positions: Int[Array, "B F"]) -> Array:
    """Make a key [B, F] for each position, of the rows' keys [B]: a draw depends on these two.

    Example:
        >>> keys = keys_at(jax.random.split(jax.random.key(0), 2), jnp.array([[3, 4], [4, 5]]))
        >>> keys.shape, bool(keys[0, 1] == keys[1, 0])
        ((2, 2), False)
    """
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, positions)


def sample(
    logits: Float[Array, "*n W"],
    key: Array,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "*n"]:
    """Draw one token for each row of logits.

    Args:
        logits: float32, W tokens in the last axis.
        key: of `jax.random.key`, or an array of them, of one a row or of fewer axes; unused at
            temperature 0.
        temperature: 0 takes the largest logit; then top_k and top_p have no effect.
        top_k, top_p: as in `processed_logits`.
    Returns: int32 tokens.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
        >>> sample(logits, jax.random.key(0), temperature=0.0)
        Array([0, 2], dtype=int32)
        >>> sample(logits, jax.random.key(0), temperature=1.0, top_k=1)
        Array([0, 2], dtype=int32)
    """
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = processed_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)

    # One draw for each key.
    draw = partial(jax.random.categorical, axis=-1)
    for _ in range(key.ndim):
        draw = jax.vmap(draw)
    return draw(key, kept).astype(jnp.int32)


def log_probability(logits: Float[Array, "*n W"], tokens: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """The log-probability of each token, in nats.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
        >>> log_probability(logits, jnp.array([0])).round(2)  # ln 0.5
        Array([-0.69], dtype=float32)
    """
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
