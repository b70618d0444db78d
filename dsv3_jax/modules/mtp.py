"""Multi-token prediction: what drafts the tokens after the next one."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.cache import Cache, Kind
from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.attention import Positions
from dsv3_jax.modules.blocks import SparseBlock
from dsv3_jax.modules.layers import RMSNorm, param
from dsv3_jax.modules.moe import Experts, LayerRouting


class MTPModule(nnx.Module):
    """One depth of DeepSeek's causal chain: h^k_i = Block(W_eh [norm(Emb(t_{i+k})); norm(h^{k-1}_i)]), normed.

    The embedding comes first, then the hidden state, as in the released weights; the report writes them the other
    way round. What goes on to the next depth is the normed h^k. Source: DeepSeek-V3 report, section 2.2.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.embed_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.hidden_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.w_eh = param(rngs, (2 * cfg.dim, cfg.dim), cfg.init_std)
        self.block = SparseBlock(cfg, rngs=rngs)
        self.experts = Experts(cfg, 1, rngs=rngs)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def combine(self, embedded: Float[Array, "B T D"], h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        both = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(h)], axis=-1)
        return both @ self.w_eh[...].astype(both.dtype)

    def __call__(self, embedded: Array, h: Array, at: Positions, mask: Array) -> tuple[Array, LayerRouting]:
        experts = self.experts.arrays()
        x = self.combine(embedded, h)
        zero = jnp.zeros((), jnp.int32)
        x, _, routing, _ = self.block(x, at, mask, experts, experts, zero, "latent")
        return self.norm(x), routing

    def prefill(self, embedded: Array, h: Array, at: Positions, kind: Kind) -> tuple[Array, Array]:
        """A prompt's positions. Returns (normed h^k [B, T, D], what a cache of that kind remembers [B, G, T, X])."""
        experts, everything = self.experts.arrays(), jnp.ones(h.shape[:2], jnp.bool_)
        x, rows, _, _ = self.block(
            self.combine(embedded, h), at, everything, experts, experts, jnp.zeros((), jnp.int32), kind
        )
        return self.norm(x), rows

    def decode(self, embedded: Array, h: Array, at: Positions, cache: Cache) -> tuple[Array, Cache]:
        """T new positions, which follow what the module's own cache of one layer holds."""
        zero = jnp.zeros((), jnp.int32)
        x, cache = self.block.decode(self.combine(embedded, h), at, cache, zero, self.experts.arrays(), zero)
        return self.norm(x), cache
