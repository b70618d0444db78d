"""Sparse attention: MLA to the tokens that a lightning indexer chooses.

The indexer's equations are in `ops/indexer.py`, attention to chosen tokens in
`ops/sparse_attention.py`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import CacheKind, ModelConfig
from dsv3_jax.mesh.sharding import on_shards, shard_map_over_batch
from dsv3_jax.model.attention import MLA, Rows
from dsv3_jax.model.cache import ROW_AXES, Cache
from dsv3_jax.model.context import Context, from_zero
from dsv3_jax.model.layers import LayerNorm
from dsv3_jax.model.parameters import param
from dsv3_jax.ops import rope
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.indexer import divergence, round_rotated


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
        self, x: Float[Array, "B T D"], c_q: Float[Array, "B T Q"], ctx: Context
    ) -> dict[str, Array]:
        """Rows of each token, each of one head but for the queries.

        Returns: "index_query" [B, T, I, X], "index_key" [B, T, 1, X], "index_weight" [B, T, 1, I].
        """
        x, c_q = jax.lax.stop_gradient((x, c_q))
        q = ctx.run("product", c_q, self.w_iq[...])
        k = self.k_norm(ctx.run("product", x, self.w_ik[...]))
        w = ctx.run("product", x, self.w_iw[...])
        return {
            "index_query": self._rotate(q, ctx),
            "index_key": self._rotate(k[:, :, None], ctx),
            "index_weight": w[:, :, None],
        }

    def _rotate(self, x: Float[Array, "B T _ X"], ctx: Context) -> Float[Array, "B T _ X"]:
        """Rotate the first R numbers, and round as `index_precision` says."""
        cfg = self.cfg
        # In an indexer the rotated numbers come first, in MLA last.
        first, rest = jnp.split(x, [cfg.rope_head_dim], axis=-1)
        cos, sin = ctx.cos[:, :, None], ctx.sin[:, :, None]
        rotated = rope.rotate(first, cos, sin, interleaved=cfg.index_interleaved)
        x = jnp.concatenate([rotated, rest], axis=-1)
        if cfg.index_precision == "none":
            return x
        return round_rotated(x, cfg.index_precision == "fp8_ue8m0")

    def loss(
        self,
        queries: Mapping[str, Float[Array, "B T H _"]],
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

        def summed(_: tuple, arrays: dict, counted: Array) -> tuple:
            kl = divergence(**arrays, scale=scale)
            return (jnp.where(counted, kl, 0.0).sum(), counted.sum(dtype=kl.dtype)), ()

        # Index keys and latent rows have one head, which all query heads share.
        rows = ctx.rows
        arrays = {
            "q": rows["index_query"],
            "w": rows["index_weight"][:, :, 0],
            "index_keys": rows["index_key"][:, :, 0],
            "queries": list(queries.values()),
            "keys": [rows[name][:, :, 0] for name in queries],
            "ids": ids,
            "last": from_zero(*ctx.mask.shape),
            "segment_ids": ctx.segment_ids,
        }
        (total, count), _ = shard_map_over_batch(summed, ctx.mask)((), arrays, ctx.mask)

        # A microbatch is divided by the tokens of the complete batch.
        divisor = jnp.maximum(count, 1) if ctx.divisor is None else ctx.divisor
        return total / divisor


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
    ) -> tuple[Float[Array, "B T H X"], Rows]:
        q, rows = super().project(x, ctx)
        return q, {**rows, **self.indexer(x, rows["c_q"][:, :, 0], ctx)}

    def attend_to_rows(
        self, q: Float[Array, "B T H X"], ctx: Context
    ) -> tuple[Float[Array, "B T H V"], Context, dict[str, Array]]:
        watch = ctx.how.watch
        slots = ctx.mask.shape[1] if ctx.cache is None else ctx.cache.capacity
        if slots <= self.cfg.index_topk or "index_warm" in watch:
            # All tokens fit into a choice, or the indexer learns from attention to all of them.
            ids = None
            out, _, metrics = super().attend_to_rows(q, ctx._replace(chosen=None))
        else:
            # Choose, then attend to the choice as MLA does.
            cached = self.as_cached(ctx) if ctx.cache is None else ctx
            ids = self.choose(cached, self.has_indexer(ctx))
            out, _, metrics = super().attend_to_rows(q, cached._replace(chosen=ids))

        # What the indexer learns from: how far its scores are from attention's weights.
        if watch & {"index_warm", "index_sparse"}:
            kl = self.indexer.loss(self.absorb(q, ctx), ids, ctx, self.scale)
            metrics |= {"index_kl": jnp.where(self.has_indexer(ctx), kl, 0.0)}
        return out, ctx if ids is None else ctx._replace(chosen=ids), metrics

    def has_indexer(self, ctx: Context) -> Array:
        """bool []: whether the layer chooses; if not, it attends to the context's choice."""
        return jnp.array(True) if ctx.chosen is None else jnp.array(self.cfg.has_indexer)[ctx.layer]

    def as_cached(self, ctx: Context) -> Context:
        """The context with its own latent rows as the cache: long texts are read in that form."""
        rows = {name: ctx.rows[name] for name in self.cache_rows(self.cfg, "latent")}
        return ctx._replace(cache=Cache.of_rows(rows), layer=0)

    def choose(self, ctx: Context, chooses: Array) -> Int[Array, "B T k"]:
        """The tokens that the indexer chooses of the cache.

        Args: chooses: bool []; where it is False, the context's choice stays.
        """
        part, index = ctx.cache.place(ctx.layer)

        def local(
            stored: dict[str, Stored],
            lengths: Array,
            index: Array,
            q: Array,
            w: Array,
            segment_ids: Array | None,
            before: Array | None,
            chooses: Array,
        ) -> dict[str, Array]:
            cache = Cache([stored], lengths)
            key = cache.read(index)["index_key"]
            last = cache.positions(q.shape[1])

            def choose() -> Array:
                k = self.cfg.index_topk
                return ctx.run("index_choose", q, w, key, last, segment_ids, k=k)

            # A layer without an indexer keeps the choice of the last one that has it.
            if before is None:
                return {"ids": choose()}
            return {"ids": jax.lax.cond(chooses, choose, lambda: before)}

        by_token = ("batch", None, None)
        shards = {
            "stored": ({"index_key": ctx.cache.parts[part]["index_key"]}, ROW_AXES),
            "lengths": (ctx.cache.lengths, ("batch",)),
            "index": (index, ()),
            "q": (ctx.rows["index_query"], (*by_token, None)),
            "w": (ctx.rows["index_weight"][:, :, 0], by_token),
            "segment_ids": (ctx.segment_ids, ("batch", None)),
            "before": (ctx.chosen, by_token),
            "chooses": (chooses, ()),
        }
        return on_shards(local, shards, like={"ids": "w"})["ids"]
