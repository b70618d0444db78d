"""What changes over a run: the learning rate, the MTP losses' weight, the loss-free bias's step."""

import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.config import OptimConfig


def learning_rate(cfg: OptimConfig, steps: int, step: Array) -> Array:
    """Rise linearly for `warmup_steps`, then follow `cfg.schedule`; float32.

    report   constant to `decay_start`, a cosine to `decay_end`, then constant
             (DeepSeek-V3 report, section 4.2)
    wsd      constant to `decay_start`, a straight line to `decay_end`, then constant
             (arXiv 2404.06395, 2405.18392)
    cosine   a cosine from the end of the warm-up to the last step
             (arXiv 1608.03983, without restarts)

    No decay begins before the end of the warm-up, so the rate reaches `learning_rate`.

    Example:
        >>> when = dict(warmup_steps=10, decay_start=0.5, decay_end=0.9)
        >>> cfg = OptimConfig(learning_rate=1.0, final_learning_rate=0.2, **when)
        >>> [round(float(x), 2) for x in learning_rate(cfg, 100, jnp.array([0, 9, 50, 70, 99]))]
        [0.1, 1.0, 1.0, 0.6, 0.2]
    """
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / max(cfg.warmup_steps, 1))

    # The decay runs from 0 to 1 along `start` … `end`.
    start = max(cfg.decay_start * steps, float(cfg.warmup_steps))
    end = cfg.decay_end * steps
    if cfg.schedule == "cosine":
        start = float(cfg.warmup_steps)
        end = float(steps)
    along = jnp.clip((step - start) / max(end - start, 1.0), 0.0, 1.0)

    low, high = cfg.final_learning_rate, cfg.learning_rate
    if cfg.schedule == "wsd":
        return warm * (high + (low - high) * along)
    return warm * (low + (high - low) * 0.5 * (1 + jnp.cos(jnp.pi * along)))


def mtp_weight(cfg: OptimConfig, steps: int, step: Array) -> Array:
    """λ: the weight of the MTP losses, lowered at `decay_start` whatever the schedule; float32.

    Example:
        >>> mtp_weight(OptimConfig(decay_start=0.5), 100, jnp.array([49, 50]))
        Array([0.3, 0.1], dtype=float32)
    """
    early = jnp.asarray(step, jnp.float32) < cfg.decay_start * steps
    return jnp.where(early, cfg.mtp_weight, cfg.mtp_final_weight).astype(jnp.float32)


def bias_rate(cfg: OptimConfig, rate: float, steps: int, step: Array) -> Array:
    """γ: the step of the loss-free bias, 0 from the share `bias_freeze` of the steps on; float32.

    Example:
        >>> bias_rate(OptimConfig(bias_freeze=0.5), 1e-3, 100, jnp.array([49, 50]))
        Array([0.001, 0.   ], dtype=float32)
    """
    moves = jnp.asarray(step, jnp.float32) < cfg.bias_freeze * steps
    return jnp.where(moves, rate, 0.0).astype(jnp.float32)
