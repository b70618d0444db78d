"""Logits whose vocabulary a mesh shards, made ready to sample from."""

from jaxtyping import Array, Float

from dsv3_jax.mesh.sharding import constrain, shard_map_over_batch
from dsv3_jax.ops.sampling import Sampling, processed_logits, sample
from dsv3_jax.ops.verify_drafts import Drafts, probabilities


def process_by_rows(logits: Float[Array, "B *F W"], sampling: Sampling) -> tuple[Float[Array, "B *F W"], Sampling]:
    """Apply temperature, top-k and top-p to logits; on a mesh each device to its own rows of complete vocabulary.

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
    # Sharded as the unembedding at first: otherwise the compiler gathers its matrix, not the logits.
    logits = constrain(constrain(logits, "batch", *middle, "vocab"), "batch", *middle, None)
    if sampling.temperature == 0.0:
        return logits, sampling
    _, kept = shard_map_over_batch(lambda x: ((), processed_logits(x, **sampling._asdict())), (), logits)
    return kept, Sampling(temperature=1.0)


def draw(logits: Float[Array, "B W"], keys: Array, sampling: Sampling) -> Drafts:
    """Draw one draft a sequence, with the keys [B]; without the axis of drafts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> draw(jnp.array([[0.1, 0.7, 0.2]]), jax.random.split(jax.random.key(0), 1), Sampling())
        Drafts(tokens=Array([1], dtype=int32), q=None)
    """
    logits, left = process_by_rows(logits, sampling)
    token = constrain(sample(logits, keys, **left._asdict()))
    return Drafts(token, probabilities(logits, left) if sampling.temperature else None)
