"""Any optax transformation as an optimizer: its state is sharded by the axis names of the parameters that it mirrors.

The transformation sees parameters and gradients as nested dicts of arrays, {"sparse": {"attn": {"w_uq": …}}, …}, so its
masks and labels are functions of such dicts. Leaves of its state with the path and the shape of a parameter get that
parameter's axis names; all others are replicated.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from dsv3_jax.config import OPTAX, OptimConfig
from dsv3_jax.mesh.sharding import names_of
from dsv3_jax.training.adamw import clip_factor


def init(tx: optax.GradientTransformation, params: nnx.State) -> Any:
    """Make the state of a transformation.

    Example:
        >>> params = nnx.State({"w": nnx.Param(jnp.ones(2), axes=("heads",))})
        >>> names_of(init(optax.trace(0.9), params).trace["w"])
        ('heads',)
    """
    with _promoting():
        return _named(tx.init(nnx.to_pure_dict(params)), params)


def update(
    cfg: OptimConfig,
    tx: optax.GradientTransformation,
    step: Array,
    params: nnx.State,
    state: Any,
    grads: nnx.State,
    norm: Array,
    keep: Array,
) -> tuple[nnx.State, Any]:
    """Take one step of a transformation on clipped gradients; arguments as `optim.Optimizer`.

    The transformation counts its own steps. One that is not kept does not count.
    """
    del step
    clip = clip_factor(cfg, norm)
    old, before = nnx.to_pure_dict(params), _unnamed(state)
    clipped = nnx.to_pure_dict(jax.tree.map(lambda g: g * clip, grads))
    with _promoting():
        updates, after = tx.update(clipped, before, old)
        new = optax.apply_updates(old, updates)
    new, after = jax.tree.map(lambda a, b: jnp.where(keep, a, b), (new, after), (old, before))
    flat = nnx.traversals.flatten_mapping(new)
    moved = nnx.from_flat_state([(path, v.replace(flat[path])) for path, v in nnx.to_flat_state(params)])
    return moved, _named(after, params)


def name_of(tx: optax.GradientTransformation, params: nnx.State) -> str:
    """Name a transformation by its state, for `OptimConfig.name`: its types, and a checksum of names and shapes.

    A transformation has no other name. Two that differ in numbers alone, such as a learning rate, have the same one.

    Args: params: or their shapes.

    Example:
        >>> params = nnx.State({"w": nnx.Param(jnp.ones(2))})
        >>> name_of(optax.adam(1e-3), params), name_of(optax.sgd(1e-3), params)
        ('optax:ScaleByAdamState#864d710f', 'optax:no state#00000000')
    """
    with _promoting():
        state = jax.eval_shape(tx.init, nnx.to_pure_dict(params))
    leaves = [
        (*(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path), x.shape, x.dtype.name)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    ]
    checksum = zlib.crc32(repr(leaves).encode()) if leaves else 0
    return f"{OPTAX}{'+'.join(dict.fromkeys(_types(state))) or 'no state'}#{checksum:08x}"


@contextmanager
def _promoting() -> Iterator[None]:
    """optax mixes dtypes, such as a count and a decay, also where the caller has JAX refuse that."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _types(tree: Any) -> list[str]:
    """Names of the named tuples in a state that hold arrays themselves, and not by further named tuples."""
    if not jax.tree.leaves(tree):
        return []
    parts = list(tree.values()) if isinstance(tree, dict) else list(tree) if isinstance(tree, tuple) else []
    inner = [name for part in parts for name in _types(part)]
    return inner or ([type(tree).__name__] if hasattr(tree, "_fields") else [])


def _named(state: Any, params: nnx.State) -> Any:
    """A state whose leaves are variables with axis names, where they mirror a parameter."""
    flat = dict(nnx.to_flat_state(params))

    def of(path: tuple, leaf: Array) -> Any:
        keys = [key.key if isinstance(key, jax.tree_util.DictKey) else None for key in path]
        suffixes = (tuple(keys[start:]) for start in range(len(keys)))
        v = next((flat[keys] for keys in suffixes if keys in flat), None)
        mirrors = v is not None and v.shape == leaf.shape and names_of(v)
        return nnx.Variable(leaf, axes=names_of(v)) if mirrors else leaf

    return jax.tree_util.tree_map_with_path(of, state)


def _unnamed(state: Any) -> Any:
    """The state as the transformation made it."""
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda v: v.get_value() if is_variable(v) else v, state, is_leaf=is_variable)
