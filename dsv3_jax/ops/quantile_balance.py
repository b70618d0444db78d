"""Quantile balancing: the bias with which each expert would have had its even share of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def quantile_margins(
    scores: Float[Array, "n E"], bias: Float[Array, " E"], k: int
) -> Float[Array, "n E"]:
    """Compute margins over a token's cut: m_te = s_te − α_t, α_t the (K+1)-th largest of s_t + b.

    Token t chooses expert e exactly if m_te + b_e > 0.

    Example:
        >>> quantile_margins(jnp.array([[0.5, 0.25, 0.125]]), jnp.array([0.0, 0.0, 0.5]), k=1)
        Array([[ 0.   , -0.25 , -0.375]], dtype=float32)
    """
    scores = jax.lax.stop_gradient(scores)
    largest, _ = jax.lax.top_k(scores + bias[None], k + 1)
    return scores - largest[:, k:]


def quantile_target(
    margins: Float[Array, "*n E"], mask: Bool[Array, "*n"], bias: Float[Array, " E"], k: int
) -> Float[Array, " E"]:
    """Compute the bias with which each expert would have had q = ⌊N K / E⌋ of the N tokens.

    b*_e = −(the (q+1)-th largest of m_te over the tokens t that count)

    Then m_te + b*_e > 0 holds for q tokens of each expert, or for fewer if several margins are
    equal to −b*_e. It is one step of coordinate descent on the dual of the assignment problem: the
    cuts α_t use the old bias.

    The order statistic is exact and needs no sort. The margins' bits, read as integers of the same
    order, are searched bit by bit, and a step counts the margins above a trial value. On a mesh
    only these counts are summed, in whole numbers. So the target is that of all tokens, and the
    same on any mesh.

    Args:
        margins: from `quantile_margins`, of all tokens of a batch.
        mask: tokens that count.
        bias: the old one. It is returned if no token counts.
        k: K.

    Example:
        >>> from functools import partial
        >>> margins = jnp.array([[0.5, 0.0], [0.25, 0.0], [-0.25, 0.75], [-0.5, 0.5]])
        >>> target = jax.jit(partial(quantile_target, k=1))
        >>> target(margins, jnp.ones(4, bool), jnp.zeros(2))  # each is over two tokens
        Array([ 0.25, -0.  ], dtype=float32)
    """
    num_experts = margins.shape[-1]
    tokens = tuple(range(mask.ndim))
    each = (1,) * mask.ndim + (-1,)

    # ⌊N K / E⌋ in whole numbers that do not overflow.
    count = mask.sum(dtype=jnp.int32)
    q = count // num_experts * k + count % num_experts * k // num_experts

    # The margins' bits as integers of the same order. A token that does not count is below all.
    sign = np.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(margins.astype(jnp.float32), jnp.uint32)
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)
    ordered = jnp.where(mask[..., None], ordered, np.uint32(0))

    # The largest integer that more than q margins reach, from its highest bit to its lowest.
    def search(step: Array, found: Array) -> Array:
        trial = found | (sign >> step.astype(jnp.uint32))
        reached = (ordered >= trial.reshape(each)).sum(axis=tokens, dtype=jnp.int32)
        return jnp.where(reached > q, trial, found)

    found = jax.lax.fori_loop(0, 32, search, jnp.zeros((num_experts,), jnp.uint32))

    # The same as a float32.
    bits = jnp.where(found >= sign, found ^ sign, ~found)
    cut = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(count > 0, -cut, bias)


def quantile_update(
    bias: Float[Array, "*l E"], target: Float[Array, "*l E"], rate: Array
) -> Float[Array, "*l E"]:
    """Take one step of quantile balancing: b ← c − mean c, with c = b + γ (b* − b).

    The choice depends on differences of biases only; their mean is kept at 0, so that they do not
    drift.

    Args:
        bias: the router's correction of each expert, for one layer or several.
        target: b*, from `quantile_target`. If the batch is split in microbatches, the mean of
            theirs.
        rate: γ in [0, 1]. The bias does not change at 0, whatever the target.
    Returns: the new bias, in the bias's dtype.

    Example:
        >>> quantile_update(jnp.zeros(2), jnp.array([0.5, 0.0]), jnp.float32(0.5))
        Array([ 0.125, -0.125], dtype=float32)

    Source: quantile balancing, kexue.fm/archives/11619; `qb_dual_update` of NVIDIA's Megatron-LM.
    Departs from the source: the quantile is of all tokens of the global batch, not a mean over
    devices.
    """
    moved = bias + rate * (target - bias)
    return jnp.where(rate > 0, moved - moved.mean(-1, keepdims=True), bias).astype(bias.dtype)
