"""Logits whose vocabulary a mesh shards: made ready to sample from, and scored."""

import jax
from jaxtyping import Array, Float, Int

from dsv3_jax.mesh.sharding import constrain, shard_map_over_batch
from dsv3_jax.ops.cross_entropy import token_scores
from dsv3_jax.ops.dtypes import sum_dtype
from dsv3_jax.ops.sampling import (
    GREEDY,
    RowSampling,
    Sampling,
    processed_by_rows,
    processed_logits,
    sample,
)
from dsv3_jax.ops.varying import as_varying
from dsv3_jax.ops.verify_drafts import Drafts, probabilities


def process_by_rows(
    logits: Float[Array, "B *F W"], sampling: Sampling | RowSampling
) -> tuple[Float[Array, "B *F W"], Sampling]:
    """Apply temperature, top-k and top-p to logits; each device of a mesh takes its own rows.

    Otherwise the compiler would gather all rows for a `top_k`.
    Returns: (logits, sharded by rows; the sampling that is left to do).

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
        >>> kept, left = process_by_rows(logits, Sampling(temperature=2.0, top_k=1))
        >>> jnp.isfinite(kept), left.temperature
        (Array([[ True, False, False]], dtype=bool), 1.0)
    """
    middle = (None,) * (logits.ndim - 2)
    # Sharded as the unembedding at first: else the compiler gathers its matrix, not the logits.
    logits = constrain(constrain(logits, "batch", *middle, "vocab"), "batch", *middle, None)

    # Greedy decoding takes the argmax, which top-k and top-p do not change.
    if sampling.is_greedy:
        return logits, GREEDY
    if isinstance(sampling, RowSampling):
        process = shard_map_over_batch(lambda _, x, rows: ((), processed_by_rows(x, rows)), logits)
        return process((), logits, sampling)[1], Sampling(temperature=1.0)

    settings = sampling._asdict()
    process = shard_map_over_batch(lambda _, x: ((), processed_logits(x, **settings)), logits)
    return process((), logits)[1], Sampling(temperature=1.0)


def draw(logits: Float[Array, "B W"], keys: Array, sampling: Sampling | RowSampling) -> Drafts:
    """Draw one draft for each sequence, with the keys [B]; the result has no axis of drafts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> draw(jnp.array([[0.1, 0.7, 0.2]]), jax.random.split(jax.random.key(0), 1), Sampling())
        Drafts(tokens=Array([1], dtype=int32), q=None)
    """
    logits, left = process_by_rows(logits, sampling)
    token = constrain(sample(logits, keys, **left._asdict()))
    return Drafts(token, None if sampling.is_greedy else probabilities(logits, left))


def likeliest(logits: Float[Array, "B F W"], count: int) -> tuple[Array, Array]:
    """The likeliest tokens [B, F, count] and their log-probabilities, best first.

    Each device of a mesh takes its own rows.

    Example:
        >>> import jax.numpy as jnp
        >>> nats, tokens = likeliest(jnp.log(jnp.array([[[0.2, 0.5, 0.3]]])), 2)
        >>> tokens, jnp.exp(nats).round(1)
        (Array([[[1, 2]]], dtype=int32), Array([[[0.5, 0.3]]], dtype=float32))
    """

    def of_rows(_: tuple, logits: Array) -> tuple[tuple, tuple[Array, Array]]:
        nats, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), count)
        return (), (nats, tokens)

    return shard_map_over_batch(of_rows, logits)((), logits)[1]


def score_by_rows(
    h: Float[Array, "B S D"],
    matrix: Float[Array, "D W"],
    wanted: Int[Array, "B S"],
    temperature: float = 1.0,
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """Compute `ops.cross_entropy.token_scores`; each device of a mesh takes its own rows.

    Example:
        >>> import jax.numpy as jnp
        >>> nats, best = score_by_rows(jnp.eye(2)[None], 3 * jnp.eye(2), jnp.array([[0, 0]]))
        >>> nats.round(2), best
        (Array([[0.05, 3.05]], dtype=float32), Array([[0, 1]], dtype=int32))
    """

    def score(wide: Array, h: Array, wanted: Array) -> tuple[tuple, tuple[Array, ...]]:
        # Devices add up the gradient of what becomes varying, so that is not in bfloat16.
        w = as_varying(wide, h).astype(matrix.dtype)
        found = token_scores(
            h.reshape(-1, h.shape[-1]), w, wanted.reshape(-1), temperature=temperature
        )
        return (), tuple(x.reshape(wanted.shape) for x in found)

    wide = matrix.astype(sum_dtype(matrix.dtype))
    return shard_map_over_batch(score, h)(wide, h, wanted)[1]
