"""Attention as modules: multi-head latent attention, and the plain attention beside it.

A kind of attention defines its weights, its queries and rows, and which rows a cache keeps. The
rest is shared: a layer projects, remembers its rows, attends, and projects back.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import CacheKind, Execution, ModelConfig, check_inputs, check_shapes
from dsv3_jax.config.fields import require
from dsv3_jax.mesh.heads import (
    HEAD_AXES,
    TOKEN_AXES,
    attend_with_own_heads,
    own_heads,
    to_heads,
    to_tokens,
)
from dsv3_jax.mesh.length import check_attention
from dsv3_jax.mesh.sharding import constrain, on_mesh, on_shards
from dsv3_jax.model.cache import ROW_AXES, Cache
from dsv3_jax.model.context import Context, LayerResult, from_zero, how_of, make_context
from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.parameters import draws_together, param
from dsv3_jax.ops import rope
from dsv3_jax.ops.cached_attention import Stored

LATENT_NORM_EPS = 1e-6  # whatever norm_eps says, as in the reference implementations
# by name, what may be cached of each token: key-value heads, numbers of each
Rows = Mapping[str, Float[Array, "B T _ _"]]


class Attention(nnx.Module):
    """What all kinds share. Usable alone: `attention(x)`.

    A kind of one's own is a subclass, of this or of another kind, that `ds.register_attention`
    adds. It defines:

        make_weights    draws its weights by `model.parameters.param`, with the names of their axes:
                        a mesh, LoRA, Muon and muP read them. w_o, [H, V, D], is made here
        project         queries [B, T, H, X], and each token's rows [B, T, G, …] by name.
                        `rotate` applies RoPE to the last R numbers of each head
        expand          "k" [B, T, G, X] and "v" [B, T, G, V], where `project` gives other rows.
                        G divides H
        cache_rows      what a cache keeps. "k" of the kind "expanded" has the width X, which
                        `scale`, counts and plans use. The default: cfg.kv_heads heads, X = N + R
        has_latent      True if there is a smaller cache of kind "latent", too. Then
                        `attend_to_rows` attends to its rows, as MLA does

    It then trains, is evaluated and decodes, on a mesh too. It has no released format and is not in
    `reference.py`; QK-clip and indexers are for the kinds that they name.
    """

    has_latent: ClassVar[bool] = False

    @draws_together
    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.make_weights(cfg, rngs)
        heads_to_dim = (cfg.num_heads, cfg.v_head_dim, cfg.dim)
        self.w_o = param(rngs, heads_to_dim, ("heads", None, "dim"), cfg.init_std)
        self.cfg = cfg
        rows = self.cache_rows(cfg, "expanded")
        require("k" in rows, f"{type(self).__name__}.cache_rows has {[*rows]}, and no 'k'")
        _, width = rows["k"]
        self.scale = rope.softmax_scale(width, cfg.yarn)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        execution: Execution | None = None,
    ) -> Float[Array, "B T D"]:
        """Attend to earlier tokens of the same segment.

        Args:
            positions: None means 0, 1, …
            execution: which kernels compute; None means the best of the default device.
        Raises: ValueError if a shape is wrong.
        """
        check_inputs(self.cfg.dim, x=x, segment_ids=segment_ids, positions=positions)
        positions = from_zero(*x.shape[:2]) if positions is None else positions
        ctx = make_context(self.cfg, positions, segment_ids, how=how_of(execution))
        return self.attend(x, ctx)[0]

    def attend(self, x: Float[Array, "B T D"], ctx: Context) -> LayerResult:
        """Attend to earlier tokens: to those of x, or to those of the context's cache and of x.

        Returns: (output [B, T, D]; the context with these tokens' rows, also in its cache;
            metrics).
        """
        # A kind with an `attend_to_rows` of its own may need all heads, or complete rows, at once.
        by_heads = type(self).attend_to_rows in (Attention.attend_to_rows, MLA.attend_to_rows)
        check_attention(self.cfg, ctx.how.layout, decodes=ctx.how.mode == "decode", splits=by_heads)
        with jax.named_scope(type(self).__name__):
            # Each token's queries and rows. Where a mesh shards the length, a device then gets all
            # tokens of its own heads.
            q, rows = self.project(x, ctx)
            q, rows = to_heads(
                q, rows, self.cache_rows(self.cfg, "latent" if self.has_latent else "expanded")
            )

            # Keys and values of every head are formed where they are read: without a cache, and for
            # one that keeps them.
            if ctx.cache is None or "k" in ctx.cache.parts[0]:
                rows = {**rows, **self.expand(rows, ctx)}
            self.check_rows(q, rows)
            ctx = ctx._replace(rows=rows)
            if ctx.cache is not None:
                ctx = remember(ctx)

            # Heads' means of values, and back to the width of the hidden state.
            out, ctx, metrics = self.attend_to_rows(q, ctx)
            return ctx.run("product", to_tokens(out), self.w_o[...], axes=2), ctx, metrics

    @classmethod
    def cache_rows(cls, cfg: ModelConfig, kind: CacheKind) -> dict[str, tuple[int, int]]:
        """What a cache of this kind keeps: (key-value heads, numbers a row) by the rows' names."""
        return {
            "k": (cfg.kv_heads, cfg.nope_head_dim + cfg.rope_head_dim),
            "v": (cfg.kv_heads, cfg.v_head_dim),
        }

    def check_rows(self, q: Array, rows: Rows) -> None:
        """Check queries and rows by `cache_rows`. Raises: ConfigError naming one that differs."""
        wanted = self.cache_rows(self.cfg, "expanded" if "k" in rows else "latent")
        shapes = {name: (*q.shape[:2], *each) for name, each in wanted.items()}
        width = self.cache_rows(self.cfg, "expanded")["k"][1]
        shapes["q"] = (*q.shape[:2], self.cfg.num_heads, width)
        check_shapes(type(self).__name__, {**rows, "q": q}, shapes)

    def make_weights(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        """Draw all weights but w_o."""
        raise NotImplementedError

    def project(
        self, x: Float[Array, "B T D"], ctx: Context
    ) -> tuple[Float[Array, "B T H X"], Rows]:
        """(Queries, the rows of each token)."""
        raise NotImplementedError

    def rotate(self, x: Float[Array, "B T H X"], ctx: Context) -> Float[Array, "B T H X"]:
        """Rotate the last R numbers of each head."""
        cos, sin = ctx.cos[:, :, None], ctx.sin[:, :, None]
        return ctx.run("rotate_last", x, cos, sin, interleaved=self.cfg.rope_interleaved)

    def expand(self, rows: Rows, ctx: Context) -> Rows:
        """The keys "k" and values "v" of each token, where its rows are others."""
        return {}

    def attend_to_rows(
        self, q: Float[Array, "B T H X"], ctx: Context
    ) -> tuple[Float[Array, "B T H V"], Context, dict[str, Array]]:
        """Attend to the context's rows, or to its cache, which holds them too.

        Returns: (output, the context, metrics).
        """
        if ctx.cache is None:
            return attend_causally(q, ctx, self.scale)
        return attend_to_cache({"k": q}, "v", ctx, self.scale), ctx, {}


class MLA(Attention):
    """Multi-head latent attention.

    c_q = norm(x W_dq), q = c_q W_uq;  [c_kv, k_rope] = x W_dkv, c_kv = norm(c_kv);
    k = [c_kv W_ukᵀ, k_rope], v = c_kv W_uvᵀ, with W_uk [H, N, C] and W_uv [H, V, C].
    With a latent cache, W_uk is absorbed into the queries and W_uv into the output, see
    `ops/mla.py`.
    Source: DeepSeek-V2 report, section 2.1.
    Departs from the paper: no extra scaling at the bottlenecks; the released code has none either.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> attention = ds.MLA(ds.preset("tiny"), rngs=nnx.Rngs(0))
    >>> jax.jit(attention)(jnp.ones((2, 8, 128))).shape
    (2, 8, 128)
    """

    has_latent = True

    @classmethod
    def cache_rows(cls, cfg: ModelConfig, kind: CacheKind) -> dict[str, tuple[int, int]]:
        if kind == "latent":
            return {"latent": (1, cfg.kv_latent_dim), "k_rope": (1, cfg.rope_head_dim)}
        return super().cache_rows(cfg, kind)

    def make_weights(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        dim, heads, std = cfg.dim, cfg.num_heads, cfg.init_std
        qk_dim = cfg.nope_head_dim + cfg.rope_head_dim

        # queries: straight, or down to a latent and up to the heads
        if cfg.q_latent_dim is None:
            self.w_q = param(rngs, (dim, heads, qk_dim), ("dim", "heads", None), std)
        else:
            self.w_dq = param(rngs, (dim, cfg.q_latent_dim), ("dim", None), std)
            self.q_norm = RMSNorm(cfg.q_latent_dim, LATENT_NORM_EPS)
            self.w_uq = param(
                rngs, (cfg.q_latent_dim, heads, qk_dim), ("latent", "heads", None), std
            )

        # keys and values: down to one latent and one rotated key, which all heads share
        self.w_dkv = param(rngs, (dim, cfg.kv_latent_dim + cfg.rope_head_dim), ("dim", None), std)
        self.kv_norm = RMSNorm(cfg.kv_latent_dim, LATENT_NORM_EPS)

        # and up from the latent to each head's key and value
        up = ("heads", None, "latent")
        self.w_uk = param(rngs, (heads, cfg.nope_head_dim, cfg.kv_latent_dim), up, std)
        self.w_uv = param(rngs, (heads, cfg.v_head_dim, cfg.kv_latent_dim), up, std)

    def project(
        self, x: Float[Array, "B T D"], ctx: Context
    ) -> tuple[Float[Array, "B T H X"], Rows]:
        with jax.named_scope("queries"):
            if self.cfg.q_latent_dim is None:
                c_q = x
                q = ctx.run("product", x, self.w_q[...])
            else:
                c_q = self.q_norm(ctx.run("product", x, self.w_dq[...]))
                q = ctx.run("product", c_q, self.w_uq[...])
            q = self.rotate(constrain(q, *TOKEN_AXES), ctx)

        with jax.named_scope("latents"):
            both = ctx.run("product", x, self.w_dkv[...])[:, :, None]  # one head, which all read
            c_kv, k_rope = jnp.split(both, [self.cfg.kv_latent_dim], axis=-1)
            rows = {"latent": self.kv_norm(c_kv), "k_rope": self.rotate(k_rope, ctx)}
        return q, {**rows, "c_q": c_q[:, :, None]}  # c_q is for an indexer, see `sparse.DSA`

    def expand(self, rows: Rows, ctx: Context) -> Rows:
        latent, k_rope = rows["latent"][:, :, 0], rows["k_rope"][:, :, 0]
        w_uk, w_uv = own_heads(self.w_uk[...]), own_heads(self.w_uv[...])
        k, v = ctx.run("expand", latent, k_rope, w_uk, w_uv)
        return {"k": k, "v": v}

    def attend_to_rows(
        self, q: Float[Array, "B T H X"], ctx: Context
    ) -> tuple[Float[Array, "B T H V"], Context, dict[str, Array]]:
        if ctx.cache is None:
            return attend_causally(q, ctx, self.scale)
        if "latent" not in ctx.cache.parts[0]:
            return super().attend_to_rows(q, ctx)
        latent = attend_to_cache(self.absorb(q, ctx), "latent", ctx, self.scale)
        return self.up(latent, ctx), ctx, {}

    def absorb(
        self, q: Float[Array, "B T H X"], ctx: Context
    ) -> dict[str, Float[Array, "B T H _"]]:
        """Turn queries into those of the latent rows: {"latent": q_nope W_uk, "k_rope": q_rope}."""
        q_nope, q_rope = jnp.split(q, [self.cfg.nope_head_dim], axis=-1)

        # q_nope · k_nope = (q_nope W_uk) · c_kv: no head's keys are formed.
        w_uk = self.w_uk[...].astype(q.dtype)
        return {"latent": ctx.run("product_by_head", q_nope, w_uk), "k_rope": q_rope}

    def up(self, out: Float[Array, "B T H C"], ctx: Context) -> Float[Array, "B T H V"]:
        """Turn each head's mean of latents into its mean of values."""
        # Both are linear: the mean of values is the mean latent times W_uvᵀ. No values are formed.
        w_uv = self.w_uv[...].astype(out.dtype)
        return ctx.run("product_by_head", out, w_uv, transposed=True)


class GQA(Attention):
    """Attention with `kv_heads` heads of keys and values: MHA has one a query head, MQA just one.

    The baseline for MLA. Heads have MLA's widths: N + R numbers of a query or key, of which R are
    rotated, and V of a value. With `qk_norm`, q and k are normed in each head before they are
    rotated; heads share the scales.
    Source: arXiv 1706.03762 (MHA), 1911.02150 (MQA), 2305.13245 (GQA), 2302.05442 (q's, k's norms).

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> cfg = ds.replace(ds.preset("tiny"), attention="gqa", num_kv_heads=2)
    >>> jax.jit(ds.GQA(cfg, rngs=nnx.Rngs(0)))(jnp.ones((2, 8, 128))).shape
    (2, 8, 128)
    """

    def make_weights(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        qk_dim = cfg.nope_head_dim + cfg.rope_head_dim
        axes = ("dim", "heads", None)
        std = cfg.init_std
        self.w_q = param(rngs, (cfg.dim, cfg.num_heads, qk_dim), axes, std)
        self.w_k = param(rngs, (cfg.dim, cfg.kv_heads, qk_dim), axes, std)
        self.w_v = param(rngs, (cfg.dim, cfg.kv_heads, cfg.v_head_dim), axes, std)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(qk_dim, cfg.norm_eps), RMSNorm(qk_dim, cfg.norm_eps)

    def project(
        self, x: Float[Array, "B T D"], ctx: Context
    ) -> tuple[Float[Array, "B T H X"], Rows]:
        q, k, v = (ctx.run("product", x, w[...]) for w in (self.w_q, self.w_k, self.w_v))
        q, k, v = (constrain(y, *TOKEN_AXES) for y in (q, k, v))
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.rotate(q, ctx), {"k": self.rotate(k, ctx), "v": v}


def attend_causally(
    q: Float[Array, "B T H X"], ctx: Context, scale: float
) -> tuple[Float[Array, "B T H V"], Context, dict[str, Array]]:
    """Attend to the keys and values of the context's own rows.

    Returns: (the result, the context, metrics: each head's largest logit, [H], if it is watched).
    """
    watched = "max_logit" in ctx.how.watch
    attend = partial(ctx.run, "causal_attention", scale=scale, maxima=watched)
    if on_mesh():
        attend = partial(attend_with_own_heads, attend, maxima=watched)
    found = attend(q, ctx.rows["k"], ctx.rows["v"], segment_ids=ctx.segment_ids)
    if not watched:
        return found, ctx, {}

    # A head's largest logit over all queries that are not padding.
    out, maxima = found
    counted = jnp.where(ctx.mask[:, :, None], maxima, -jnp.inf)
    return out, ctx, {"max_logit": counted.max((0, 1))}


def remember(ctx: Context) -> Context:
    """The context whose cache has its rows, behind each sequence's own. Lengths stay."""
    part, index = ctx.cache.place(ctx.layer)

    def local(
        stored: dict[str, Stored], rows: dict[str, Array], lengths: Array, index: Array
    ) -> dict[str, Any]:
        written = Cache([stored], lengths).write(rows, index, ctx.how.kernels)
        return {"stored": written.parts[0]}

    stored = ctx.cache.parts[part]
    shards = {
        "stored": (stored, ROW_AXES),
        "rows": ({name: ctx.rows[name] for name in stored}, HEAD_AXES),
        "lengths": (ctx.cache.lengths, ("batch",)),
        "index": (index, ()),
    }
    stored = on_shards(local, shards, like={"stored": "stored"})["stored"]
    return ctx._replace(cache=ctx.cache.with_part(part, stored))


def attend_to_cache(
    queries: Mapping[str, Float[Array, "B T H _"]], values: str, ctx: Context, scale: float
) -> Float[Array, "B T H V"]:
    """Attend to the cache: to all that a token may see, or to the tokens that `ctx.chosen` names.

    On a mesh, each device does so for its own sequences and heads.

    Args:
        queries: by the name of the cached array that they are multiplied with; scores are summed.
        values: the name of the array of values.
    """
    part, index = ctx.cache.place(ctx.layer)
    batch, length, heads, _ = next(iter(queries.values())).shape
    groups, width = ctx.rows[values].shape[2:]  # in a cache, rows may be padded
    names = list(queries)  # in the kernels' order; a mesh hands them on by letter
    dense = ctx.chosen is None

    def local(
        stored: dict[str, Stored],
        lengths: Array,
        index: Array,
        chosen: Array | None,
        **queries: Array,
    ) -> dict[str, Array]:
        cache = Cache([stored], lengths)
        arrays = cache.read(index)
        own = [queries[name] for name in names]
        to = ([arrays[name] for name in names], arrays[values])
        if chosen is not None:
            out = ctx.run("sparse_attention", own, *to, chosen, scale=scale)
            return {"out": out[..., :width]}

        # Query heads of one key-value head are queries of one sequence, after one another.
        some, _, own_groups, each, _ = own[0].shape
        by_group = [q.swapaxes(1, 2).reshape(some, own_groups, length * each, -1) for q in own]
        last = jnp.repeat(cache.positions(length), each, axis=1)
        out = ctx.run("cached_attention", by_group, *to, last, scale=scale)[..., :width]
        return {"out": out.reshape(some, own_groups, length, each, width).swapaxes(1, 2)}

    # A mesh shards query heads as their key-value heads; or the queries of a single group.
    by_head = ("heads", None) if groups > 1 else (None, "heads")
    shards = {
        "stored": (ctx.cache.parts[part], ROW_AXES),
        "lengths": (ctx.cache.lengths, ("batch",)),
        "index": (index, ()),
        "chosen": (ctx.chosen, ("batch", None, None)),
    }
    for name, q in queries.items():
        grouped = q.reshape(batch, length, groups, heads // groups, -1)
        shards[name] = (grouped, ("batch", None, *by_head, None))
    out = on_shards(local, shards, like={"out": names[0]}, has_kernel=dense)["out"]
    return out.reshape(batch, length, heads, width)
