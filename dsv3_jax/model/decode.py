"""Decoding: prompts fill a cache, then each step runs the trunk over a few tokens.

`prefill` sets the lengths of a cache. `run_layers` writes rows and leaves the lengths as they are:
its caller knows how many of the tokens will count.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dsv3_jax.config import CacheKind
from dsv3_jax.mesh.sharding import on_mesh
from dsv3_jax.model.blocks import ATTENTION
from dsv3_jax.model.cache import Cache, empty_cache
from dsv3_jax.model.context import from_zero, make_context
from dsv3_jax.model.stack import unstack
from dsv3_jax.model.transformer import Transformer

# most layers that decoding unrolls: a scan copies each layer out of its stack, experts too
UNROLLED = 64
UNROLLED_PREFILL = 16  # most layers that reading prompts unrolls on the CPU


class DecodeWeights(NamedTuple):
    """Each layer's own arrays, sliced out of the stacks once a request.

    A loop over stacks copies them each step.
    """

    dense: list[nnx.State]
    sparse: list[nnx.State]


class Decoded(NamedTuple):
    """What the trunk made of some tokens."""

    x: Array  # [B, T, D]: the last layer's output, before the final norm
    cache: Any  # the cache with these tokens' rows; None without one
    expert_ids: Array | None  # int32 [Lmoe, B, T, K]: what the routers chose


def unrolls(model: Transformer) -> bool:
    """Whether decoding unrolls the layers; not in very deep models.

    Under fsdp neither: a scan gathers a layer's weights in its turn, and so never holds all.
    """
    gathers = on_mesh() and model.execution.layout.fsdp
    return not gathers and model.cfg.num_layers <= UNROLLED


def prepare_decode(model: Transformer) -> DecodeWeights | None:
    """Take each layer's arrays out of the stacks, once a request; None if layers are not unrolled.

    Outside `jax.jit` a CPU copies nothing. A GPU copies all but the experts, which XLA can slice; a
    TPU copies all.
    """
    if not unrolls(model):
        return None
    experts = not model.kernels.device.slices_experts
    return DecodeWeights(unstack(model.dense), unstack(model.sparse, experts=experts))


def make_cache(
    model: Transformer,
    batch: int,
    capacity: int,
    kind: CacheKind,
    dtype: Any,
    *,
    layers: int | None = None,
) -> Cache:
    """An empty cache of the trunk, or of so many layers. See `model.cache.empty_cache`."""
    cfg = model.cfg
    layers = layers or cfg.num_layers
    multiple = model.kernels.device.cache_row_multiple
    rows = ATTENTION[cfg.attention].cache_rows(cfg, kind)
    padded = {
        name: (heads, -(-width // multiple) * multiple) for name, (heads, width) in rows.items()
    }
    sizes = [1] * layers if unrolls(model) else [layers]
    return empty_cache(padded, sizes, batch, capacity, dtype)


def prefill(
    model: Transformer,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: Cache,
    weights: DecodeWeights | None = None,
    given: Int[Array, "Lmoe B T K"] | None = None,
) -> Decoded:
    """Read prompts, whose first `lengths` tokens count, into an empty cache.

    Args:
        weights: from `prepare_decode`, used where a scan would copy each layer's experts and the
            model is not so deep that it takes long to compile.
        given: experts in place of the routers' choices, see `ops.routing.replay`.
    """
    ctx = make_context(model.cfg, from_zero(*tokens.shape), how=model.how("decode"), tokens=tokens)
    ctx = ctx._replace(given=given)

    # Prompts are read without a cache; each layer hands out the rows that the cache will keep.
    shallow = model.cfg.num_layers <= UNROLLED_PREFILL
    layers = weights if model.kernels.device.scan_copies and shallow else None
    trunk = model.run_trunk(tokens, ctx, layers, keep=tuple(cache.parts[0]))

    # The dense layers' rows, then the sparse layers': [L, B, T, G, X].
    rows = jax.tree.map(lambda *kinds: jnp.concatenate(kinds), *trunk.rows.values())
    return Decoded(trunk.x, cache.fill(rows, lengths), _chosen(trunk))


def run_layers(
    model: Transformer,
    tokens: Int[Array, "B T"],
    cache: Cache | None,
    weights: DecodeWeights | None = None,
) -> Decoded:
    """Run the trunk over tokens that follow what the cache holds.

    Args:
        cache: None means that the tokens are all there are.
        weights: from `prepare_decode`, made outside the loop over tokens.
    """
    positions = from_zero(*tokens.shape) if cache is None else cache.positions(tokens.shape[1])
    how = model.how("decode")
    ctx = make_context(model.cfg, positions, how=how, tokens=tokens, cache=cache)
    if cache is not None and weights is None:
        weights = prepare_decode(model)
    trunk = model.run_trunk(tokens, ctx, weights)
    return Decoded(trunk.x, trunk.cache, _chosen(trunk))


def _chosen(trunk: Any) -> Array | None:
    return trunk.metrics.get("sparse", {}).get("expert_ids")
