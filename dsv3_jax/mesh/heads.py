"""Arrays with heads on a mesh, and how they change places where the length of rows is sharded.

A device attends with its own heads to complete rows. Before and after that it has its own tokens,
which is the same unless `Layout.length` shards the rows' length.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.mesh.fsdp import gathered
from dsv3_jax.mesh.length import shards_length
from dsv3_jax.mesh.sharding import constrain, on_shards, shards_alike, spec
from dsv3_jax.ops.attention import repeat_heads

# Names of the axes of arrays [B, T, H, _], in attention and around it. "row" has no rule in
# `sharding.RULES`, so it is complete; `constrain` would take a None behind "batch" for "length".
HEAD_AXES = ("batch", "row", "attending", None)
TOKEN_AXES = ("batch", "length", "heads", None)


def to_heads(
    q: Float[Array, "B T H _"], rows: Mapping[str, Float[Array, "B T _ _"]], cached: Collection[str]
) -> tuple[Float[Array, "B T H _"], Mapping[str, Float[Array, "B T _ _"]]]:
    """Give each device all tokens of its own heads, where a mesh shards the length.

    Each device gathers the rows that all heads share. If rows are complete, nothing changes.

    Args: cached: names of the rows that a cache would keep; others are left out.
    """
    if not shards_length():
        return q, rows

    def by_heads(y: Array) -> Array:
        # So the gradient is one array, too, when it is exchanged: RoPE would make parts of it.
        return constrain(constrain(y, *TOKEN_AXES), *HEAD_AXES)

    # Arrays with heads are exchanged. If `expand` makes all that a cache keeps, it needs all rows.
    kept = {name: y for name, y in rows.items() if name in cached} or rows
    shared = {name: y for name, y in kept.items() if y.shape[2] == 1}
    found = {name: by_heads(y) for name, y in kept.items() if name not in shared}

    # What all heads read is gathered, and parted again.
    if shared:
        joined = jnp.concatenate(list(shared.values()), axis=-1)
        mesh = jax.sharding.get_abstract_mesh()
        used, tokens = (spec(axes, joined.shape, mesh) for axes in (HEAD_AXES, TOKEN_AXES))
        joined = gathered(joined, used, tokens, joined.dtype)
        ends = np.cumsum([y.shape[-1] for y in shared.values()])
        found |= zip(shared, jnp.split(joined, ends[:-1], axis=-1), strict=True)
    return by_heads(q), found


def attend_with_own_heads(
    attend: Callable,
    q: Float[Array, "B T H X"],
    k: Float[Array, "B T G X"],
    v: Float[Array, "B T G V"],
    *,
    segment_ids: Int[Array, "B T"] | None,
    maxima: bool,
) -> Any:
    """Attend with each device's own heads to its own sequences.

    Args:
        attend: `ops.attention.causal_attention`, or by `maxima` `attention_and_maxima`.
    Returns: as `attend`.
    """
    # Where devices share out query heads and cannot share out as few keys, each head gets its own.
    if not shards_alike(HEAD_AXES, q.shape, k.shape):
        k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))

    def local(q: Array, k: Array, v: Array, segment_ids: Array | None) -> dict[str, Array]:
        found = attend(q, k, v, segment_ids=segment_ids)
        return {"out": found[0], "maxima": found[1][..., None]} if maxima else {"out": found}

    shards: dict[str, tuple[Any, Any]] = {
        "q": (q, HEAD_AXES),
        "k": (k, HEAD_AXES),
        "v": (v, HEAD_AXES),
        "segment_ids": (segment_ids, ("batch", None)),
    }
    like = {"out": "q", "maxima": "q"} if maxima else {"out": "q"}
    found = on_shards(local, shards, like, has_kernel=True)
    return (found["out"], found["maxima"][..., 0]) if maxima else found["out"]


def own_heads(w: Float[Array, "H _ _"]) -> Float[Array, "H _ _"]:
    """Take the weights of the heads that a device attends with, if a length is sharded.

    Their gradient is made by heads too, and gathered then. Else XLA may gather the gradients of all
    heads' keys and values, which are of tokens.
    """
    if not shards_length():
        return w
    return constrain(constrain(w, "heads", None, None), "attending", None, None)


def to_tokens(out: Float[Array, "B T H _"]) -> Float[Array, "B T H _"]:
    """Bring the result of attention to the devices that have its tokens."""
    out = constrain(out, *HEAD_AXES)
    return constrain(out, *TOKEN_AXES) if shards_length() else out
