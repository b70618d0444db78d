"""Load balancing of experts: methods that make the load even, and measures of how even it is.

Three methods: the loss-free bias (no gradient), V3's loss for each sequence, and Switch's loss for the batch.
Four measures of a load [..., E]: MaxVio, entropy, Gini coefficient, and the smallest and largest load.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def load(expert_ids: Int[Array, "*n K"], num_experts: int, mask: Bool[Array, "*n"] | None = None) -> Float[Array, " E"]:
    """Count how many assignments each expert got.

    Args:
        expert_ids: the chosen experts, each in 0 … num_experts - 1.
        num_experts: E.
        mask: tokens where it is False do not count. None means all count.
    Returns: float32 counts.

    Example:
        >>> load(jnp.array([[0, 1], [0, 2], [0, 1]]), 4)
        Array([3., 2., 1., 0.], dtype=float32)
    """
    ids = expert_ids.reshape(-1)
    ones = jnp.ones(ids.shape, jnp.int32)
    if mask is not None:
        ones = jnp.broadcast_to(mask[..., None], expert_ids.shape).reshape(-1).astype(jnp.int32)
    # Whole numbers: they are exact in any order of additions, and beyond 2^24, where adding 1 to a float32 ends.
    return jax.ops.segment_sum(ones, ids, num_segments=num_experts).astype(jnp.float32)


def bias_update(bias: Float[Array, "*l E"], load: Float[Array, "*l E"], rate: float | Array) -> Float[Array, "*l E"]:
    """Take one step of loss-free balancing: b_e ← b_e + γ · sign(mean load − load_e).

    Args:
        bias: the router's correction of each expert, for one layer or several.
        load: counts over the step's global batch, on all devices.
        rate: γ.
    Returns: the new bias, in the bias's dtype.

    Example:
        >>> bias_update(jnp.zeros(4), load=jnp.array([3.0, 2.0, 1.0, 2.0]), rate=0.5)  # the mean is 2
        Array([-0.5,  0. ,  0.5,  0. ], dtype=float32)

    Source: arXiv 2408.15664; DeepSeek-V3 report, section 2.1.2.
    """
    return bias + (rate * jnp.sign(load.mean(-1, keepdims=True) - load)).astype(bias.dtype)


def sequence_loss(scores: Float[Array, "B T E"], k: int, mask: Bool[Array, "B T"] | None = None) -> Float[Array, " B"]:
    """Compute V3's complementary balance loss of each sequence: Σ_e f_e P_e.

    f_e = E/(K·T) · #{t : e in topK(s_t)};  P_e = mean_t s_te / Σ_e s_te

    The gradient flows through P alone, because f is a count. The loss is 1 if the routing of a sequence is even. Its
    weight α and the mean over sequences are left to the caller.

    Args:
        scores: s, the scores of all experts, without bias. The top K are taken from them, without groups.
        k: K, experts for each token.
        mask: positions where it is False are left out of both means. None means all count.
    Returns: one loss for each sequence, in the dtype of `scores`.

    Example:
        >>> sequence_loss(jnp.eye(4)[None], k=1)  # each of four tokens has its own expert
        Array([1.], dtype=float32)

    Source: DeepSeek-V3 report, equations 17-20.
    """
    num_experts = scores.shape[-1]
    weight = jnp.ones(scores.shape[:2], scores.dtype) if mask is None else mask.astype(scores.dtype)
    length = jnp.maximum(weight.sum(-1), 1)[:, None]  # [B, 1]
    chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]
    rows = jnp.arange(scores.shape[0])[:, None, None]
    counts = jnp.zeros((scores.shape[0], num_experts), jnp.int32)
    counts = counts.at[rows, chosen].add(weight[..., None].astype(jnp.int32))  # as in `load`
    f = counts.astype(scores.dtype) * num_experts / (k * length)
    shares = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    p = (shares * weight[..., None]).sum(1) / length
    return (f * p).sum(-1)


def switch_loss(
    scores: Float[Array, "n E"], expert_ids: Int[Array, "n K"], mask: Bool[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Compute Switch Transformer's balance loss of a batch: E · Σ_e f_e P_e.

    f_e is expert e's share of the assignments; P_e is the mean of its score, normalised over experts. The loss is 1 if
    the routing is even and E if one expert has everything. Its weight α is left to the caller.

    Args:
        scores: scores of all experts, without bias.
        expert_ids: the chosen experts.
        mask: tokens where it is False are left out. None means all count.
    Returns: the loss, in the dtype of `scores`.

    Example:
        >>> switch_loss(jnp.eye(4)[:2], expert_ids=jnp.array([[0], [1]]))  # two of four experts share all tokens
        Array(2., dtype=float32)

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
    """Compute the maximal violation MaxVio = (max load − mean load) / mean load.

    Args: load: counts, float32.
    Returns: 0 if the load is even, E − 1 if one expert has all of it.

    Example:
        >>> max_vio(jnp.array([6.0, 2.0, 2.0, 2.0]))
        Array(1., dtype=float32)

    Source: arXiv 2408.15664, equation 4.
    """
    mean = jnp.maximum(load.mean(-1), 1e-20)
    return load.max(-1) / mean - 1


def entropy(load: Float[Array, "*l E"]) -> Float[Array, "*l"]:
    """Compute the entropy of the experts' shares of the load, divided by ln E.

    Args: load: counts or scores, float32.
    Returns: 1 if the load is even, 0 if one expert has all of it.

    Example:
        >>> entropy(jnp.array([5.0, 5.0, 0.0, 0.0]))  # ln 2 / ln 4
        Array(0.5, dtype=float32)
    """
    shares = load / jnp.maximum(load.sum(-1, keepdims=True), 1e-20)
    nats = -(shares * jnp.log(jnp.maximum(shares, 1e-20))).sum(-1)
    return nats / jnp.log(jnp.asarray(max(load.shape[-1], 2), load.dtype))


def gini(load: Float[Array, "*l E"]) -> Float[Array, "*l"]:
    """Compute the Gini coefficient of the load.

    Args: load: counts, float32.
    Returns: 0 if the load is even, 1 − 1/E if one expert has all of it.

    Example:
        >>> gini(jnp.array([12.0, 0.0, 0.0, 0.0]))
        Array(0.75, dtype=float32)
    """
    num_experts = load.shape[-1]
    ordered = jnp.sort(load, axis=-1)
    ranks = 2 * jnp.arange(1, num_experts + 1, dtype=load.dtype) - num_experts - 1
    ranks = ranks.reshape((1,) * (load.ndim - 1) + (-1,))
    return (ordered * ranks).sum(-1) / (num_experts * jnp.maximum(load.sum(-1), 1e-20))


def min_max(load: Float[Array, "*l E"]) -> tuple[Float[Array, "*l"], Float[Array, "*l"]]:
    """Compute the smallest and the largest load, as multiples of the mean load.

    Args: load: counts, float32.
    Returns: (smallest, largest).

    Example:
        >>> min_max(jnp.array([6.0, 3.0, 3.0, 0.0]))
        (Array(0., dtype=float32), Array(2., dtype=float32))
    """
    mean = jnp.maximum(load.mean(-1), 1e-20)
    return load.min(-1) / mean, load.max(-1) / mean
