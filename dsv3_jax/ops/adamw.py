"""AdamW's update of one array. Source: arXiv 1711.05101."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def adamw_update(
    p: Float[Array, "*n"],
    mu: Float[Array, "*n"],
    nu: Float[Array, "*n"],
    g: Float[Array, "*n"],
    numbers: Float[Array, "5"],
    *,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> tuple[Float[Array, "*n"], Float[Array, "*n"], Float[Array, "*n"]]:
    """Take one step: μ ← β₁μ + (1−β₁)g, ν ← β₂ν + (1−β₂)g², p ← p − η (μ̂ / (√ν̂ + ε) + decay · p).

    The means may be bfloat16. They are computed and used in the gradient's dtype, and rounded to
    the nearest only when they are stored. Source: DeepSeek-V3 report, section 3.3.2.

    Args:
        p, mu, nu, g: parameter, running means of the gradient and of its square, gradient.
        numbers: factor of g (clipping), 1 / (1 − β₁ᵗ), 1 / (1 − β₂ᵗ), learning rate η, and 1 to
            take the step or 0 to change nothing.
        betas: β₁, β₂.
    Returns: (p, mu, nu).

    Example:
        >>> p, zero, g = jnp.array([1.0]), jnp.zeros(1), jnp.array([0.5])
        >>> numbers = jnp.array([1.0, 10.0, 20.0, 0.1, 1.0])  # 1, 1 / (1 − β₁), 1 / (1 − β₂), η, 1
        >>> p, _, _ = adamw_update(p, zero, zero, g, numbers, betas=(0.9, 0.95), eps=0.0, decay=0.0)
        >>> p.round(4)  # the first step has the length η, whatever the gradient
        Array([0.9], dtype=float32)
    """
    clip, to_mean, to_square, rate, takes_step = numbers
    beta1, beta2 = betas
    moves = takes_step > 0
    g = g * clip
    kept_dtype = mu.dtype
    mu, nu = mu.astype(g.dtype), nu.astype(g.dtype)
    mu = jnp.where(moves, beta1 * mu + (1 - beta1) * g, mu)
    nu = jnp.where(moves, beta2 * nu + (1 - beta2) * g * g, nu)
    move = mu * to_mean / (jnp.sqrt(nu * to_square) + eps)
    if decay:
        move = move + decay * p
    return jnp.where(moves, p - rate * move, p), mu.astype(kept_dtype), nu.astype(kept_dtype)
