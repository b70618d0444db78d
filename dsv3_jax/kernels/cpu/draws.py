"""Programs of random draws, which run once."""

from collections.abc import Callable
from typing import Any

import jax


def compile_lightly(f: Callable, device: jax.Device, **how: Any) -> Callable:
    """`jax.jit` for random draws: on a CPU, optimising them takes longer than running them.

    Example:
        >>> compile_lightly(jax.numpy.square, jax.devices()[0])(3)
        Array(9, dtype=int32, weak_type=True)
    """
    # what a user asks for is lighter still
    lighter = jax.config.values["jax_disable_most_optimizations"]
    options = (
        {"xla_backend_optimization_level": 1} if device.platform == "cpu" and not lighter else None
    )
    return jax.jit(f, compiler_options=options, **how)
