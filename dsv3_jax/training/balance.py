"""Loss-free balance in a training loop of one's own, as in `fit`; `ops.balance` has the rules."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.model.moe import LayerRouting, RouterBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.balance import rule_of
from dsv3_jax.training.step import updated_bias


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
