"""Upcycling: a mixture of experts out of a dense model, or one of more experts out of a mixture.

Letters as in `config.model`. A dense layer has dense_dim hidden units, and each expert F of them.
"""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.config.fields import Positive, Seed, Share, check_fields, require
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.routing import ROUTERS

NOISE = 0.01  # of a mixture's copied router rows, over the deviation of its router


@dataclass(frozen=True)
class Upcycling:
    """How many experts a model gets, and what they begin with.

    Example:
        >>> Upcycling(experts=8).parts
        1
    """

    experts: Annotated[int, "[2, 1000000]"]  # number of routed experts afterwards (E)
    # number of experts that a token is sent to (K). None means two copies of a dense layer, and a
    # mixture keeps its own
    experts_per_token: Positive | None = None
    # number of experts that the hidden units of a dense layer are divided among
    parts: Positive = 1
    redrawn: Share = 0.0  # share of each expert's hidden units that starts at random
    seed: Seed = 0  # of what is drawn

    def __post_init__(self) -> None:
        check_fields(self)


def upcycled_config(cfg: ModelConfig, how: Upcycling) -> ModelConfig:
    """Return the configuration of the mixture that `upcycle` makes of a model.

    Raises: ConfigError if it cannot be made.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> dense = replace(preset("tiny"), num_dense_layers=4, mtp_depth=0)
        >>> made = upcycled_config(dense, Upcycling(experts=32, parts=4))
        >>> made.num_dense_layers, made.expert_dim, made.experts_per_token
        (0, 88, 8)
    """
    experts, parts = f"experts={how.experts}", f"parts={how.parts}"

    # A mixture: more experts of the same width, and a token is sent to as many as before.
    if cfg.num_sparse_layers:
        count, kept = cfg.num_experts, cfg.experts_per_token
        require(
            how.parts == 1, f"{parts} divides dense layers; this model has experts: leave it out"
        )
        require(
            how.experts_per_token in (None, kept),
            f"experts_per_token={how.experts_per_token} is not the {kept} that the model keeps",
        )
        require(
            how.experts > count and how.experts % count == 0,
            f"{experts} is not 2, 3, … times the num_experts={count} that the model has",
        )
        require(
            cfg.router != "dense" and not ROUTERS[cfg.router].reads_tokens,
            f"router={cfg.router!r} is not supported: it does not choose experts by their scores",
        )
        return _with_units(replace(cfg, num_experts=how.experts), how)

    # A dense model: a token is sent to whole copies of the layer, each of all its parts.
    chosen = how.experts_per_token or 2 * how.parts
    per_token = f"experts_per_token={chosen}"
    require(
        cfg.num_sparse_heads == 0,
        f"mtp_depth={cfg.mtp_depth} is not supported: heads of mtp_kind={cfg.mtp_kind!r} have "
        "experts, and the layers have none",
    )
    require(cfg.dense_dim % how.parts == 0, f"{parts} does not divide dense_dim={cfg.dense_dim}")
    require(how.experts % how.parts == 0, f"{parts} does not divide {experts}")
    require(chosen % how.parts == 0, f"{parts} does not divide {per_token}")
    require(chosen <= how.experts, f"{experts} is fewer than {per_token}")
    require(chosen > 1, f"{per_token} has a gate of 1, which trains no router; use 2")

    # The experts are parts of the layer; a new router chooses among them, without groups.
    made = replace(
        cfg,
        num_dense_layers=0,
        num_experts=how.experts,
        experts_per_token=chosen,
        num_shared_experts=0,
        expert_dim=cfg.dense_dim // how.parts,
        num_groups=1,
        groups_per_token=1,
        router="sigmoid",
        normalize_gates=True,
        routed_scale=float(how.parts),
        capacity_factor=None,
    )
    return _with_units(made, how)


def _with_units(cfg: ModelConfig, how: Upcycling) -> ModelConfig:
    """Return the configuration. Raises: ConfigError if less than a unit would start at random."""
    require(
        how.redrawn == 0 or round(how.redrawn * cfg.expert_dim) > 0,
        f"redrawn={how.redrawn} is none of an expert's {cfg.expert_dim} hidden units",
    )
    return cfg


def upcycle(model: Transformer, how: Upcycling) -> Transformer:
    """Make a mixture of experts out of a model.

    From a dense model: with m = E / parts copies, expert p · m + j has part p of the hidden units,
    and row j of a new router. So a token is sent to all parts of a copy. Its gates sum to 1, and
    the routed scale is `parts`: the mixture begins with the dense model's outputs, to rounding.

    From a mixture of e experts: with m = E / e copies, expert i · m + j is expert i. Its row of
    the router is copied too, with noise that divides the tokens among the copies. The outputs are
    only near the old ones, because the K experts of a token may be copies of one.

    With `redrawn`, some hidden units of each expert start at random, see `redraw`.

    Args: model: float32, on a single device.
    Returns: a new model, with `upcycled_config`.
    Raises: ConfigError if the model cannot be made into this mixture.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = replace(preset("tiny"), num_layers=1, num_dense_layers=1, mtp_depth=0)
        >>> dense = Transformer(cfg, rngs=nnx.Rngs(0))
        >>> mixture = upcycle(dense, Upcycling(experts=4))
        >>> tokens = jnp.arange(8, dtype=jnp.int32)[None]
        >>> bool(jnp.allclose(mixture(tokens).logits, dense(tokens).logits, atol=1e-5))
        True

    Source: arXiv 2212.05055; parts with one router row ("virtual groups") arXiv 2410.07524; more
        experts of a mixture arXiv 2604.19835.
    Departs from the paper: 2410.07524 scales matrices of the experts, which SwiGLU does not pass
        on exactly. 2604.19835 makes more copies of experts that are worth more.
    """
    cfg = upcycled_config(model.cfg, how)
    made = Transformer(cfg, model.execution, rngs=nnx.Rngs(how.seed), kernels=model.kernels)
    kinds = (nnx.Param, RouterBias)
    old = {path: v[...] for path, v in nnx.to_flat_state(nnx.state(model, kinds))}
    new = dict(nnx.to_flat_state(nnx.state(made, kinds)))

    # All of a dense layer but its feed-forward part has a place in a sparse one.
    from_dense = model.cfg.num_sparse_layers == 0
    if from_dense:
        old = {("sparse", *path[1:]) if path[0] == "dense" else path: x for path, x in old.items()}

    for path, v in new.items():
        name = path[-1]
        if "experts" in path:
            # Copies of the dense layer's parts, or of the old experts.
            if from_dense:
                units = -2 if name == "w_down" else -1
                x = _divided(old[*path[:-3], "ffn", name], how.parts, units)
            else:
                x = old[path]
            x = jnp.repeat(x, how.experts // x.shape[-3], axis=-3)

        elif path[-2:] == ("moe", "w_router") and from_dense:
            # A copy's parts have one new row: a token is sent to all of them.
            x = jnp.tile(v[..., : how.experts // how.parts], how.parts)

        elif path[-2:] == ("moe", "w_router"):
            # Copies have their expert's row, and noise that tells them apart.
            x = jnp.repeat(old[path], how.experts // old[path].shape[-1], axis=-1)
            x += NOISE * old[path].std() / cfg.init_std * v[...]

        elif path[-2:] == ("moe", "bias") and from_dense:
            continue  # 0, as of any new router
        elif path[-2:] == ("moe", "bias"):
            x = jnp.repeat(old[path], how.experts // old[path].shape[-1], axis=-1)

        else:  # attention, norms, embedding, shared experts: as they were
            x = old[path]
        new[path] = v.replace(x)

    # The experts of all layers, and those of each head, are three matrices.
    for i, at in enumerate(sorted({path[:-1] for path in new if "experts" in path}, key=str)):
        if how.redrawn:
            gate, up, down = ((*at, name) for name in ("w_gate", "w_up", "w_down"))
            key = jax.random.fold_in(jax.random.key(how.seed), i)
            drawn = redraw(new[gate][...], new[up][...], new[down][...], how.redrawn, key)
            for path, x in zip((gate, up, down), drawn, strict=True):
                new[path] = new[path].replace(x)
    nnx.update(made, nnx.from_flat_state(new))
    return made


def _divided(x: Array, parts: int, axis: int) -> Array:
    """Divide the hidden units, of this axis: [L, …] → [L, parts, …]."""
    return jnp.stack(jnp.split(x, parts, axis), axis=-3)


def redraw(
    w_gate: Float[Array, "*n D F"],
    w_up: Float[Array, "*n D F"],
    w_down: Float[Array, "*n F D"],
    share: float,
    key: Array,
) -> tuple[Array, Array, Array]:
    """Let a share of each expert's hidden units start at random, all weights of such a unit.

    In each matrix of each expert, the new weights are normal, with the mean and the standard
    deviation of those that they replace.

    Args: share: of F; the number of units is rounded. key: of the random draws.
    Returns: the new matrices.

    Source: arXiv 2502.19261 (drop-upcycling).
    """
    *lead, _, width = w_gate.shape
    count = round(share * width)

    # Which units: each expert's first `count` of a random order.
    key, of_order = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(of_order, (*lead, width)))
    chosen = jnp.argsort(order) < count  # [*n, F]

    def of_matrix(w: Array, chosen: Array, key: Array) -> Array:
        axes = (-2, -1)
        where = jnp.broadcast_to(chosen, w.shape)
        mean = w.mean(axes, where=where, keepdims=True)
        std = w.std(axes, where=where, keepdims=True)
        return jnp.where(where, mean + std * jax.random.normal(key, w.shape, w.dtype), w)

    keys = jax.random.split(key, 3)
    columns, rows = chosen[..., None, :], chosen[..., None]
    return (
        of_matrix(w_gate, columns, keys[0]),
        of_matrix(w_up, columns, keys[1]),
        of_matrix(w_down, rows, keys[2]),
    )
