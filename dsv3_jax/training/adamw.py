"""AdamW in one fused pass: the update of all parameters, with clipping, weight decay and steps that are not taken."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dsv3_jax.config import OptimConfig
from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.training.schedules import learning_rate


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
def update(
    cfg: OptimConfig,
    steps: int,
    kernels: Kernels,
    step: Array,
    params: nnx.State,
    adam: AdamState,
    grads: nnx.State,
    norm: Array,
    keep: Array,
) -> tuple[nnx.State, AdamState]:
    """Take one step of AdamW on gradients clipped to a global norm; weight decay on all but the norms' scales.

    The numbers are those of optax.chain(clip_by_global_norm, adamw), in an order that XLA runs in place. That chain
    writes the clipped gradients out and copies both means: three times the memory traffic, and a gradient's size of
    temporary memory.

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
        >>> state, gradient = init(params), params
        >>> new, _ = update(cfg, 100, kernels, step, params, state, gradient, one, jnp.bool_(True))
        >>> round(float(new["w"][0]), 3)
        0.9
    """
    count = (step + 1).astype(jnp.float32)
    clip = clip_factor(cfg, norm)
    to_mean, to_square = 1 / (1 - cfg.beta1**count), 1 / (1 - cfg.beta2**count)
    numbers = jnp.stack([clip, to_mean, to_square, learning_rate(cfg, steps, step), keep.astype(jnp.float32)])
    settings = {"beta1": cfg.beta1, "beta2": cfg.beta2, "eps": cfg.eps}

    def leaf(p, mu, nu, g, decays):
        decay = cfg.weight_decay if decays else 0.0
        return kernels.adamw_update(p, mu, nu, g, numbers, **settings, decay=decay)

    leaves, tree = jax.tree.flatten(params)
    rest = (jax.tree.leaves(t) for t in (adam.mu, adam.nu, grads, decays(params)))
    new = [leaf(*x) for x in zip(leaves, *rest, strict=True)]
    p, mu, nu = (jax.tree.unflatten(tree, [x[i] for x in new]) for i in range(3))
    return p, AdamState(mu, nu)


def clip_factor(cfg: OptimConfig, norm: Array) -> Array:
    """The factor that scales gradients of this global norm down to `clip_norm`; 1 for smaller ones.

    Example:
        >>> clip_factor(OptimConfig(clip_norm=2.0), jnp.array([1.0, 8.0])).tolist()
        [1.0, 0.25]
    """
    return jnp.where(norm < cfg.clip_norm, 1.0, cfg.clip_norm / norm)


def decays(params: nnx.State) -> nnx.State:
    """Which leaves take weight decay, in the parameters' structure: all but the norms' scales.

    Example:
        >>> params = nnx.State({"w": nnx.Param(jnp.ones(2)), "scale": nnx.Param(jnp.ones(2), decay=False)})
        >>> nnx.to_pure_dict(decays(params))
        {'scale': False, 'w': True}
    """

    def mark(v):
        return jax.tree.map(lambda _: v.get_metadata().get("decay", True), v)

    return jax.tree.map(mark, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
