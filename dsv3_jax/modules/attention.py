"""Multi-head latent attention as a module: its parameters, and the two ops that use them."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.layers import RMSNorm, param
from dsv3_jax.ops import mla, rope

LATENT_NORM_EPS = 1e-6  # whatever norm_eps says, as the reference implementations do


class Positions(NamedTuple):
    """What attention needs to know of where tokens stand."""

    cos: Array  # float32 [B, T, R/2]
    sin: Array  # float32 [B, T, R/2]
    segment_ids: Array | None  # int32 [B, T]


def positions_of(cfg: ModelConfig, positions: Array, segment_ids: Array | None) -> Positions:
    """Rotation angles of int32 positions [B, T]."""
    freqs = rope.frequencies(cfg.rope_head_dim, cfg.rope_theta, cfg.yarn)
    return Positions(*rope.cos_sin(positions, freqs, cfg.yarn), segment_ids)


class MLA(nnx.Module):
    """Multi-head latent attention.

    c_q = norm(x W_dq), q = c_q W_uq;  [c_kv, k_rope] = x W_dkv, c_kv = norm(c_kv);  k = c_kv W_uk, v = c_kv W_uv.
    Source: DeepSeek-V2 report, section 2.1. The extra scaling at the bottlenecks that the report mentions is not in the
    released code, nor here.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        dim, heads, std = cfg.dim, cfg.num_heads, cfg.init_std
        qk_dim = cfg.nope_head_dim + cfg.rope_head_dim
        if cfg.q_latent_dim is None:
            self.w_q = param(rngs, (dim, heads, qk_dim), std)
        else:
            self.w_dq = param(rngs, (dim, cfg.q_latent_dim), std)
            self.q_norm = RMSNorm(cfg.q_latent_dim, LATENT_NORM_EPS)
            self.w_uq = param(rngs, (cfg.q_latent_dim, heads, qk_dim), std)
        self.w_dkv = param(rngs, (dim, cfg.kv_latent_dim + cfg.rope_head_dim), std)
        self.kv_norm = RMSNorm(cfg.kv_latent_dim, LATENT_NORM_EPS)
        self.w_uk = param(rngs, (cfg.kv_latent_dim, heads, cfg.nope_head_dim), std)
        self.w_uv = param(rngs, (cfg.kv_latent_dim, heads, cfg.v_head_dim), std)
        self.w_o = param(rngs, (heads, cfg.v_head_dim, dim), std)
        self.cfg = cfg
        self.scale = rope.softmax_scale(qk_dim, cfg.yarn)

    def __call__(self, x: Float[Array, "B T D"], at: Positions) -> tuple[Array, Array]:
        """Training and prefill. Returns (output [B, T, D], cache rows [c_kv, k_rope] [B, T, C+R])."""
        q_nope, q_rope = self._queries(x, at)
        rows = self.cache_rows(x, at)
        c_kv, k_rope = jnp.split(rows, [self.cfg.kv_latent_dim], axis=-1)
        w_uk, w_uv = self.w_uk[...].astype(x.dtype), self.w_uv[...].astype(x.dtype)
        out = mla.expanded(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, scale=self.scale, segment_ids=at.segment_ids)
        return self._output(out), rows

    def decode(
        self, x: Float[Array, "B T D"], at: Positions, cache: Float[Array, "B S CR"], valid: Bool[Array, "B T S"]
    ) -> Array:
        """Attention of a few new tokens to a cache that holds their own rows already: output [B, T, D]."""
        q_nope, q_rope = self._queries(x, at)
        w_uk, w_uv = self.w_uk[...].astype(x.dtype), self.w_uv[...].astype(x.dtype)
        out = mla.absorbed(q_nope, q_rope, cache.astype(x.dtype), valid, w_uk, w_uv, scale=self.scale)
        return self._output(out)

    def cache_rows(self, x: Float[Array, "B T D"], at: Positions) -> Float[Array, "B T CR"]:
        """What is remembered of each token: [normed c_kv, rotated k_rope]."""
        down = x @ self.w_dkv[...].astype(x.dtype)
        c_kv, k_rope = jnp.split(down, [self.cfg.kv_latent_dim], axis=-1)
        k_rope = rope.rotate(k_rope, at.cos, at.sin, interleaved=self.cfg.rope_interleaved)
        return jnp.concatenate([self.kv_norm(c_kv), k_rope], axis=-1)

    def _queries(self, x: Array, at: Positions) -> tuple[Array, Array]:
        if self.cfg.q_latent_dim is None:
            q = jnp.einsum("btd,dhk->bthk", x, self.w_q[...].astype(x.dtype))
        else:
            c_q = self.q_norm(x @ self.w_dq[...].astype(x.dtype))
            q = jnp.einsum("btq,qhk->bthk", c_q, self.w_uq[...].astype(x.dtype))
        q_nope, q_rope = jnp.split(q, [self.cfg.nope_head_dim], axis=-1)
        cos, sin = at.cos[:, :, None], at.sin[:, :, None]
        return q_nope, rope.rotate(q_rope, cos, sin, interleaved=self.cfg.rope_interleaved)

    def _output(self, out: Array) -> Array:
        return jnp.einsum("bthv,hvd->btd", out, self.w_o[...].astype(out.dtype))
