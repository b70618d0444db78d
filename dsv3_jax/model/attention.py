"""Attention as modules: multi-head latent attention, and the plain attention that it is compared with."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Execution, ModelConfig
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.mesh.sharding import constrain, shard_map_by_names, shards_alike
from dsv3_jax.model.cache import ROW_AXES, Cache
from dsv3_jax.model.context import Context, from_zero, make_context
from dsv3_jax.model.layers import RMSNorm, param
from dsv3_jax.ops import rope
from dsv3_jax.ops.attention import repeat_heads

LATENT_NORM_EPS = 1e-6  # whatever norm_eps says, as in the reference implementations
HEAD_AXES = ("batch", None, "heads", None)  # how a mesh shards arrays with heads


class MLA(nnx.Module):
    """Multi-head latent attention.

    c_q = norm(x W_dq), q = c_q W_uq;  [c_kv, k_rope] = x W_dkv, c_kv = norm(c_kv);  k = c_kv W_uk, v = c_kv W_uv.
    Source: DeepSeek-V2 report, section 2.1.
    Departs from the paper: no extra scaling at the bottlenecks; the released code has none either.

    Args: execution, kernels: how to compute; `kernels` defaults to the best of the default device.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> attention = ds.MLA(ds.preset("tiny"), rngs=nnx.Rngs(0))
    >>> attention(jnp.ones((2, 8, 128))).shape
    (2, 8, 128)
    """

    def __init__(
        self,
        cfg: ModelConfig,
        execution: Execution | None = None,
        *,
        rngs: nnx.Rngs,
        kernels: Kernels | None = None,
    ):
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
        self.cfg, self.kernels = cfg, kernels or prepare(execution)
        self.scale = rope.softmax_scale(qk_dim, cfg.yarn)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attend to earlier tokens of the same segment. Positions default to 0, 1, …"""
        return self.attend(x, _context(self.cfg, x, segment_ids, positions))[0]

    @jax.named_scope("MLA")
    def attend(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, Context]:
        """Attend to earlier tokens, cached ones first. Returns (output [B, T, D], the context with these tokens)."""
        q_nope, q_rope = self._queries(x, ctx)
        row, cache = self._row(x, ctx), ctx.cache
        if cache is not None and not cache.is_empty and cache.kind == "latent":
            w_uk, w_uv = self.w_uk[...].astype(x.dtype), self.w_uv[...].astype(x.dtype)
            out, cache = self._absorbed(q_nope, q_rope, row, w_uk, w_uv, cache, ctx.layer)
            return project_out(self, out), ctx._replace(cache=cache)
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        c_kv, k_rope = jnp.split(row, [self.cfg.kv_latent_dim], axis=-1)
        k, v = self.kernels.expand(c_kv, k_rope, self.w_uk[...], self.w_uv[...])
        if cache is None or cache.is_empty:
            out, ctx = attend_causally(self, q, k, v, ctx)
            if cache is not None:
                cache = cache.write(
                    row[:, None] if cache.kind == "latent" else concat_kv(k, v), ctx.layer, self.kernels
                )
        else:
            out, cache = attend_to_heads(self, q, k, v, cache, ctx.layer)
        return project_out(self, out), ctx._replace(cache=cache)

    def _absorbed(self, q_nope, q_rope, row, w_uk, w_uv, cache: Cache, layer: Array | int) -> tuple[Array, Cache]:
        """`ops.mla.absorbed` over the cache with these tokens' rows, sharded by sequences and heads."""

        part, index = cache.take(layer)

        def attend(q_nope, q_rope, w_uk, w_uv, row, stored, lengths, layer):
            held = replace(part, stored=stored, lengths=lengths).write(row[:, None], layer, self.kernels)
            batch, length, heads, _ = q_nope.shape
            q = jnp.concatenate([self.kernels.product_by_head(q_nope, w_uk), q_rope], axis=-1)
            out = self.kernels.cached_attention(
                q.reshape(batch, 1, length * heads, -1),
                held.stored,
                layer,
                jnp.repeat(held.positions(length), heads, axis=1),
                parts=cache.parts,
                shared=True,
                scale=self.scale,
            )
            out = out.reshape(batch, length, heads, -1)
            return self.kernels.product_by_head(out, w_uv, transposed=True), held.stored

        up = ("heads", None, None)
        names = (HEAD_AXES, HEAD_AXES, up, up, ("batch", None, None), ROW_AXES, ("batch",), ())
        args = (q_nope, q_rope, w_uk, w_uv, row, part.stored, cache.lengths, index)
        out, stored = shard_map_by_names(attend, names, (0, 5), *args)
        return out, cache.put(stored, layer)

    def _row(self, x: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T CR"]:
        """The row that may be cached of each token, [normed c_kv, rotated k_rope]."""
        down = self.kernels.product(x, self.w_dkv[...])
        c_kv, k_rope = jnp.split(down, [self.cfg.kv_latent_dim], axis=-1)
        k_rope = rope.rotate(k_rope, ctx.cos, ctx.sin, interleaved=self.cfg.rope_interleaved)
        return jnp.concatenate([self.kv_norm(c_kv), k_rope], axis=-1)

    def _queries(self, x: Array, ctx: Context) -> tuple[Array, Array]:
        product = self.kernels.product
        if self.cfg.q_latent_dim is None:
            q = product(x, self.w_q[...])
        else:
            q = product(self.q_norm(product(x, self.w_dq[...])), self.w_uq[...])
        q_nope, q_rope = jnp.split(constrain(q, *HEAD_AXES), [self.cfg.nope_head_dim], axis=-1)
        cos, sin = ctx.cos[:, :, None], ctx.sin[:, :, None]
        return q_nope, rope.rotate(q_rope, cos, sin, interleaved=self.cfg.rope_interleaved)


class GQA(nnx.Module):
    """Attention with keys and values for each of `kv_heads` heads: MHA has one a query head, MQA a single one.

    The baseline for MLA. Heads have MLA's widths: N + R numbers of a query or key, of which R are rotated, and V of a
    value. With `qk_norm`, q and k are normed in each head before they are rotated; heads share the scales.
    Source: arXiv 1706.03762 (MHA), 1911.02150 (MQA), 2305.13245 (GQA), 2302.05442 (norms of q and k).

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> cfg = ds.replace(ds.preset("tiny"), attention="gqa", num_kv_heads=2)
    >>> ds.GQA(cfg, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 128))).shape
    (2, 8, 128)
    """

    def __init__(
        self,
        cfg: ModelConfig,
        execution: Execution | None = None,
        *,
        rngs: nnx.Rngs,
        kernels: Kernels | None = None,
    ):
        dim, heads, groups, std = cfg.dim, cfg.num_heads, cfg.kv_heads, cfg.init_std
        qk_dim = cfg.nope_head_dim + cfg.rope_head_dim
        self.w_q = param(rngs, (dim, heads, qk_dim), ("dim", "heads", None), std)
        self.w_k = param(rngs, (dim, groups, qk_dim), ("dim", "heads", None), std)
        self.w_v = param(rngs, (dim, groups, cfg.v_head_dim), ("dim", "heads", None), std)
        self.w_o = param(rngs, (heads, cfg.v_head_dim, dim), ("heads", None, "dim"), std)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(qk_dim, cfg.norm_eps), RMSNorm(qk_dim, cfg.norm_eps)
        self.cfg, self.kernels = cfg, kernels or prepare(execution)
        self.scale = rope.softmax_scale(qk_dim, cfg.yarn)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attend to earlier tokens of the same segment. Positions default to 0, 1, …"""
        return self.attend(x, _context(self.cfg, x, segment_ids, positions))[0]

    @jax.named_scope("GQA")
    def attend(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, Context]:
        """Attend to earlier tokens, cached ones first. Returns (output [B, T, D], the context with these tokens)."""
        q, k, v = (self.kernels.product(x, w[...]) for w in (self.w_q, self.w_k, self.w_v))
        q, k, v = (constrain(y, *HEAD_AXES) for y in (q, k, v))
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate_last(y, ctx, self.cfg) for y in (q, k))
        cache = ctx.cache
        if cache is not None and not cache.is_empty:
            out, cache = attend_to_heads(self, q, k, v, cache, ctx.layer)
            return project_out(self, out), ctx._replace(cache=cache)
        out, ctx = attend_causally(self, q, k, v, ctx)
        if cache is not None:
            cache = cache.write(concat_kv(k, v), ctx.layer, self.kernels)
        return project_out(self, out), ctx._replace(cache=cache)


def make_attention(cfg: ModelConfig, *, rngs: nnx.Rngs, kernels: Kernels) -> MLA | GQA:
    """The attention that a configuration asks for.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = replace(preset("tiny"), attention="mha")
        >>> attention = nnx.eval_shape(lambda: make_attention(cfg, rngs=nnx.Rngs(0), kernels=prepare()))
        >>> type(attention).__name__, attention.w_k.shape
        ('GQA', (128, 4, 48))
    """
    return (MLA if cfg.attention == "mla" else GQA)(cfg, rngs=rngs, kernels=kernels)


def project_out(module: MLA | GQA, out: Float[Array, "B T H V"]) -> Float[Array, "B T D"]:
    """Combine the heads by w_o."""
    return module.kernels.product(constrain(out, *HEAD_AXES), module.w_o[...], 2)


def rotate_last(x: Float[Array, "B T H K"], ctx: Context, cfg: ModelConfig) -> Float[Array, "B T H K"]:
    """Rotate the last R numbers of each head.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg, x = preset("tiny"), jnp.ones((1, 2, 1, 48))  # positions 0 and 1, and N + R = 32 + 16 numbers
        >>> (rotate_last(x, make_context(cfg, from_zero(1, 2)), cfg) == x).sum(-1).ravel().tolist()  # position 0 stays
        [48, 32]
    """
    nope, rotated = jnp.split(x, [cfg.nope_head_dim], axis=-1)
    rotated = rope.rotate(rotated, ctx.cos[:, :, None], ctx.sin[:, :, None], interleaved=cfg.rope_interleaved)
    return jnp.concatenate([nope, rotated], axis=-1)


def attend_causally(
    module: MLA | GQA,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    ctx: Context,
) -> tuple[Float[Array, "B T H V"], Context]:
    """`ops.attention.causal_attention`; on a mesh, each device attends for its own sequences and heads.

    Returns: (the result, the context with each head's largest logit if it watches them).
    """
    segment_ids, how = ctx.segment_ids, {"scale": module.scale}

    def attend(q, k, v, segment_ids=None):
        if not ctx.watch_logits:
            return (module.kernels.causal_attention(q, k, v, **how, segment_ids=segment_ids),)
        out, maxima = module.kernels.attention_and_maxima(q, k, v, **how, segment_ids=segment_ids)
        return out, maxima[..., None]

    if not shards_alike(HEAD_AXES, q.shape, k.shape):
        k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))
    names, args = [HEAD_AXES] * 3, [q, k, v]
    if segment_ids is not None:
        names, args = [*names, ("batch", None)], [*args, segment_ids]
    out, *maxima = shard_map_by_names(attend, names, (0, 0)[: 1 + ctx.watch_logits], *args, has_kernel=True)
    if maxima:
        if segment_ids is not None:  # tokens of segment 0 are padding
            maxima = [jnp.where((segment_ids != 0)[:, :, None, None], maxima[0], -jnp.inf)]
        ctx = ctx._replace(max_logits=maxima[0].max((0, 1, 3)))
    return out, ctx


def concat_kv(k: Float[Array, "B T G K"], v: Float[Array, "B T G V"]) -> Float[Array, "B G T KV"]:
    """The rows of an expanded cache: [key, value].

    Example:
        >>> concat_kv(jnp.array([[[[1.0, 2.0]]]]), jnp.array([[[[3.0]]]]))
        Array([[[[1., 2., 3.]]]], dtype=float32)
    """
    return jnp.concatenate([k, v], axis=-1).swapaxes(1, 2)


def attend_to_heads(
    module: MLA | GQA,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    cache: Cache,
    layer: Array | int,
) -> tuple[Float[Array, "B T H V"], Cache]:
    """Cache T tokens' keys and values, then let each query head attend to its key-value head's rows."""
    batch, length, heads, _ = q.shape
    groups = k.shape[2]
    part, index = cache.take(layer)

    def attend(q, rows, stored, lengths, layer):
        held = replace(part, stored=stored, lengths=lengths).write(rows, layer, module.kernels)
        local_groups, each = q.shape[2:4]  # key-value heads on this device, and query heads of each
        last = jnp.repeat(held.positions(length), each, axis=1)
        q = q.swapaxes(1, 2).reshape(q.shape[0], local_groups, length * each, -1)
        out = module.kernels.cached_attention(
            q, held.stored, layer, last, parts=cache.parts, shared=False, scale=module.scale
        )
        return out.reshape(q.shape[0], local_groups, length, each, -1).swapaxes(1, 2), held.stored

    # Query heads are grouped by key-value head, so a mesh shards both alike, or neither.
    q = q.reshape(batch, length, groups, heads // groups, -1)
    names = ((*HEAD_AXES, None), ROW_AXES, ROW_AXES, ("batch",), ())
    out, stored = shard_map_by_names(attend, names, (0, 2), q, concat_kv(k, v), part.stored, cache.lengths, index)
    return out.reshape(batch, length, heads, -1), cache.put(stored, layer)


def _context(cfg: ModelConfig, x: Array, segment_ids: Array | None, positions: Array | None) -> Context:
    """The context of a module that is used alone."""
    return make_context(cfg, from_zero(*x.shape[:2]) if positions is None else positions, segment_ids)
