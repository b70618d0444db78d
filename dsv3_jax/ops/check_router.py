"""Checks of any router: what it gives, and that it replays the experts that are given to it."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.config import ConfigError, ModelConfig, check_shapes
from dsv3_jax.ops.routing import ROUTERS, Inputs, Router, Routing, Tokens


def check_routing(found: Any, logits: Float[Array, "n E"], cfg: ModelConfig) -> Routing:
    """Check what a router gives, before kernels read it by its shapes and dtypes.

    Returns: it, as `Routing`.
    Raises: ConfigError if it is no Routing, or an array has another shape or dtype.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> logits = jnp.zeros((3, 16))
        >>> few = Routing(jnp.zeros((3, 1), jnp.int32), logits[:, :1], logits)
        >>> check_routing(few, logits, preset("tiny"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: router='sigmoid' gives expert_ids of shape (3, 1), ...
    """
    giver = f"router={cfg.router!r}"
    if not isinstance(found, tuple) or len(found) != len(Routing._fields):
        raise ConfigError(f"{giver} gives {type(found).__name__}, not a Routing")

    chosen = (len(logits), cfg.experts_per_token)
    routed = Routing(*found)
    shapes = {"expert_ids": chosen, "gates": chosen, "scores": logits.shape}
    check_shapes(giver, routed._asdict(), shapes)

    dtypes = {"expert_ids": jnp.dtype("int32"), "gates": logits.dtype, "scores": logits.dtype}
    for name, dtype in dtypes.items():
        own = getattr(routed, name).dtype
        if own != dtype:
            raise ConfigError(f"{giver} gives {name} of dtype {own}, not {dtype}")
    return routed


def check_replay(cfg: ModelConfig) -> None:
    """Check that the router returns the experts that are given to it.

    Raises: ValueError if it returns others.
    """
    _check_router(ROUTERS[cfg.router], cfg)


@cache
def _check_router(router: Router, cfg: ModelConfig) -> None:
    num_experts, k = cfg.num_experts, cfg.experts_per_token

    # A token for each expert e, which is given the experts e, e - 1, …: a free choice has others.
    # Training forbids transfers in its steps; while the first is traced, these few are meant.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        ids = jnp.arange(num_experts, dtype=jnp.int32)
        given = (ids[:, None] - ids[None, :k]) % num_experts
        same = jnp.zeros(num_experts)
        tokens = Tokens(
            x=jnp.zeros((num_experts, cfg.dim)), mask=ids >= 0, ids=jnp.zeros_like(ids), given=given
        )
        found = router.route(Inputs(jnp.zeros((num_experts, num_experts)), same, tokens), cfg)
        replayed = (jnp.sort(found.expert_ids) == jnp.sort(given)).all()
    if not replayed:
        raise ValueError(
            f"router={cfg.router!r} returns other experts than those to replay; let it return "
            "ops.routing.replay(ids, x.tokens.given)"
        )
