"""The context of a layer: positions, documents, what a router reads beside x, and the cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.cache import Cache
from dsv3_jax.ops import rope
from dsv3_jax.ops.routing import ROUTERS


@jax.tree_util.register_static
@dataclass(frozen=True)
class Options:
    """Options of a forward pass, fixed when it is traced."""

    may_drop: bool = True  # False: decoding, which drops no token, whatever capacity_factor says
    # "max_logit": each head's largest logit; "scores": every expert's
    watch: frozenset[str] = frozenset()
    edit_gates: Callable | None = None  # (layer, expert_ids, gates) → gates, of the trunk


DECODING = Options(may_drop=False)


class Context(NamedTuple):
    """Goes into every layer. A layer returns it with the cache that the next layer needs.

    Training and prefill have no cache. Prefill keeps each layer's rows.
    """

    cos: Array  # float32 [B, T, R/2]
    sin: Array  # float32 [B, T, R/2]
    # int32 [B, T]: a token sees its own segment only; None means one segment a row
    segment_ids: Array | None
    mask: Array  # bool [B, T]: tokens that count for load and balance losses
    # int32 []: which layer of the cache; a Python number where layers are unrolled
    layer: Array | int
    cache: Any = None  # Cache of all layers, that holds earlier tokens, or None
    options: Options = Options()
    tokens: Array | None = None  # int32 [B, T]: ids that the router reads, if it reads any
    # random keys [B], one a row, of the router's noise; None without noise
    keys: Array | None = None
    # int32 [B, T, K]: experts that take the place of the router's choice; −1 chooses freely
    expert_ids: Any = None
    # of the layer that has just run without a cache: by name, [B, T, G, X] that a cache may keep
    rows: Any = None
    # int32 [B, T, k]: the last indexer's choice, for layers that share it; None: each chooses
    chosen: Array | None = None
    # float32 []: of losses that are means over tokens; None: the number of tokens in `mask`
    divisor: Array | None = None


LayerResult = tuple[Array, Context, dict[str, Any]]  # (x, the context for the next layer, metrics)


def make_context(
    cfg: ModelConfig,
    positions: Array,
    segment_ids: Array | None = None,
    *,
    tokens: Array | None = None,
    keys: Array | None = None,
    cache: Cache | None = None,
    options: Options = Options(),
    one_document: bool = False,
) -> Context:
    """The context of tokens at int32 positions [B, T]; tokens of segment 0 are padding.

    Only a router that reads them gets `tokens` [B, T] and `keys` [B]. With `one_document` the
    segment ids of a row are 1, then 0. No token sees the padding after it, so attention needs no
    segments.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> ctx = make_context(preset("tiny"), from_zero(1, 3), jnp.array([[1, 1, 0]]))
        >>> ctx.cos.shape, ctx.mask  # R/2 = 8; the last token is padding
        ((1, 3, 8), Array([[ True,  True, False]], dtype=bool))
    """
    freqs = rope.frequencies(cfg.rope_head_dim, cfg.rope_theta, cfg.yarn)
    mask = jnp.ones(positions.shape, jnp.bool_) if segment_ids is None else segment_ids != 0
    zero = jnp.zeros((), jnp.int32)
    router = ROUTERS[cfg.router]
    segments = None if one_document else segment_ids
    return Context(
        *rope.cos_sin(positions, freqs, cfg.yarn), segments, mask, zero, cache, options=options,
        tokens=tokens if router.reads_tokens else None, keys=keys if router.has_noise else None,
    )  # fmt: skip


def from_zero(batch: int, length: int) -> Array:
    """Positions 0, 1, … of each row, int32 [B, T].

    Example:
        >>> from_zero(2, 3)
        Array([[0, 1, 2],
               [0, 1, 2]], dtype=int32)
    """
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
