"""What goes into every layer beside x: how to compute, positions, documents, and the cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax.config import Execution, Layout, ModelConfig
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.model.cache import Cache
from dsv3_jax.ops import rope
from dsv3_jax.ops.routing import ROUTERS, Tokens


@jax.tree_util.register_static
@dataclass(frozen=True)
class How:
    """How a pass is computed: fixed when it is traced, and no layer's own.

    Example:
        >>> how_of(Execution(kernels="xla")).kernels("product", jnp.ones(2), jnp.ones(2)).item()
        2.0
    """

    kernels: Kernels
    layout: Layout = Layout()
    # decode, of prompts too: no token is dropped, whatever capacity_factor says, and few tokens
    # may read only the experts that they chose
    mode: Literal["train", "decode"] = "train"
    # "max_logit": each head's largest logit; "scores": every expert's; "index_sparse" and
    # "index_warm": the indexers' loss; "gates": in decoding, those of the chosen experts
    watch: frozenset[str] = frozenset()
    edit_gates: Callable | None = None  # (layer, expert_ids, gates) → gates, of the trunk


def how_of(execution: Execution | None = None) -> How:
    """How a layer that is used alone computes. None means the best of the default device."""
    execution = execution or Execution()
    return How(prepare(execution), execution.layout)


class Context(NamedTuple):
    """What every layer gets beside x. A layer returns it with the cache that the next layer needs.

    Training and prefill have no cache. Prefill keeps each layer's rows.
    """

    how: How
    cos: Array  # float32 [B, T, R/2]
    sin: Array  # float32 [B, T, R/2]
    # int32 [B, T]: a token sees its own segment only; None means one segment a row
    segment_ids: Array | None
    mask: Array  # bool [B, T]: tokens that count for load and balance losses
    layer: Array | int  # int32 []: of the trunk; a Python number where layers are unrolled
    cache: Any = None  # Cache of all layers, that holds earlier tokens, or None
    tokens: Array | None = None  # int32 [B, T]: ids that the router reads, if it reads any
    # int32 [B, T, K]: experts that take the place of the router's choice; −1 chooses freely
    given: Array | None = None
    # of the layer that has just run without a cache: arrays [B, T, G, X] by name, of which a cache
    # may keep some
    rows: Any = None
    # int32 [B, T, k]: the tokens that the last indexer chose. None means all that a token may see
    chosen: Array | None = None
    # float32 []: of losses and shares that are means over tokens. None means the number of tokens
    # in `mask`
    divisor: Array | None = None

    @property
    def run(self) -> Kernels:
        """Runs an op of `ops/` by the kernel that serves it: `ctx.run("product", x, w)`."""
        return self.how.kernels

    def of_tokens(self, x: Array) -> Tokens:
        """x and what else belongs to its tokens, which a mesh shards together."""
        return Tokens(x, self.mask, self.tokens, self.given)


LayerResult = tuple[Array, Context, dict[str, Any]]  # (x, the context for the next layer, metrics)


def make_context(
    cfg: ModelConfig,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    how: How | None = None,
    tokens: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    one_document: bool = False,
) -> Context:
    """The context of tokens at int32 positions [B, T]; tokens of segment 0 are padding.

    Args:
        how: None means `how_of()`.
        tokens: their ids; only a router that reads them gets them.
        one_document: the segment ids of a row are 1, then 0. No token sees the padding after it,
            so attention needs no segments.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> ctx = make_context(preset("tiny"), from_zero(1, 3), jnp.array([[1, 1, 0]]))
        >>> ctx.cos.shape, ctx.mask  # R/2 = 8; the last token is padding
        ((1, 3, 8), Array([[ True,  True, False]], dtype=bool))
    """
    # The angles of RoPE are computed once, for all layers.
    freqs = rope.frequencies(cfg.rope_head_dim, cfg.rope_theta, cfg.yarn)
    cos, sin = rope.cos_sin(positions, freqs, cfg.yarn)
    mask = jnp.ones(positions.shape, jnp.bool_) if segment_ids is None else segment_ids != 0
    return Context(
        how=how_of() if how is None else how,
        cos=cos,
        sin=sin,
        segment_ids=None if one_document else segment_ids,
        mask=mask,
        layer=jnp.zeros((), jnp.int32),
        cache=cache,
        tokens=tokens if ROUTERS[cfg.router].reads_tokens else None,
    )


def from_zero(batch: int, length: int) -> Int[Array, "B T"]:
    """Positions 0, 1, … of each row.

    Example:
        >>> from_zero(2, 3)
        Array([[0, 1, 2],
               [0, 1, 2]], dtype=int32)
    """
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
