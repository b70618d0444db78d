"""Loss-free balance in a training loop of one's own, as in `fit`; `ops.balance` has the rules."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import check_shapes
from dsv3_jax.model.moe import LayerRouting, RouterBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.balance import Rule, rule_of


def update(model: Transformer, *routings: LayerRouting, rate: float | None = None) -> None:
    """Move a model's router biases by the load of a batch, in place; without a rule, do nothing.

    Args:
        routings: of a forward pass: `out.routing`, then `*out.mtp_routing` where heads have
            experts.
        rate: γ; None means the model's `balance.bias_rate`.
    Raises: ValueError if the routings are not those of all the model's routers.

    Example:
        >>> import dsv3_jax as ds
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=2, mtp_depth=0)
        >>> model = ds.Transformer(cfg, rngs=nnx.Rngs(0))
        >>> update(model, jax.jit(model)(jnp.ones((1, 8), jnp.int32)).routing, rate=0.5)
        >>> sorted(set(model.sparse.moe.bias[...].ravel().tolist()))  # the sign of mean load − load
        [-0.5, 0.5]
    """
    rule = rule_of(model.cfg)
    if rule is None:
        return

    # The load of all routers, in the order of the layers.
    bias = nnx.state(model, RouterBias)
    load = jnp.concatenate([jnp.atleast_2d(routing.load) for routing in routings])
    routers = sum(jnp.atleast_2d(x).shape[0] for x in jax.tree.leaves(bias))
    if len(load) != routers:
        raise ValueError(
            f"{len(load)} routings do not belong to {routers} routers; give *out.mtp_routing too"
        )

    # Some rules move by another measure than the load.
    measures = [jnp.atleast_2d(r.bias_measure) for r in routings if r.bias_measure is not None]
    measure = jnp.concatenate(measures) if measures else None
    gamma = jnp.float32(model.cfg.balance.bias_rate if rate is None else rate)
    nnx.update(model, updated_bias(bias, load, gamma, rule, measure))


def updated_bias(
    bias: nnx.State,
    load: Float[Array, "L E"],
    rate: Array,
    rule: Rule,
    measure: Float[Array, "L E"] | None = None,
) -> nnx.State:
    """Update every router's loss-free bias by a rule.

    Args:
        load: of the trunk's sparse layers, then of the heads with experts.
        rate: γ.
        measure: what the rule needs beside the load, in the same rows.

    Example:
        >>> from dsv3_jax.ops.balance import RULES
        >>> bias = RouterBias(jnp.zeros((1, 3)))  # one layer, three experts
        >>> bias = nnx.State({"sparse": {"bias": bias}})
        >>> load = jnp.array([[3.0, 2.0, 1.0]])
        >>> updated_bias(bias, load, jnp.float32(0.5), RULES["sign"])["sparse"]["bias"][...]
        Array([[-0.5,  0. ,  0.5]], dtype=float32)
    """
    moved = []
    first = 0
    for path, variable in in_rows(bias):
        before = jnp.atleast_2d(variable[...])
        rows = slice(first, first := first + len(before))
        own = None if measure is None else measure[rows]
        after = rule.update(before, load[rows], own, rate)
        check_shapes("the balance rule", {"bias": after}, {"bias": before.shape})
        moved.append((path, variable.replace(after.astype(before.dtype).reshape(variable.shape))))
    return nnx.from_flat_state(moved)


def in_rows(bias: nnx.State) -> list[tuple[tuple, nnx.Variable]]:
    """The routers' biases in the order of the load's rows: the trunk's layers, then the heads."""
    return sorted(
        nnx.to_flat_state(bias), key=lambda item: int(item[0][1]) if item[0][0] == "mtp" else -1
    )
