"""AdamW and the schedules of the DeepSeek-V3 report, section 4.2: each a function of step and the run's length."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dsv3_jax.config import OptimConfig
from dsv3_jax.kernels.choose import Kernels


def learning_rate(cfg: OptimConfig, steps: int, step: Array) -> Array:
    """Warm-up, constant, cosine, constant; float32.

    Example:
        >>> cfg = OptimConfig(
        ...     learning_rate=1.0, final_learning_rate=0.2, warmup_steps=10, decay_start=0.5, decay_end=0.9
        ... )
        >>> [round(float(x), 2) for x in learning_rate(cfg, 100, jnp.array([0, 9, 50, 70, 99]))]
        [0.1, 1.0, 1.0, 0.6, 0.2]
    """
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / max(cfg.warmup_steps, 1))
    start, end = cfg.decay_start * steps, cfg.decay_end * steps
    along = jnp.clip((step - start) / max(end - start, 1.0), 0.0, 1.0)
    low, high = cfg.final_learning_rate, cfg.learning_rate
    return warm * (low + (high - low) * 0.5 * (1 + jnp.cos(jnp.pi * along)))


def mtp_weight(cfg: OptimConfig, steps: int, step: Array) -> Array:
    """λ: the weight of the MTP losses, lowered once the cosine begins; float32.

    Example:
        >>> mtp_weight(OptimConfig(decay_start=0.5), 100, jnp.array([49, 50]))
        Array([0.3, 0.1], dtype=float32)
    """
    early = jnp.asarray(step, jnp.float32) < cfg.decay_start * steps
    return jnp.where(early, cfg.mtp_weight, cfg.mtp_final_weight).astype(jnp.float32)


def bias_rate(cfg: OptimConfig, rate: float, steps: int, step: Array) -> Array:
    """γ: the step of the loss-free bias, 0 at the end of training; float32.

    Example:
        >>> bias_rate(OptimConfig(bias_freeze=0.5), 1e-3, 100, jnp.array([49, 50]))
        Array([0.001, 0.   ], dtype=float32)
    """
    return jnp.where(jnp.asarray(step, jnp.float32) < cfg.bias_freeze * steps, rate, 0.0).astype(jnp.float32)


class AdamState(NamedTuple):
    """Running means of the gradient and of its square, in the parameters' structure."""

    mu: nnx.State
    nu: nnx.State


def init(params: nnx.State, dtype: str = "float32") -> AdamState:
    """Means of 0. Args: dtype: as `OptimConfig.moments_dtype`.

    Example:
        >>> init(nnx.State({"w": nnx.Param(jnp.ones(2))})).mu["w"][...]
        Array([0., 0.], dtype=float32)
    """

    def zeros() -> nnx.State:
        return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)

    return AdamState(zeros(), zeros())


@jax.named_scope("optimizer")
def adamw(
    cfg: OptimConfig,
    steps: int,
    step: Array,
    params: nnx.State,
    adam: AdamState,
    grads: nnx.State,
    norm: Array,
    keep: Array,
    kernels: Kernels,
) -> tuple[nnx.State, AdamState]:
    """Take one step of AdamW on gradients clipped to a global norm; weight decay on all but the norms' scales.

    The numbers are those of optax.chain(clip_by_global_norm, adamw), in an order that XLA runs in place. optax's writes
    the clipped gradients out and copies both means: three times the memory traffic, and a gradient's size of temporary
    memory.

    Args:
        step: int32 [], steps taken before this one.
        norm: the gradients' global norm.
        keep: bool []: take the step; False changes nothing.
    Source: arXiv 1711.05101.

    Example:
        >>> from dsv3_jax.kernels.choose import Target
        >>> cfg = OptimConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0)
        >>> kernels = Kernels(Target("cpu", "xla"))
        >>> params, step, one = nnx.State({"w": nnx.Param(jnp.array([1.0]))}), jnp.int32(0), jnp.float32(1)
        >>> new, _ = adamw(cfg, 100, step, params, init(params), params, one, jnp.bool_(True), kernels)  # gradient: 1
        >>> round(float(new["w"][0]), 3)
        0.9
    """
    count = (step + 1).astype(jnp.float32)
    clip = jnp.where(norm < cfg.clip_norm, 1.0, cfg.clip_norm / norm)
    to_mean, to_square = 1 / (1 - cfg.beta1**count), 1 / (1 - cfg.beta2**count)
    numbers = jnp.stack([clip, to_mean, to_square, learning_rate(cfg, steps, step), keep.astype(jnp.float32)])
    settings = {"beta1": cfg.beta1, "beta2": cfg.beta2, "eps": cfg.eps}

    def leaf(p, mu, nu, g, decays):
        decay = cfg.weight_decay if decays else 0.0
        return kernels.adamw_update(p, mu, nu, g, numbers, **settings, decay=decay)

    leaves, tree = jax.tree.flatten(params)
    rest = (jax.tree.leaves(t) for t in (adam.mu, adam.nu, grads, _decays(params)))
    new = [leaf(*x) for x in zip(leaves, *rest, strict=True)]
    p, mu, nu = (jax.tree.unflatten(tree, part) for part in zip(*new, strict=True))
    return p, AdamState(mu, nu)


def _decays(params: nnx.State):
    """Which leaves take weight decay, in the parameters' structure."""

    def mark(v):
        return jax.tree.map(lambda _: v.get_metadata().get("decay", True), v)

    return jax.tree.map(mark, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
