"""Layers of one kind as a stack, their arrays along a leading axis, and what a loop needs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.kernels.cpu.memory import views
from dsv3_jax.ops.attention import QUERIES, RESULTS

# Names for `jax.checkpoint`, see `recompute`.
CHOICE = "choice"  # a router's logits and ids
NORMS = "norms"  # each row's factor


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module | None:
    """Make a stack of `count` modules: one module with a leading layer axis. 0 of them give None.

    Example:
        >>> from dsv3_jax.model.layers import RMSNorm
        >>> stack(lambda rngs: RMSNorm(4, eps=1e-6), 3, nnx.Rngs(0)).scale.shape
        (3, 4)
    """
    if count == 0:
        return None
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))


def unstack(stacked: nnx.Module | None, *, experts: bool = True) -> list[nnx.State]:
    """Split a stack into the arrays of its modules: views of its memory where they can be.

    Args: experts: with the routed experts. False leaves them out, for `loop_layers` to slice them
        where they are read.

    Example:
        >>> from dsv3_jax.model.layers import RMSNorm
        >>> layers = unstack(stack(lambda rngs: RMSNorm(4, eps=1e-6), 3, nnx.Rngs(0)))
        >>> len(layers), layers[0]["scale"].shape
        (3, (4,))
    """
    if stacked is None:
        return []
    _, kept = nnx.split_state(
        nnx.state(stacked), lambda path, _: not experts and "experts" in path, ...
    )
    leaves, treedef = jax.tree.flatten(kept)
    return [jax.tree.unflatten(treedef, parts) for parts in zip(*map(views, leaves), strict=True)]


def recompute(f: Callable, remat: str) -> Callable:
    """A function whose backward pass recomputes what `remat` does not keep.

    none       keeps every result
    dots       matrix products, and what "attention" keeps
    attention  attention's output and its rows' log-sums, so that its forward pass runs once, and
               the router's choice
    queries    these, and what a TPU is slow to make again: queries and the factors of norms
    full       only the arguments
    """
    if remat == "none":
        return f
    policies = jax.checkpoint_policies
    names = (RESULTS, CHOICE, *((QUERIES, NORMS) if remat == "queries" else ()))
    attention = policies.save_only_these_names(*names)
    if remat == "dots":
        dots = policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(f, policy=policies.save_from_both_policies(dots, attention))
    return jax.checkpoint(f, policy=None if remat == "full" else attention)


def loop_layers(
    step: Callable, carry: Any, state: nnx.State, layers: list[nnx.State]
) -> tuple[Any, Any]:
    """Run `carry, y = step(carry, (arrays, index))` for each layer in turn, as `jax.lax.scan`.

    Here each layer may have arrays of its own, and `index` is a Python number.

    Args:
        state: the arrays of all layers, along a leading axis.
        layers: each layer's own arrays, from `unstack`; those that it lacks are slices of `state`.
    Returns: (carry, ys stacked along a leading layer axis).

    Example:
        >>> state = nnx.State({"w": nnx.Param(jnp.array([1.0, 2.0, 3.0]))})
        >>> def step(x, layer):
        ...     return x * layer[0]["w"][...], 10 * layer[1]
        >>> x, ys = loop_layers(step, jnp.float32(1), state, [nnx.State({})] * 3)
        >>> x, ys.tolist()
        (Array(6., dtype=float32), [0, 10, 20])
    """
    ys = []
    for index, own in enumerate(layers):
        sliced = jax.tree.map(lambda x, i=index: x[i], state)
        carry, y = step(carry, (nnx.merge_state(sliced, own), index))
        ys.append(y)
    return carry, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *ys)
