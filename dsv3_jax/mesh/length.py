"""Rows of tokens over several devices: the mesh axis "expert" shards their length.

With `Layout.length="expert"`, rows are sharded by "data" alone. Around attention a device has all
tokens of its own heads: an all-to-all brings queries there, latents are gathered, and another
all-to-all takes the result back. All else works on the tokens where they are. This is for training
and evaluation, inside functions that `by_layout` decorates.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array

from dsv3_jax.config import Layout, ModelConfig, RunConfig
from dsv3_jax.config.fields import require
from dsv3_jax.mesh.shape import format_mesh
from dsv3_jax.ops.varying import varying

F = TypeVar("F", bound=Callable)

_asked = ContextVar("asked", default=False)


def by_layout(f: F) -> F:
    """Decorate a function of a model: while it is traced, the model's `Layout.length` applies.

    Example:
        >>> from types import SimpleNamespace
        >>> asked = by_layout(lambda model: _asked.get())
        >>> asked(SimpleNamespace(execution=SimpleNamespace(layout=Layout(length="expert"))))
        True
    """

    @wraps(f)
    def run(model: Any, *args: Any, **settings: Any) -> Any:
        token = _asked.set(model.execution.layout.length == "expert")
        try:
            return f(model, *args, **settings)
        finally:
            _asked.reset(token)

    return cast(F, run)


def shards_length() -> bool:
    """Whether the mesh in use shards the length of rows.

    Example:
        >>> shards_length()
        False
    """
    return _asked.get() and _parts(jax.sharding.get_abstract_mesh()) > 1


def check_length(mesh: Mesh, run: RunConfig) -> None:
    """Check that a mesh can shard the rows of a run by their length, if its layout asks for it.

    Raises: ConfigError for what the axes do not divide, or what needs complete rows on a device.
    """
    layout, cfg = run.execution.layout, run.model
    parts = _parts(mesh)
    if layout.length != "expert" or parts == 1:
        return

    length, heads = run.data.seq_len, parts * mesh.shape["tensor"]
    by = f"of mesh {format_mesh(mesh)}, as layout.length='expert' needs"
    require(length % parts == 0, f"seq_len={length} is not divisible by expert={parts} {by}")
    whole = f"num_heads={cfg.num_heads} is not divisible by expert × tensor={heads} {by}"
    require(cfg.num_heads % heads == 0, whole)
    instead = "needs complete rows on a device; use layout.length='none'"
    require(cfg.attention != "dsa", f"attention='dsa' {instead}")
    require(cfg.capacity_factor is None, f"capacity_factor={cfg.capacity_factor} {instead}")
    require(not run.grpo.group, f"grpo.group={run.grpo.group} {instead}")


def check_decoding(layout: Layout, mesh: Mesh | AbstractMesh) -> None:
    """Check that decoding keeps rows, and their cache, on one device each.

    Raises: ConfigError if a layout and a mesh shard their length.
    """
    require(
        layout.length != "expert" or _parts(mesh) == 1,
        f"layout.length='expert' shards no cache, and mesh {format_mesh(mesh)} has expert > 1; "
        "decode with layout.length='none', or with expert=1",
    )


def check_attention(cfg: ModelConfig, layout: Layout, *, decodes: bool, splits: bool) -> None:
    """Check that an attention can compute on the mesh in use.

    Args: splits: each of its heads attends without the others.
    Raises: ConfigError where the length of rows is sharded, and it decodes or does not split.
    """
    if decodes:
        check_decoding(layout, jax.sharding.get_abstract_mesh())
    require(
        splits or not shards_length(),
        f"attention={cfg.attention!r} needs complete rows on a device, as it defines "
        "attend_to_rows; use layout.length='none'",
    )


def _parts(mesh: Mesh | AbstractMesh) -> int:
    return dict(mesh.shape).get("expert", 1)


# Places of a row


def first(x: Array, k: int) -> Array:
    """The first T - k of T places of rows [B, T, …]; of sharded rows all, the last k of them 0.

    What an axis does not divide would be gathered, so sharded rows keep their T places.

    Example:
        >>> first(jnp.array([[5, 6, 7]]), 1)
        Array([[5, 6]], dtype=int32)
    """
    length = x.shape[1]
    if not shards_length():
        return x[:, : length - k]
    is_first = jnp.arange(length) < length - k
    return jnp.where(is_first.reshape(1, -1, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def later(x: Array, k: int, end: int = 0) -> Array:
    """The places of rows [B, T, …] from k on, to T - end; of sharded rows, zeros up to T follow.

    Example:
        >>> later(jnp.array([[5, 6, 7]]), 1)
        Array([[6, 7]], dtype=int32)
    """
    return filled(x[:, k : x.shape[1] - end], k + end, 0)


def filled(x: Array | None, k: int, value: int) -> Any:
    """Rows that lack their last k places; to sharded rows these are added, filled with `value`.

    Example:
        >>> filled(jnp.array([[5, 6]]), 1, value=-1)
        Array([[5, 6]], dtype=int32)
    """
    if x is None or not shards_length():
        return x
    more = [(0, k if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, more, constant_values=value)


def over_rows(x: Array) -> Array:
    """Sum what devices have of each row's parts, inside `shard_map`; complete rows have one part.

    Example:
        >>> over_rows(jnp.array([3.0]))
        Array([3.], dtype=float32)
    """
    in_parts = shards_length() and "expert" in varying(x)
    return jax.lax.psum(x, "expert") if in_parts else x
