"""Checks of any router: what it gives, what it chooses, and that it replays what is given."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsv3_jax.config import ConfigError, ModelConfig, check_shapes
from dsv3_jax.config.fields import require
from dsv3_jax.ops.routing import ROUTERS, Inputs, Router, Routing, Tokens

_TESTED = frozenset(ROUTERS)  # the package's own


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

    Raises: ConfigError if it returns others.
    """
    given, found = _probe(ROUTERS[cfg.router], cfg, replays=True)
    require(
        np.array_equal(found, given),
        f"router={cfg.router!r} returns other experts than those to replay; let it return "
        "ops.routing.replay(ids, x.tokens.given)",
    )


def check_choice(cfg: ModelConfig) -> None:
    """Check that a registered router chooses experts that there are: kernels index by them.

    Raises: ConfigError if it chooses one that there is not, or one twice.
    """
    if cfg.router in _TESTED:
        return
    _, found = _probe(ROUTERS[cfg.router], cfg, replays=False)
    bad = (found < 0) | (found >= cfg.num_experts) | (np.diff(found, prepend=-1) == 0)
    rows = found[bad.any(axis=1)]
    require(
        not rows.size,
        f"router={cfg.router!r} gives a token the experts {rows[:1].tolist()}, which are not "
        f"{cfg.experts_per_token} different ones of 0 to {cfg.num_experts - 1}",
    )


@cache
def _probe(router: Router, cfg: ModelConfig, *, replays: bool) -> tuple[np.ndarray, np.ndarray]:
    """Route a token for each expert e: of equal ones to which e, e - 1, … are given, or of others.

    Returns: (experts that are given, experts that the router returns), each token's in order.
    """
    num_experts, k = cfg.num_experts, cfg.experts_per_token

    # Training forbids transfers in its steps; while the first is traced, these few are meant.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        index = jnp.arange(num_experts, dtype=jnp.int32)
        given = (index[:, None] - index[None, :k]) % num_experts
        tokens = Tokens(
            x=jnp.zeros((num_experts, cfg.dim)),
            mask=index >= 0,
            ids=index * (0 if replays else (cfg.vocab_size - 1) // num_experts),
            given=given if replays else None,
        )
        logits = jnp.zeros((num_experts, num_experts)) if replays else jnp.eye(num_experts)
        found = router.route(Inputs(logits, jnp.zeros(num_experts), tokens), cfg)
        ids = check_routing(found, logits, cfg).expert_ids
        return np.sort(given), np.sort(ids)
