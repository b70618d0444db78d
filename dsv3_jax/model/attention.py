"""Attention as modules: multi-head latent attention, and the plain attention that it is held against."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.mesh.sharding import constrain, each_its_own
from dsv3_jax.model.cache import AXES, Cache, Kind, write
from dsv3_jax.model.layers import RMSNorm, param
from dsv3_jax.ops import mla, rope
from dsv3_jax.ops.attention import causal_attention
from dsv3_jax.ops.cached_attention import cached_attention
from dsv3_jax.ops.products import few_rows_product, product

LATENT_NORM_EPS = 1e-6  # whatever norm_eps says, as the reference implementations do
HEADS_APART = ("batch", None, "heads", None)  # how a mesh cuts what each head has


class Positions(NamedTuple):
    """What attention needs to know of where tokens stand."""

    cos: Array  # float32 [B, T, R/2]
    sin: Array  # float32 [B, T, R/2]
    segment_ids: Array | None  # int32 [B, T]


def positions_of(cfg: ModelConfig, positions: Array, segment_ids: Array | None) -> Positions:
    """Rotation angles of int32 positions [B, T]."""
    freqs = rope.frequencies(cfg.rope_head_dim, cfg.rope_theta, cfg.yarn)
    return Positions(*rope.cos_sin(positions, freqs, cfg.yarn), segment_ids)


def from_zero(batch: int, length: int) -> Array:
    """Positions 0, 1, … of each row, int32 [B, T]."""
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


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
            self.w_q = param(rngs, (dim, heads, qk_dim), ("dim", "heads", None), std)
        else:
            self.w_dq = param(rngs, (dim, cfg.q_latent_dim), ("dim", None), std)
            self.q_norm = RMSNorm(cfg.q_latent_dim, LATENT_NORM_EPS)
            self.w_uq = param(rngs, (cfg.q_latent_dim, heads, qk_dim), ("latent", "heads", None), std)
        self.w_dkv = param(rngs, (dim, cfg.kv_latent_dim + cfg.rope_head_dim), ("dim", None), std)
        self.kv_norm = RMSNorm(cfg.kv_latent_dim, LATENT_NORM_EPS)
        self.w_uk = param(rngs, (heads, cfg.nope_head_dim, cfg.kv_latent_dim), ("heads", None, "latent"), std)
        self.w_uv = param(rngs, (heads, cfg.v_head_dim, cfg.kv_latent_dim), ("heads", None, "latent"), std)
        self.w_o = param(rngs, (heads, cfg.v_head_dim, dim), ("heads", None, "dim"), std)
        self.cfg = cfg
        self.scale = rope.softmax_scale(qk_dim, cfg.yarn)

    def __call__(self, x: Float[Array, "B T D"], at: Positions, kind: Kind) -> tuple[Array, Array]:
        """Training and prefill. Returns (output [B, T, D], what a cache of that kind remembers [B, G, T, X])."""
        q_nope, q_rope = self._queries(x, at)
        row = self._row(x, at)
        c_kv, k_rope = jnp.split(row, [self.cfg.kv_latent_dim], axis=-1)
        w_uk, w_uv = self._up(x)
        out = mla.expanded(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, scale=self.scale, segment_ids=at.segment_ids)
        rows = row[:, None] if kind == "latent" else side_by_side(*mla.expand(c_kv, k_rope, w_uk, w_uv))
        return output(self, out), rows

    def decode(self, x: Float[Array, "B T D"], at: Positions, cache: Cache, layer: Array) -> tuple[Array, Cache]:
        """T new tokens attend to what the cache holds and to themselves: (output [B, T, D], the cache with them)."""
        q_nope, q_rope = self._queries(x, at, few_rows_product)
        row = self._row(x, at, few_rows_product)
        w_uk, w_uv = self._up(x)
        if cache.kind == "latent":

            def attend(q_nope, q_rope, w_uk, w_uv, row, stored, lengths, layer):
                held = write(replace(cache, stored=stored, lengths=lengths), row[:, None], layer)
                last = places(held, row.shape[1])
                out = mla.absorbed(q_nope, q_rope, held.stored, layer, last, w_uk, w_uv, scale=self.scale)
                return out, held.stored

            up, given = ("heads", None, None), (q_nope, q_rope, w_uk, w_uv, row, cache.stored, cache.lengths, layer)
            names = (HEADS_APART, HEADS_APART, up, up, ("batch", None, None), AXES, ("batch",), ())
            out, stored = each_its_own(attend, names, (0, 5), *given)
            return output(self, out, few_rows_product), replace(cache, stored=stored)
        c_kv, k_rope = jnp.split(row, [self.cfg.kv_latent_dim], axis=-1)
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        out, cache = attend_to_heads(q, *mla.expand(c_kv, k_rope, w_uk, w_uv), cache, layer, self.scale)
        return output(self, out, few_rows_product), cache

    def _row(self, x: Float[Array, "B T D"], at: Positions, product: Callable = product) -> Float[Array, "B T CR"]:
        """What is remembered of each token: [normed c_kv, rotated k_rope]."""
        down = product(x, self.w_dkv[...])
        c_kv, k_rope = jnp.split(down, [self.cfg.kv_latent_dim], axis=-1)
        k_rope = rope.rotate(k_rope, at.cos, at.sin, interleaved=self.cfg.rope_interleaved)
        return jnp.concatenate([self.kv_norm(c_kv), k_rope], axis=-1)

    def _up(self, x: Array) -> tuple[Array, Array]:
        return self.w_uk[...].astype(x.dtype), self.w_uv[...].astype(x.dtype)

    def _queries(self, x: Array, at: Positions, product: Callable = product) -> tuple[Array, Array]:
        if self.cfg.q_latent_dim is None:
            q = product(x, self.w_q[...])
        else:
            q = product(self.q_norm(product(x, self.w_dq[...])), self.w_uq[...])
        q_nope, q_rope = jnp.split(constrain(q, *HEADS_APART), [self.cfg.nope_head_dim], axis=-1)
        cos, sin = at.cos[:, :, None], at.sin[:, :, None]
        return q_nope, rope.rotate(q_rope, cos, sin, interleaved=self.cfg.rope_interleaved)


class GQA(nnx.Module):
    """Attention with keys and values for each of `kv_heads` heads: MHA has one a query head, MQA a single one.

    The baseline that MLA is held against. Heads are as wide as MLA's: N + R numbers of a query or key, of which R are
    rotated, and V of a value.
    Source: arXiv 1706.03762 (MHA), 1911.02150 (MQA), 2305.13245 (GQA).
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        dim, heads, groups, std = cfg.dim, cfg.num_heads, cfg.kv_heads, cfg.init_std
        qk_dim = cfg.nope_head_dim + cfg.rope_head_dim
        self.w_q = param(rngs, (dim, heads, qk_dim), ("dim", "heads", None), std)
        self.w_k = param(rngs, (dim, groups, qk_dim), ("dim", "heads", None), std)
        self.w_v = param(rngs, (dim, groups, cfg.v_head_dim), ("dim", "heads", None), std)
        self.w_o = param(rngs, (heads, cfg.v_head_dim, dim), ("heads", None, "dim"), std)
        self.cfg = cfg
        self.scale = rope.softmax_scale(qk_dim, cfg.yarn)

    def __call__(self, x: Float[Array, "B T D"], at: Positions, kind: Kind) -> tuple[Array, Array]:
        """As MLA's; there is one kind of row."""
        q, k, v = self._project(x, at)
        repeats = self.cfg.num_heads // self.cfg.kv_heads
        k_heads, v_heads = (jnp.repeat(y, repeats, axis=2) for y in (k, v))
        out = causal_attention(q, k_heads, v_heads, scale=self.scale, segment_ids=at.segment_ids)
        return output(self, out), side_by_side(k, v)

    def decode(self, x: Float[Array, "B T D"], at: Positions, cache: Cache, layer: Array) -> tuple[Array, Cache]:
        """As MLA's."""
        out, cache = attend_to_heads(*self._project(x, at, few_rows_product), cache, layer, self.scale)
        return output(self, out, few_rows_product), cache

    def _project(self, x: Array, at: Positions, product: Callable = product) -> tuple[Array, Array, Array]:
        q, k, v = (product(x, w[...]) for w in (self.w_q, self.w_k, self.w_v))
        q, k, v = (constrain(y, *HEADS_APART) for y in (q, k, v))
        return rotate_last(q, at, self.cfg), rotate_last(k, at, self.cfg), v


def make_attention(cfg: ModelConfig, *, rngs: nnx.Rngs) -> MLA | GQA:
    """The attention that a configuration asks for."""
    return MLA(cfg, rngs=rngs) if cfg.attention == "mla" else GQA(cfg, rngs=rngs)


def output(module: MLA | GQA, out: Float[Array, "B T H V"], product: Callable = product) -> Float[Array, "B T D"]:
    """Heads put together by w_o."""
    return product(constrain(out, *HEADS_APART), module.w_o[...], 2)


def rotate_last(x: Float[Array, "B T H K"], at: Positions, cfg: ModelConfig) -> Float[Array, "B T H K"]:
    """The last R numbers of each head rotated."""
    nope, rotated = jnp.split(x, [cfg.nope_head_dim], axis=-1)
    rotated = rope.rotate(rotated, at.cos[:, :, None], at.sin[:, :, None], interleaved=cfg.rope_interleaved)
    return jnp.concatenate([nope, rotated], axis=-1)


def side_by_side(k: Float[Array, "B T G K"], v: Float[Array, "B T G V"]) -> Float[Array, "B G T KV"]:
    """What an expanded cache remembers."""
    return jnp.concatenate([k, v], axis=-1).swapaxes(1, 2)


def places(cache: Cache, count: int) -> Array:
    """Where `count` new tokens stand in the cache, int32 [B, count]: each sees all up to itself."""
    return cache.lengths[:, None] + jnp.arange(count, dtype=jnp.int32)[None]


def attend_to_heads(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    cache: Cache,
    layer: Array,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Cache]:
    """Remember T new tokens' keys and values, then let each query head attend to its key-value head's."""
    batch, length, heads, _ = q.shape
    groups = k.shape[2]

    def attend(q, rows, stored, lengths, layer):
        held = write(replace(cache, stored=stored, lengths=lengths), rows, layer)
        own, each = q.shape[2:4]  # key-value heads here, and query heads of each
        last = jnp.repeat(places(held, length), each, axis=1)
        q = q.swapaxes(1, 2).reshape(q.shape[0], own, length * each, -1)
        out = cached_attention(q, held.stored, layer, last, parts=cache.parts, shared=False, scale=scale)
        return out.reshape(q.shape[0], own, length, each, -1).swapaxes(1, 2), held.stored

    # Query heads stand by their key-value head, so that a mesh cuts both alike, or neither.
    q = q.reshape(batch, length, groups, heads // groups, -1)
    names = ((*HEADS_APART, None), AXES, AXES, ("batch",), ())
    out, stored = each_its_own(attend, names, (0, 2), q, side_by_side(k, v), cache.stored, cache.lengths, layer)
    return out.reshape(batch, length, heads, -1), replace(cache, stored=stored)
