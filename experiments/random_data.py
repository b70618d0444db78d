"""Random arrays, weights and batches: a chip runs faster on constant data."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.model.moe import RouterBias


@partial(jax.jit, static_argnames=("shape", "dtype", "std"))
def draw(key: Any, shape: tuple[int, ...], dtype: str = "bfloat16", std: float = 1.0) -> jax.Array:
    """Draw normal numbers, a large array in slices: it needs little more than its own memory."""
    axes = 0
    while math.prod(shape[axes:]) > 1 << 28:
        axes += 1
    keys = jax.random.split(key, math.prod(shape[:axes]))
    parts = jax.lax.map(
        lambda k: (std * jax.random.normal(k, shape[axes:], jnp.float32)).astype(dtype), keys
    )
    return parts.reshape(shape)


def keys(seed: int = 0) -> Iterator[Any]:
    """Yield random keys without end."""
    key = jax.random.key(seed)
    while True:
        key, one = jax.random.split(key)
        yield one


def filled(shapes: nnx.Module, std: float, dtype: str, draw: Callable = draw) -> tuple[Any, Any]:
    """(Graph, arrays) of a module, given as shapes, with random weights cast as `hf.load` does.

    Args: draw: as `draw` above.
    """
    graph, state = nnx.split(shapes)
    arrays, key = {}, keys()
    for path, variable in nnx.to_flat_state(state):
        shape = tuple(variable.shape)
        if isinstance(variable, RouterBias):
            value = jnp.zeros(shape, jnp.float32)
        elif not variable.get_metadata().get("decay", True):  # a norm's scale
            value = jnp.ones(shape, dtype)
        else:
            value = draw(next(key), shape, "float32" if path[-1] == "w_router" else dtype, std)
        arrays[path] = variable.replace(value)
    return graph, nnx.from_flat_state(arrays)


def filled_cache(shapes: Any) -> Any:
    """A cache with random rows for one of these shapes; its lengths are 0."""
    key = keys()

    def fill(x: Any) -> jax.Array:
        return draw(next(key), x.shape, x.dtype) if x.ndim > 1 else jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(fill, shapes)


def batch_of(tokens: Any) -> dict[str, jax.Array]:
    """A training batch of tokens [B, T], one document a row."""
    tokens = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}
