"""Attention as modules: multi-head latent attention, and the plain ones it is compared with.

A kind of attention defines its weights, its queries and rows, and which rows a cache keeps. The
rest is shared.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import CacheKind, Execution, ModelConfig, check_inputs
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.mesh.sharding import constrain, shard_map_by_names, shards_alike
from dsv3_jax.model.cache import ROW_AXES, Cache
from dsv3_jax.model.context import Context, LayerResult, from_zero, make_context
from dsv3_jax.model.indexer import Indexer
from dsv3_jax.model.layers import RMSNorm, draws_together, param
from dsv3_jax.ops import rope
from dsv3_jax.ops.attention import repeat_heads
from dsv3_jax.ops.cached_attention import Stored

LATENT_NORM_EPS = 1e-6  # whatever norm_eps says, as in the reference implementations
HEAD_AXES = ("batch", None, "heads", None)  # how a mesh shards arrays with heads
# by name, what may be cached of each token: G key-value heads
Rows = Mapping[str, Float[Array, "B T _ _"]]


class Attention(nnx.Module):
    """What all kinds share. Usable alone: `attention(x)`.

    Args: execution, kernels: how to compute; `kernels` defaults to the best of the default device.
    """

    @draws_together
    def __init__(
        self,
        cfg: ModelConfig,
        execution: Execution | None = None,
        *,
        rngs: nnx.Rngs,
        kernels: Kernels | None = None,
    ):
        self.make_weights(cfg, rngs)
        self.w_o = param(
            rngs, (cfg.num_heads, cfg.v_head_dim, cfg.dim), ("heads", None, "dim"), cfg.init_std
        )
        self.cfg = cfg
        self.kernels = kernels or prepare(execution)
        self.scale = rope.softmax_scale(cfg.nope_head_dim + cfg.rope_head_dim, cfg.yarn)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attend to earlier tokens of the same segment. Positions default to 0, 1, …

        Raises: ValueError if the shapes are others.
        """
        check_inputs(self.cfg.dim, x=x, segment_ids=segment_ids, positions=positions)
        positions = from_zero(*x.shape[:2]) if positions is None else positions
        return self.attend(x, make_context(self.cfg, positions, segment_ids))[0]

    def attend(self, x: Float[Array, "B T D"], ctx: Context) -> LayerResult:
        """Attend to earlier tokens: to those of x, or to those of the context's cache and of x.

        Returns: (output [B, T, D], the context with the cache, or with the rows of these tokens for
            a cache; metrics).
        """
        with jax.named_scope(type(self).__name__):
            q, rows = self.project(x, ctx)
            if ctx.cache is None:
                out, ctx, metrics = self.attend_to_new(q, {**rows, **self.expand(rows)}, ctx)
            else:
                (out, ctx), metrics = self.attend_to_cache(q, rows, ctx), {}
            y = self.kernels("product", constrain(out, *HEAD_AXES), self.w_o[...], axes=2)
            return y, ctx, metrics

    @classmethod
    def cache_rows(cls, cfg: ModelConfig, kind: CacheKind) -> dict[str, tuple[int, int]]:
        """(Key-value heads, numbers a row) of each array that such a cache keeps, by name."""
        return {
            "k": (cfg.kv_heads, cfg.nope_head_dim + cfg.rope_head_dim),
            "v": (cfg.kv_heads, cfg.v_head_dim),
        }

    def make_weights(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        """Draw all weights but w_o."""
        raise NotImplementedError

    def project(
        self, x: Float[Array, "B T D"], ctx: Context
    ) -> tuple[Float[Array, "B T H K"], Rows]:
        """(Queries, the rows of each token)."""
        raise NotImplementedError

    def rotate(self, x: Float[Array, "B T H K"], ctx: Context) -> Float[Array, "B T H K"]:
        """Rotate the last R numbers of each head."""
        angles = ctx.cos[:, :, None], ctx.sin[:, :, None]
        return self.kernels("rotate_last", x, *angles, interleaved=self.cfg.rope_interleaved)

    def expand(self, rows: Rows) -> Rows:
        """The keys "k" and values "v" of each token, where its rows are others."""
        return {}

    def attend_to_new(self, q: Float[Array, "B T H K"], rows: Rows, ctx: Context) -> LayerResult:
        """Without a cache: (output [B, T, H, V], the context with the rows, metrics)."""
        out, metrics = attend_causally(self, q, rows["k"], rows["v"], ctx)
        return out, ctx._replace(rows=rows), metrics

    def attend_to_cache(
        self, q: Float[Array, "B T H K"], rows: Rows, ctx: Context
    ) -> tuple[Array, Context]:
        """(Output [B, T, H, V], the context whose cache has these tokens' rows)."""
        return self.attend_to_rows({"k": q}, "v", {**rows, **self.expand(rows)}, ctx)

    def attend_to_rows(
        self, queries: Mapping[str, Float[Array, "B T H _"]], values: str, rows: Rows, ctx: Context
    ) -> tuple[Float[Array, "B T H V"], Context]:
        """See the function of this name."""
        return attend_to_rows(self, queries, values, rows, ctx)


class MLA(Attention):
    """Multi-head latent attention.

    c_q = norm(x W_dq), q = c_q W_uq;  [c_kv, k_rope] = x W_dkv, c_kv = norm(c_kv);
    k = c_kv W_uk, v = c_kv W_uv.
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

    @classmethod
    def cache_rows(cls, cfg: ModelConfig, kind: CacheKind) -> dict[str, tuple[int, int]]:
        if kind == "latent":
            return {"latent": (1, cfg.kv_latent_dim), "k_rope": (1, cfg.rope_head_dim)}
        return super().cache_rows(cfg, kind)

    def make_weights(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        dim, heads, std = cfg.dim, cfg.num_heads, cfg.init_std
        qk_dim = cfg.nope_head_dim + cfg.rope_head_dim
        if cfg.q_latent_dim is None:
            self.w_q = param(rngs, (dim, heads, qk_dim), ("dim", "heads", None), std)
        else:
            self.w_dq = param(rngs, (dim, cfg.q_latent_dim), ("dim", None), std)
            self.q_norm = RMSNorm(cfg.q_latent_dim, LATENT_NORM_EPS)
            self.w_uq = param(
                rngs, (cfg.q_latent_dim, heads, qk_dim), ("latent", "heads", None), std
            )
        self.w_dkv = param(rngs, (dim, cfg.kv_latent_dim + cfg.rope_head_dim), ("dim", None), std)
        self.kv_norm = RMSNorm(cfg.kv_latent_dim, LATENT_NORM_EPS)
        self.w_uk = param(
            rngs, (heads, cfg.nope_head_dim, cfg.kv_latent_dim), ("heads", None, "latent"), std
        )
        self.w_uv = param(
            rngs, (heads, cfg.v_head_dim, cfg.kv_latent_dim), ("heads", None, "latent"), std
        )

    def project(
        self, x: Float[Array, "B T D"], ctx: Context
    ) -> tuple[Float[Array, "B T H K"], Rows]:
        product = partial(self.kernels, "product")
        cfg = self.cfg
        c_q = x if cfg.q_latent_dim is None else self.q_norm(product(x, self.w_dq[...]))
        q = product(c_q, (self.w_q if cfg.q_latent_dim is None else self.w_uq)[...])
        c_kv, k_rope = jnp.split(
            product(x, self.w_dkv[...])[:, :, None], [cfg.kv_latent_dim], axis=-1
        )
        rows = {
            "latent": self.kv_norm(c_kv),
            "k_rope": self.rotate(k_rope, ctx),
            "c_q": c_q[:, :, None],
        }
        return self.rotate(constrain(q, *HEAD_AXES), ctx), rows

    def expand(self, rows: Rows) -> Rows:
        latent, k_rope = rows["latent"][:, :, 0], rows["k_rope"][:, :, 0]
        expanded = self.kernels("expand", latent, k_rope, self.w_uk[...], self.w_uv[...])
        return dict(zip("kv", expanded, strict=True))

    def attend_to_cache(
        self, q: Float[Array, "B T H K"], rows: Rows, ctx: Context
    ) -> tuple[Array, Context]:
        if "latent" not in ctx.cache.parts[0]:
            return super().attend_to_cache(q, rows, ctx)
        out, ctx = self.attend_to_rows(self.absorb(q), "latent", rows, ctx)
        return self.up(out), ctx

    def absorb(self, q: Float[Array, "B T H K"]) -> dict[str, Float[Array, "B T H _"]]:
        """The queries of latent rows."""
        q_nope, q_rope = jnp.split(q, [self.cfg.nope_head_dim], axis=-1)
        return {
            "latent": self.kernels("product_by_head", q_nope, self.w_uk[...].astype(q.dtype)),
            "k_rope": q_rope,
        }

    def up(self, out: Float[Array, "B T H C"]) -> Float[Array, "B T H V"]:
        """The values of attention's means of latents."""
        return self.kernels(
            "product_by_head", out, self.w_uv[...].astype(out.dtype), transposed=True
        )


class DSA(MLA):
    """Sparse attention: MLA of a query to the `index_topk` tokens that a lightning indexer chooses.

    A cache has one more array, the index keys. Where no text is longer than `index_topk`, it is MLA
    itself. Longer texts are read in absorbed form, with or without a cache, see
    `ops/sparse_attention.py`. Choosing takes no gradient: the indexer learns from the metric
    "index_kl" alone, if the context watches it. `index_sparse` compares it with attention over the
    chosen tokens, and `index_warm` with dense attention, which is then the result too.
    Source: DeepSeek-V3.2 report, section 2.1.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> sizes = dict(index_heads=4, index_dim=32, index_topk=4)
    >>> cfg = ds.replace(ds.preset("tiny"), attention="dsa", **sizes)
    >>> jax.jit(DSA(cfg, rngs=nnx.Rngs(0)))(jnp.ones((2, 8, 128))).shape
    (2, 8, 128)
    """

    @classmethod
    def cache_rows(cls, cfg: ModelConfig, kind: CacheKind) -> dict[str, tuple[int, int]]:
        return super().cache_rows(cfg, kind) | {"index_key": (1, cfg.index_dim)}

    def make_weights(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        super().make_weights(cfg, rngs)
        self.indexer = Indexer(cfg, rngs)

    def project(
        self, x: Float[Array, "B T D"], ctx: Context
    ) -> tuple[Float[Array, "B T H K"], Rows]:
        q, rows = super().project(x, ctx)
        return q, {**rows, **self.indexer(x, rows["c_q"][:, :, 0], ctx, self.kernels)}

    def has_indexer(self, ctx: Context) -> Array:
        """bool []: whether the layer chooses; if not, it attends to the context's choice."""
        return jnp.array(True) if ctx.chosen is None else jnp.array(self.cfg.has_indexer)[ctx.layer]

    def attend_to_new(self, q: Float[Array, "B T H K"], rows: Rows, ctx: Context) -> LayerResult:
        watch = ctx.options.watch
        ids = None
        own = self.has_indexer(ctx)
        if q.shape[1] <= self.cfg.index_topk or "index_warm" in watch:
            out, ctx, metrics = super().attend_to_new(q, rows, ctx)
        else:
            latent, ctx = self.attend_to_rows(self.absorb(q), "latent", rows, ctx)
            out = self.up(latent)
            ids = ctx.chosen
            metrics = {}
        if watch & {"index_warm", "index_sparse"}:
            kl = self.indexer.loss(self.absorb(q), rows, ids, ctx, self.scale)
            metrics |= {"index_kl": jnp.where(own, kl, 0.0)}
        return out, ctx, metrics

    def attend_to_rows(
        self, queries: Mapping[str, Float[Array, "B T H _"]], values: str, rows: Rows, ctx: Context
    ) -> tuple[Float[Array, "B T H V"], Context]:
        if ctx.cache is not None and ctx.cache.capacity <= self.cfg.index_topk:
            return super().attend_to_rows(queries, values, rows, ctx)
        return attend_to_chosen(self, queries, values, rows, ctx)


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
    ) -> tuple[Float[Array, "B T H K"], Rows]:
        q, k, v = (self.kernels("product", x, w[...]) for w in (self.w_q, self.w_k, self.w_v))
        q, k, v = (constrain(y, *HEAD_AXES) for y in (q, k, v))
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.rotate(q, ctx), {"k": self.rotate(k, ctx), "v": v}


ATTENTION: dict[str, type[Attention]] = {"mla": MLA, "dsa": DSA, "mha": GQA, "gqa": GQA, "mqa": GQA}


def attend_causally(
    module: Attention,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    ctx: Context,
) -> tuple[Float[Array, "B T H V"], dict[str, Array]]:
    """`ops.attention.causal_attention`; each device of a mesh takes its own sequences and heads.

    Returns: (the result, metrics: each head's largest logit, [H], if the context watches them).
    """
    segment_ids = ctx.segment_ids
    watched = "max_logit" in ctx.options.watch
    kernel = partial(module.kernels, "causal_attention", scale=module.scale)

    def attend(q, k, v, segment_ids=None):
        if not watched:
            return (kernel(q, k, v, segment_ids=segment_ids),)
        out, maxima = kernel(q, k, v, segment_ids=segment_ids, maxima=True)
        return out, maxima[..., None]

    if not shards_alike(HEAD_AXES, q.shape, k.shape):
        k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))
    names = [HEAD_AXES] * 3
    args = [q, k, v]
    if segment_ids is not None:
        names = [*names, ("batch", None)]
        args = [*args, segment_ids]
    out, *maxima = shard_map_by_names(attend, names, (0, 0)[: 1 + watched], *args, has_kernel=True)
    maxima = [jnp.where(ctx.mask[:, :, None, None], x, -jnp.inf) for x in maxima]  # without padding
    return out, {"max_logit": maxima[0].max((0, 1, 3))} if maxima else {}


def attend_to_rows(
    module: Attention,
    queries: Mapping[str, Float[Array, "B T H _"]],
    values: str,
    rows: Rows,
    ctx: Context,
) -> tuple[Float[Array, "B T H V"], Context]:
    """Cache T tokens' rows, then attend to the cache; each device its own sequences and heads.

    Args:
        queries: by the name of the cached array that they are multiplied with; scores are summed.
        values: the name of the array of values.
        rows: of these tokens.
    Returns: (the result, the context whose cache has the rows).
    """
    cache, kernels = ctx.cache, module.kernels
    part, index = cache.place(ctx.layer)
    batch, length, heads, _ = next(iter(queries.values())).shape
    groups, width = rows[values].shape[2:]
    kept = {name: rows[name] for name in cache.parts[part]}

    def attend(stored, kept, lengths, index, *queries_of):
        local = Cache([stored], lengths).write(kept, index, kernels)
        arrays = local.read(index)
        some, _, own_groups, each, _ = queries_of[0].shape  # sequences and heads of this device
        by_group = [
            q.swapaxes(1, 2).reshape(some, own_groups, length * each, -1) for q in queries_of
        ]
        last = jnp.repeat(local.positions(length), each, axis=1)
        keys = [arrays[name] for name in queries]
        out = kernels("cached_attention", by_group, keys, arrays[values], last, scale=module.scale)
        out = out[..., :width].reshape(some, own_groups, length, each, width)
        return local.parts[0], out.swapaxes(1, 2)

    # Query heads are grouped by key-value head. A mesh shards both alike, or one group's queries.
    axes = (
        ("batch", None, "heads", None, None) if groups > 1 else ("batch", None, None, "heads", None)
    )
    grouped = [q.reshape(batch, length, groups, heads // groups, -1) for q in queries.values()]
    names = (ROW_AXES, HEAD_AXES, ("batch",), (), *[axes] * len(grouped))
    stored, out = shard_map_by_names(
        attend, names, (0, 4), cache.parts[part], kept, cache.lengths, index, *grouped
    )
    ctx = ctx._replace(cache=cache.with_part(part, stored))
    return out.reshape(batch, length, heads, width), ctx


def attend_to_chosen(
    module: DSA,
    queries: Mapping[str, Float[Array, "B T H _"]],
    values: str,
    rows: Rows,
    ctx: Context,
) -> tuple[Float[Array, "B T H V"], Context]:
    """As `attend_to_rows`, to the tokens that the layer's indexer, or one before it, chooses.

    Without a cache it attends to the rows themselves. The context then has the choice, and the rows
    or the cache.
    """
    cache = ctx.cache
    kernels = module.kernels
    before = ctx.chosen
    topk = module.cfg.index_topk
    part, index = (None, None) if cache is None else cache.place(ctx.layer)
    batch, length, heads, _ = next(iter(queries.values())).shape
    groups, width = rows[values].shape[2:]

    def attend(stored, kept, lengths, index, segment_ids, own, before, q, w, *queries_of):
        if cache is None:
            arrays = {name: Stored(x.swapaxes(1, 2), None) for name, x in kept.items()}
            last = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), q.shape[:2])
        else:
            local = Cache([stored], lengths).write(kept, index, kernels)
            arrays = local.read(index)
            last = local.positions(length)
            stored = local.parts[0]

        def choose():
            return kernels("index_choose", q, w, arrays["index_key"], last, segment_ids, k=topk)

        ids = choose() if before is None else jax.lax.cond(own, choose, lambda: before)
        keys = [arrays[name] for name in queries]
        out = kernels(
            "sparse_attention", list(queries_of), keys, arrays[values], ids, scale=module.scale
        )
        return stored, ids, out[..., :width]

    by_row, tokens = ("batch", None, None), ("batch", None)
    axes = (
        ("batch", None, "heads", None, None) if groups > 1 else ("batch", None, None, "heads", None)
    )
    grouped = [q.reshape(batch, length, groups, heads // groups, -1) for q in queries.values()]
    read = cache.parts[part] if cache else {*queries, values, "index_key"}
    kept = {name: rows[name] for name in read}
    stored, lengths = (cache.parts[part], cache.lengths) if cache else (None, None)
    names = (
        ROW_AXES, HEAD_AXES, ("batch",), (), tokens, (), by_row, (*by_row, None), by_row,
        *[axes] * len(grouped),
    )  # fmt: skip
    stored, ids, out = shard_map_by_names(
        attend, names, (0, 8, 9), stored, kept, lengths, index, ctx.segment_ids,
        module.has_indexer(ctx), before, rows["index_query"], rows["index_weight"][:, :, 0],
        *grouped,
    )  # fmt: skip
    kept_in = {"rows": rows} if cache is None else {"cache": cache.with_part(part, stored)}
    return out.reshape(batch, length, heads, width), ctx._replace(chosen=ids, **kept_in)
