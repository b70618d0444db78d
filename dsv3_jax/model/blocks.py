"""The two kinds of layer: attention, then one wide SwiGLU or a mixture of experts."""

from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.attention import Positions, make_attention
from dsv3_jax.model.cache import Cache, Kind
from dsv3_jax.model.layers import RMSNorm, SwiGLU
from dsv3_jax.model.moe import MoE
from dsv3_jax.ops import dispatch


class DenseBlock(nnx.Module):
    """x + attention, then + one wide SwiGLU."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = make_attention(cfg, rngs=rngs)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn = SwiGLU(cfg.dim, cfg.dense_dim, cfg.init_std, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], at: Positions, kind: Kind) -> tuple[Array, Array]:
        """Returns (x [B, T, D], what a cache of that kind remembers [B, G, T, X])."""
        a, rows = self.attn(self.attn_norm(x), at, kind)
        x = constrain(x + a, "batch", None, None)
        return constrain(x + self.ffn(self.ffn_norm(x)), "batch", None, None), rows

    def decode(self, x: Float[Array, "B T D"], at: Positions, cache: Cache, layer: Array) -> tuple[Array, Cache]:
        """T new tokens. Returns (x, the cache with them)."""
        a, cache = self.attn.decode(self.attn_norm(x), at, cache, layer)
        x = x + a
        return x + self.ffn.decode(self.ffn_norm(x)), cache


class SparseBlock(nnx.Module):
    """x + attention, then + a mixture of experts."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = make_attention(cfg, rngs=rngs)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.moe = MoE(cfg, rngs=rngs)

    def __call__(self, x, at: Positions, mask, experts: dispatch.Experts, thread: dispatch.Experts, layer, kind: Kind):
        """Returns (x [B, T, D], what a cache of that kind remembers [B, G, T, X], routing, thread)."""
        a, rows = self.attn(self.attn_norm(x), at, kind)
        x = constrain(x + a, "batch", None, None)
        y, routing, thread = self.moe(self.ffn_norm(x), mask, experts, thread, layer)
        return constrain(x + y, "batch", None, None), rows, routing, thread

    def decode(self, x, at: Positions, cache: Cache, layer, experts, sparse_layer):
        """T new tokens; `experts` as MoE.decode takes them. Returns (x, the cache with them)."""
        a, cache = self.attn.decode(self.attn_norm(x), at, cache, layer)
        x = x + a
        return x + self.moe.decode(self.ffn_norm(x), experts, sparse_layer), cache
