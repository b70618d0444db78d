"""Keeping expert load even, and measuring how even it is.

Three means: the loss-free bias (no gradient), the sequence-wise loss of V3, the batch-wise loss of Switch.
Four measures of a load vector: MaxVio, entropy, Gini, and the range.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def load(expert_ids: Int[Array, "*n K"], num_experts: int, mask: Bool[Array, "*n"] | None = None) -> Float[Array, " E"]:
    """How many assignments each expert got: float32 counts [E]; tokens where mask is False do not count."""
    ids = expert_ids.reshape(-1)
    ones = jnp.ones(ids.shape, jnp.float32)
    if mask is not None:
        ones = jnp.broadcast_to(mask[..., None], expert_ids.shape).reshape(-1).astype(jnp.float32)
    return jax.ops.segment_sum(ones, ids, num_segments=num_experts)


def bias_update(bias: Float[Array, "*l E"], load: Float[Array, "*l E"], rate: float | Array) -> Float[Array, "*l E"]:
    """Loss-free balancing: b_e += γ·sign(mean load − load_e).

    Args: bias [..., E]; load [..., E], counted over the whole global batch of the step; rate: γ.
    Source: arXiv 2408.15664; DeepSeek-V3 report, section 2.1.2.
    """
    return bias + (rate * jnp.sign(load.mean(-1, keepdims=True) - load)).astype(bias.dtype)


def sequence_loss(scores: Float[Array, "B T E"], k: int, mask: Bool[Array, "B T"] | None = None) -> Float[Array, " B"]:
    """V3's complementary loss, one number a sequence (multiply by α, average over sequences).

    Σ_e f_e P_e,  f_e = E/(K·T) · #{t : e in topK(s_t)},  P_e = mean_t s_te / Σ_e s_te

    The top K here are of the unbiased, ungrouped scores. Positions where mask is False are left out of both means.
    Source: DeepSeek-V3 report, equations 17-20.
    """
    num_experts = scores.shape[-1]
    weight = jnp.ones(scores.shape[:2], scores.dtype) if mask is None else mask.astype(scores.dtype)
    length = jnp.maximum(weight.sum(-1), 1)[:, None]  # [B, 1]
    chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]
    rows = jnp.arange(scores.shape[0])[:, None, None]
    counts = jnp.zeros((scores.shape[0], num_experts), scores.dtype).at[rows, chosen].add(weight[..., None])
    f = counts * num_experts / (k * length)
    shares = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    p = (shares * weight[..., None]).sum(1) / length
    return (f * p).sum(-1)


def switch_loss(
    scores: Float[Array, "n E"], expert_ids: Int[Array, "n K"], mask: Bool[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Switch Transformer's loss over the batch (multiply by α): E·Σ_e f_e P_e, 1 when all is even.

    f_e is the share of assignments that expert e got, P_e the mean of its normalised score.
    Source: arXiv 2101.03961, equations 4-6.
    """
    num_experts = scores.shape[-1]
    weight = jnp.ones(scores.shape[:1], scores.dtype) if mask is None else mask.astype(scores.dtype)
    total = jnp.maximum(weight.sum(), 1)
    f = load(expert_ids, num_experts, mask).astype(scores.dtype) / (total * expert_ids.shape[-1])
    shares = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    p = (shares * weight[:, None]).sum(0) / total
    return num_experts * (f * p).sum()


def max_vio(load: Float[Array, "*l E"]) -> Float[Array, "*l"]:
    """Maximal violation: (max load − mean load) / mean load; 0 is even (arXiv 2408.15664, equation 4)."""
    mean = jnp.maximum(load.mean(-1), 1e-20)
    return load.max(-1) / mean - 1


def entropy(load: Float[Array, "*l E"]) -> Float[Array, "*l"]:
    """Entropy of the load shares over ln E: 1 is even, 0 is one expert alone."""
    shares = load / jnp.maximum(load.sum(-1, keepdims=True), 1e-20)
    nats = -(shares * jnp.log(jnp.maximum(shares, 1e-20))).sum(-1)
    return nats / jnp.log(jnp.asarray(max(load.shape[-1], 2), load.dtype))


def gini(load: Float[Array, "*l E"]) -> Float[Array, "*l"]:
    """Gini coefficient of the load: 0 is even, 1 − 1/E is one expert alone."""
    num_experts = load.shape[-1]
    ordered = jnp.sort(load, axis=-1)
    ranks = 2 * jnp.arange(1, num_experts + 1, dtype=load.dtype) - num_experts - 1
    ranks = ranks.reshape((1,) * (load.ndim - 1) + (-1,))
    return (ordered * ranks).sum(-1) / (num_experts * jnp.maximum(load.sum(-1), 1e-20))


def min_max(load: Float[Array, "*l E"]) -> tuple[Float[Array, "*l"], Float[Array, "*l"]]:
    """Least and largest load, as multiples of the mean."""
    mean = jnp.maximum(load.mean(-1), 1e-20)
    return load.min(-1) / mean, load.max(-1) / mean
