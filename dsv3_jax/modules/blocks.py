"""The two kinds of layer: attention, then one wide SwiGLU or a mixture of experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.cache import LatentCache, write
from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.attention import MLA, Positions
from dsv3_jax.modules.layers import RMSNorm, SwiGLU
from dsv3_jax.modules.moe import MoE
from dsv3_jax.ops import dispatch


class DenseBlock(nnx.Module):
    """x + attention, then + one wide SwiGLU."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = MLA(cfg, rngs=rngs)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn = SwiGLU(cfg.dim, cfg.dense_dim, cfg.init_std, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], at: Positions) -> tuple[Array, Array]:
        a, rows = self.attn(self.attn_norm(x), at)
        x = x + a
        return x + self.ffn(self.ffn_norm(x)), rows

    def decode(self, x: Array, at: Positions, cache: LatentCache, layer: Array) -> tuple[Array, Array]:
        a, rows = _cached_attention(self, x, at, cache, layer)
        x = x + a
        return x + self.ffn(self.ffn_norm(x)), rows


class SparseBlock(nnx.Module):
    """x + attention, then + a mixture of experts."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = MLA(cfg, rngs=rngs)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.moe = MoE(cfg, rngs=rngs)

    def __call__(self, x, at: Positions, mask, experts: dispatch.Experts, thread: dispatch.Experts, layer):
        """Returns (x [B, T, D], cache rows, routing, thread)."""
        a, rows = self.attn(self.attn_norm(x), at)
        x = x + a
        y, routing, thread = self.moe(self.ffn_norm(x), mask, experts, thread, layer)
        return x + y, rows, routing, thread

    def decode(self, x, at: Positions, cache: LatentCache, layer, experts: dispatch.Experts, sparse_layer):
        a, rows = _cached_attention(self, x, at, cache, layer)
        x = x + a
        return x + self.moe.decode(self.ffn_norm(x), experts, sparse_layer), rows


def _cached_attention(block, x: Array, at: Positions, cache: LatentCache, layer: Array) -> tuple[Array, Array]:
    """Write the new tokens' rows into the cache, then attend to all that each may see. Returns (out, cache rows)."""
    normed = block.attn_norm(x)
    rows = write(cache.rows, block.attn.cache_rows(normed, at), layer, cache.lengths)
    own = jax.lax.dynamic_index_in_dim(rows, layer, 0, keepdims=False)
    place = cache.lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    valid = jnp.arange(cache.capacity, dtype=jnp.int32)[None, None] <= place[:, :, None]
    return block.attn.decode(normed, at, own, valid), rows
