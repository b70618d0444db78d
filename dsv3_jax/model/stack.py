"""Layers of one kind as a stack, their arrays along a leading axis; and the loop over them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dsv3_jax.kernels.cpu.memory import views
from dsv3_jax.model.parameters import unpack_all
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
    stacked: nnx.Module | None,
    body: Callable,
    carry: Any,
    *,
    layers: list[nnx.State] | None = None,
    remat: str = "none",
    unroll: bool = False,
    unshard: Callable = lambda layer: layer,
) -> tuple[Any, Any]:
    """Run `carry, y = body(module, carry, index)` for each module of a stack in turn.

    Args:
        stacked: what `stack` made; None has no layers.
        layers: each module's own arrays, from `unstack`: the loop is unrolled, slices only arrays
            that are not there, and `index` is a Python number. None means a scan, whose compile
            time does not grow with depth.
        remat: see `recompute`.
        unroll: write the scan out layer by layer. Then nothing that the backward pass reads is
            copied into a stack and out again, and compile time grows with depth.
        unshard: gathers a layer's weights in its turn, see `mesh.fsdp.unshard_weights`.
    Returns: (carry, ys stacked along a leading layer axis; None without layers).

    Example:
        >>> from dsv3_jax.model.layers import RMSNorm
        >>> norms = stack(lambda rngs: RMSNorm(2, eps=0.0), 3, nnx.Rngs(0))
        >>> x = jnp.array([1.0, 7.0])
        >>> x, ys = loop_layers(norms, lambda norm, x, index: (norm(x), 10 * index), x)
        >>> x.shape, ys.tolist()
        ((2,), [0, 10, 20])
    """
    if stacked is None:
        return carry, None
    # Plain lax.scan over split state: nnx.scan has had silent faults with memory and sharding.
    graphdef, state = nnx.split(stacked)

    # Unrolled: each layer has its own arrays, and slices of the stack for those it lacks.
    if layers is not None:
        ys = []
        for index, layer in enumerate(layers):
            sliced = jax.tree.map(lambda x, i=index: x[i], state)
            whole = unpack_all(nnx.merge_state(sliced, layer))
            carry, y = body(nnx.merge(graphdef, whole), carry, index)
            ys.append(y)
        return carry, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *ys)

    # Scanned: a layer's weights are gathered in its turn, inside what `remat` recomputes.
    def step(carry: Any, xs: tuple[nnx.State, Array]) -> tuple[Any, Any]:
        layer, index = xs
        return body(nnx.merge(graphdef, unshard(layer)), carry, index)

    step = recompute(step, remat)
    count = jax.tree.leaves(state)[0].shape[0]
    return jax.lax.scan(step, carry, (state, jnp.arange(count, dtype=jnp.int32)), unroll=unroll)
