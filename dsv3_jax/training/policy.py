"""GRPO: which of a model's answers to a prompt were better, and the loss that favours them.

The answers to one prompt are a group. An answer's advantage is its reward above the group's mean,
over the group's standard deviation. Each token t of an answer i has

    ratio_t = π(t) / π_old(t)
    gain_t  = min(ratio_t · A_i, clip(ratio_t, 1 − clip_low, 1 + clip_high) · A_i)
    kl_t    = π_start(t) / π(t) − ln(π_start(t) / π(t)) − 1
    L       = Σ_t (β · kl_t − gain_t) / N

where π_old is what the sampler computed. At a batch's first update, ratios would be 1 if sampler
and trainer computed alike. Their mismatch is measured: the mean of |ln ratio_t|, its maximum, and
KL(π_old ‖ π), the mean of ratio_t − 1 − ln ratio_t. All π are of the distribution that was sampled
from, so logits are divided by its temperature.

With outside="mask", gain_t is ratio_t · A_i from 1 − clip_low to 1 + clip_high, and 0 elsewhere,
for advantages of either sign. With learn_from="right", A_i is 1 where the reward is at least 1,
else 0.

Source: DeepSeekMath, arXiv 2402.03300, section 4.1; the mask is IcePop's, arXiv 2510.18855; right
answers alone RAFT's, arXiv 2304.06767, with ratios as in arXiv 2504.11343.
Departs from it: N is the number of tokens in all answers of the batch (DAPO, arXiv 2503.14476), or
with the form constant_length the number that they could have (arXiv 2503.20783). The paper takes
the mean over each answer first, which makes wrong answers longer. The only older policy is the
sampler: IcePop masks by trainer and sampler as they were before the batch's first update, and clips
by what updates have moved since.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dsv3_jax.config import Grpo

EPS = 1e-6  # of the division by a group's standard deviation
MOST = 20.0  # of ln ratio: exp would overflow; beyond it a token has no gradient


def advantages(
    rewards: Float[np.ndarray, "P G"], learn_from: str = "better"
) -> Float[np.ndarray, "P G"]:
    """Compare each answer with its group.

    Args:
        rewards: of G answers to each of P prompts.
        learn_from: as in `Grpo`.
    Returns: the advantages; zeros for a group of equal rewards.

    Example:
        >>> advantages(np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])).round(3).tolist()
        [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    if learn_from == "right":
        return (rewards >= 1).astype(rewards.dtype)
    above = rewards - rewards.mean(axis=1, keepdims=True)
    scaled = above / (rewards.std(axis=1, keepdims=True) + EPS)

    # The mean of equal rewards may differ from them in its last digit.
    return np.where((rewards == rewards[:, :1]).all(axis=1, keepdims=True), 0.0, scaled)


def policy_loss(
    logprobs: Float[Array, "B S"],
    old: Float[Array, "B S"],
    start: Float[Array, "B S"] | None,
    advantage: Float[Array, "B S"],
    mask: Bool[Array, "B S"],
    cfg: Grpo,
) -> tuple[Array, dict[str, Array]]:
    """Sum the loss over tokens; the caller divides.

    Args:
        logprobs, old, start: log π, log π_old and log π_start of each token. `start` may be None:
            there is no KL.
        advantage: A, that of the answer that each token is of.
        mask: tokens of answers.
    Returns: (the sum; sums of the measures "mismatch", "sampler_kl", "clipped" and "kl", and the
        maximum "max_mismatch").

    Example:
        >>> one = jnp.ones((1, 1))
        >>> cfg = Grpo(clip_high=0.25)
        >>> loss, found = policy_loss(jnp.log(2 * one), 0 * one, None, one, one > 0, cfg)
        >>> float(loss), float(found["clipped"])  # twice as likely as it was: it counts 1.25 times
        (-1.25, 1.0)
    """
    # Clipping makes the gain constant where a token has moved far enough, so its gradient is 0. A
    # mask also leaves out tokens that would move back.
    apart = jnp.where(mask, logprobs - old, 0.0)
    ratio = jnp.exp(jnp.minimum(apart, MOST))
    free = ratio * advantage
    low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
    if cfg.outside == "mask":
        left_out = (ratio < low) | (ratio > high)
        gain = jnp.where(left_out, 0.0, free)
    else:
        clipped = jnp.clip(ratio, low, high) * advantage
        left_out = clipped < free
        gain = jnp.minimum(free, clipped)
    loss = -jnp.where(mask, gain, 0.0).sum()

    # Sampler and trainer differ by rounding, and by more if one of them is wrong.
    size = jnp.abs(apart)
    found = {
        "mismatch": size.sum(),
        "max_mismatch": size.max(),
        "sampler_kl": (jnp.expm1(jnp.minimum(apart, MOST)) - apart).sum(),
        "clipped": jnp.where(mask, left_out, False).sum(dtype=jnp.float32),
    }

    # KL to the start, by an estimate that is never negative.
    if start is not None:
        above = jnp.minimum(jnp.where(mask, start - logprobs, 0.0), MOST)
        found["kl"] = (jnp.exp(above) - above - 1.0).sum()
        loss += cfg.kl * found["kl"]
    return loss, found
