"""The lightning indexer as a module: weights, queries and keys, and loss. See `ops/indexer.py`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.mesh.sharding import shard_map_over_batch
from dsv3_jax.model.context import Context, from_zero
from dsv3_jax.model.layers import param
from dsv3_jax.ops import rope
from dsv3_jax.ops.indexer import divergence, round_rotated


class LayerNorm(nnx.Module):
    """(x - mean) / √(variance + 1e-6) · scale + bias, in float32, over the last axis.

    Example:
        >>> LayerNorm(2)(jnp.array([1.0, 3.0])).round(3)
        Array([-1.,  1.], dtype=float32)
    """

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), decay=False)
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32), decay=False)

    def __call__(self, x: Float[Array, "*n X"]) -> Float[Array, "*n X"]:
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        scale, bias = (
            v[...].astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
            for v in (self.scale, self.bias)
        )
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        return (wide * scale + bias).astype(x.dtype)


class Indexer(nnx.Module):
    """Makes index queries, keys and weights: q = c_q W_iq; k = LayerNorm(x W_ik); w = x W_iw.

    Its inputs are detached: it takes part in no gradient but that of its own loss. Layers that are
    alike have their arrays in one stack, so a layer that shares another one's choice has weights
    too. They are never used or counted.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        dim, heads, width, std = cfg.dim, cfg.index_heads, cfg.index_dim, cfg.init_std
        self.w_iq = param(rngs, (cfg.q_latent_dim or 0, heads, width), ("latent", None, None), std)
        self.w_ik = param(rngs, (dim, width), ("dim", None), std)
        self.k_norm = LayerNorm(width)
        self.w_iw = param(rngs, (dim, heads), ("dim", None), std)
        self.cfg = cfg

    def __call__(
        self, x: Float[Array, "B T D"], c_q: Float[Array, "B T Q"], ctx: Context, kernels: Kernels
    ) -> dict[str, Array]:
        """Compute the indexer's rows of each token.

        Returns: "index_query" [B, T, I, X], "index_key" [B, T, 1, X], "index_weight" [B, T, 1, I].
        """
        x, c_q = jax.lax.stop_gradient((x, c_q))
        q = kernels("product", c_q, self.w_iq[...])
        k = self.k_norm(kernels("product", x, self.w_ik[...]))
        made = {"index_query": self._rotate(q, ctx), "index_key": self._rotate(k[:, :, None], ctx)}
        return made | {"index_weight": kernels("product", x, self.w_iw[...])[:, :, None]}

    def _rotate(self, x: Float[Array, "B T _ X"], ctx: Context) -> Float[Array, "B T _ X"]:
        """Rotate the first R numbers, and round as `index_precision` says."""
        cfg = self.cfg
        rotated, rest = jnp.split(x, [cfg.rope_head_dim], axis=-1)
        cos, sin = ctx.cos[:, :, None], ctx.sin[:, :, None]
        rotated = rope.rotate(rotated, cos, sin, interleaved=cfg.index_interleaved)
        x = jnp.concatenate([rotated, rest], axis=-1)
        if cfg.index_precision == "none":
            return x
        return round_rotated(x, cfg.index_precision == "fp8_ue8m0")

    def loss(
        self,
        queries: Mapping[str, Float[Array, "B T H _"]],
        rows: Mapping[str, Float[Array, "B T _ _"]],
        ids: Int[Array, "B T k"] | None,
        ctx: Context,
        scale: float,
    ) -> Float[Array, ""]:
        """Mean of `ops.indexer.divergence` over the tokens that are not padding.

        Of a part of a batch it is their sum, divided by `ctx.divisor`.

        Args:
            queries: of latent rows.
            ids: the chosen tokens; None means all.
        """

        def summed(q, w, key, queries, keys, ids, last, segment_ids, counted):
            kl = divergence(q, w, key, queries, keys, ids, last, segment_ids, scale=scale)
            return (jnp.where(counted, kl, 0.0).sum(), counted.sum(dtype=kl.dtype)), ()

        # Index keys and latent rows have one head, which all query heads share.
        of_indexer = rows["index_query"], rows["index_weight"][:, :, 0], rows["index_key"][:, :, 0]
        of_attention = list(queries.values()), [rows[name][:, :, 0] for name in queries]
        where = ids, from_zero(*ctx.mask.shape), ctx.segment_ids, ctx.mask
        (total, count), _ = shard_map_over_batch(summed, (), *of_indexer, *of_attention, *where)

        # A microbatch is divided by the tokens of the complete batch.
        divisor = jnp.maximum(count, 1) if ctx.divisor is None else ctx.divisor
        return total / divisor
