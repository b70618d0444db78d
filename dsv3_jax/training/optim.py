"""Optimizers by name: AdamW, Muon, or any optax transformation, each with the same two functions.

`make` gives the optimizer of a run. It is made from `OptimConfig.name`, which MAKERS lists. A transformation that is
given to `ds.train.fit(…, optimizer=tx)` comes before that name.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import optax
from flax import nnx
from jaxtyping import Array

from dsv3_jax.config import OPTAX, ConfigError, OptimConfig
from dsv3_jax.kernels.choose import Kernels, Target
from dsv3_jax.training import adamw, from_optax, muon
from dsv3_jax.training.adamw import AdamState
from dsv3_jax.training.schedules import bias_rate, learning_rate, mtp_weight

__all__ = ["MAKERS", "XLA", "AdamState", "Optimizer", "bias_rate", "learning_rate", "make", "mtp_weight"]

XLA = Kernels(Target("cpu", "xla"))  # for structures that compute nothing


class Optimizer(NamedTuple):
    """How parameters move. Both functions are pure, and run under `jax.jit`."""

    init: Callable[[nnx.State], Any]  # parameters → the state of step 0, any tree of arrays or variables
    # (step, params, state, grads, norm, keep) → (params, state). step: int32 [], steps taken before this one. norm: of
    # all gradients, which are clipped to `clip_norm`. keep: bool [], False changes nothing, whatever the gradients are.
    update: Callable[[Array, nnx.State, Any, nnx.State, Array, Array], tuple[nnx.State, Any]]


def _adamw(cfg: OptimConfig, steps: int, kernels: Kernels) -> Optimizer:
    return Optimizer(partial(adamw.init, dtype=cfg.moments_dtype), partial(adamw.update, cfg, steps, kernels))


def _muon(cfg: OptimConfig, steps: int, kernels: Kernels) -> Optimizer:
    return Optimizer(partial(muon.init, dtype=cfg.moments_dtype), partial(muon.update, cfg, steps, kernels))


MAKERS: dict[str, Callable[[OptimConfig, int, Kernels], Optimizer]] = {"adamw": _adamw, "muon": _muon}


def make(
    cfg: OptimConfig, steps: int, kernels: Kernels = XLA, transformation: optax.GradientTransformation | None = None
) -> Optimizer:
    """Make the optimizer of a run.

    Args:
        steps: length of the run, for the schedule.
        kernels: run AdamW's update.
        transformation: takes the place of `cfg.name`. Clipping and steps that are not taken stay `cfg`'s and the
            step's; learning rate, schedule and weight decay are its own.
    Without the transformation of a run that one trains, the state is empty, and an update raises ConfigError: readers
    need neither.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = make(OptimConfig(), 100, transformation=optax.sgd(0.5, momentum=0.9))
        >>> params, one = nnx.State({"w": nnx.Param(jnp.array([1.0]))}), jnp.float32(1)
        >>> state = optimizer.init(params)
        >>> optimizer.update(jnp.int32(0), params, state, params, one, jnp.bool_(True))[0]["w"][...]  # gradient: 1
        Array([0.5], dtype=float32)
    """
    if transformation is not None:
        return Optimizer(partial(from_optax.init, transformation), partial(from_optax.update, cfg, transformation))
    if not cfg.name.startswith(OPTAX):
        return MAKERS[cfg.name](cfg, steps, kernels)
    return Optimizer(lambda _: (), lambda *_: check(cfg, None))  # type: ignore[arg-type]


def check(cfg: OptimConfig, transformation: object) -> None:
    """Check that a run has what trains it.

    Raises: ConfigError if it is not an optax transformation, or is missing for a run that was trained by one.

    Example:
        >>> check(OptimConfig(), optax.sgd(1e-3)), check(OptimConfig(), None)
        (None, None)
    """
    if transformation is None and cfg.name.startswith(OPTAX):
        raise ConfigError(f"optim.name={cfg.name!r} is a transformation: give it by ds.train.fit(…, optimizer=tx)")
    if not isinstance(transformation, optax.GradientTransformation | None):
        raise ConfigError(f"optimizer={transformation!r} is not an optax transformation, such as optax.lion(1e-4)")
