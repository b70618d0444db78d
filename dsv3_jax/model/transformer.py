"""The whole model: embedding, dense layers, sparse layers, norm, head, and the multi-token heads on the side."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.cpu import calls
from dsv3_jax.mesh.sharding import by_rows, on_mesh, whole
from dsv3_jax.model.attention import from_zero, places, positions_of
from dsv3_jax.model.blocks import DenseBlock, SparseBlock
from dsv3_jax.model.cache import Cache, Kind
from dsv3_jax.model.layers import RMSNorm, param, scan_stack, stack, unstack
from dsv3_jax.model.moe import Experts, LayerRouting, end_thread
from dsv3_jax.model.mtp import make_heads, run_heads
from dsv3_jax.ops.dispatch import WideExperts, side_by_side
from dsv3_jax.ops.products import few_rows_product


class Trace(NamedTuple):
    """What a forward pass leaves behind, before any head: the training loss and prefill are made from it."""

    x: Array  # [B, T, D]: the last layer's output
    h: Array  # [B, T, D]: the same after the final norm
    mtp_h: tuple[Array, ...]  # head k (from 0): [B, T-1-k, D], for the shared unembedding; entry i predicts token i+k+2
    routing: LayerRouting | None  # of the trunk's sparse layers, stacked along a leading axis
    mtp_routing: tuple[LayerRouting, ...]  # of the heads that have experts
    cache_rows: Array  # [L, B, G, T, X]: what a cache remembers, see `cache.py`


SMALL_EXPERTS = 1 << 19  # numbers in one matrix of all a layer's experts: 2 MB, a core's cache
UNROLLED = 16  # layers of a model that decoding goes through one by one: more take too long to compile


class Ready(NamedTuple):
    """Weights as decoding wants them: each layer's by itself, which a loop over a stack would copy every step.

    Small experts lie side by side, where no native kernel reads them.
    """

    dense: list[nnx.State]
    sparse: list[nnx.State]
    experts: list[WideExperts | None]  # of the sparse layers; None: read from the stack by the native kernel
    heads: list[WideExperts | None]  # of the multi-token heads


class Output(NamedTuple):
    """A model's answer. See Trace; `logits` and `mtp_logits` are float32."""

    logits: Array  # [B, T, W]
    mtp_logits: tuple[Array, ...]
    routing: LayerRouting | None
    mtp_routing: tuple[LayerRouting, ...]


class Transformer(nnx.Module):
    """A DeepSeek-V3 family model.

    Raises: ConfigError from the configuration, before anything is allocated.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = param(rngs, (cfg.vocab_size, cfg.dim), ("vocab", "dim"), cfg.init_std, exact=True)
        self.dense = stack(lambda r: DenseBlock(cfg, rngs=r), cfg.num_dense_layers, rngs)
        self.sparse = stack(lambda r: SparseBlock(cfg, rngs=r), cfg.num_sparse_layers, rngs)
        self.experts = Experts(cfg, cfg.num_sparse_layers, rngs=rngs) if cfg.num_sparse_layers else None
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        head = None if cfg.tie_embeddings else param(rngs, (cfg.dim, cfg.vocab_size), ("dim", "vocab"), cfg.init_std)
        self.head = head
        self.mtp = nnx.List(make_heads(cfg, rngs))
        self.cfg = cfg

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Output:
        """Logits of every next token.

        Args:
            tokens: ids below vocab_size.
            segment_ids: documents of a packed row, 1, 2, …; 0 is padding. None is one document a row.
            positions: None counts from 0.
        Raises: ValueError when T is over max_positions, or not over mtp_depth.
        """
        trace = self.trace(tokens, segment_ids, positions)
        return Output(
            self.logits(trace.h), tuple(self.logits(h) for h in trace.mtp_h), trace.routing, trace.mtp_routing
        )

    def trace(self, tokens, segment_ids=None, positions=None, kind: Kind = "latent") -> Trace:
        """The forward pass up to the heads. Arguments as `__call__`; `kind` is the cache that rows are for."""
        cfg = self.cfg
        batch, length = tokens.shape
        if length > cfg.max_positions:
            raise ValueError(f"length {length} is over the model's max_positions={cfg.max_positions}")
        if length <= cfg.mtp_depth:
            raise ValueError(f"length {length} leaves nothing for mtp_depth={cfg.mtp_depth} to read")
        if positions is None:
            positions = from_zero(batch, length)
        at = positions_of(cfg, positions, segment_ids)
        mask = jnp.ones(tokens.shape, jnp.bool_) if segment_ids is None else segment_ids != 0

        x = self.embedding(tokens)
        rows, routing = [], None
        if self.dense is not None:
            x, dense_rows = scan_stack(self.dense, lambda m, x, _: m(x, at, kind), x, remat=cfg.remat, **self._how)
            rows.append(dense_rows)
        if self.sparse is not None and self.experts is not None:
            experts = self.experts.arrays()

            def body(block, carry, layer):
                x, thread = carry
                x, layer_rows, layer_routing, thread = block(x, at, mask, experts, thread, layer, kind)
                return (x, thread), (layer_rows, layer_routing)

            carry, (sparse_rows, routing) = scan_stack(self.sparse, body, (x, experts), remat=cfg.remat, **self._how)
            x = end_thread(cfg, *carry)
            rows.append(sparse_rows)
        h = self.norm(x)
        read = h if cfg.mtp_input == "normed" else x
        mtp_h, mtp_routing = run_heads(self.mtp, self.embedding, read, tokens, at, mask, remat=cfg.remat, **self._how)
        return Trace(x, h, mtp_h, routing, mtp_routing, jnp.concatenate(rows))

    def ready(self) -> Ready | None:
        """Weights laid out for decoding, once a request; None where that brings nothing."""
        cfg = self.cfg
        served = calls.serves(self.compute_dtype)
        small = self.experts is not None and cfg.num_experts * cfg.dim * cfg.expert_dim <= SMALL_EXPERTS
        if on_mesh() or cfg.num_layers > UNROLLED or not (served or small):
            return None
        experts: list[WideExperts | None] = [None] * cfg.num_sparse_layers
        heads: list[WideExperts | None] = [None] * len(self.mtp)
        if self.experts is not None and not served:
            stack = self.experts.arrays()
            heads = [side_by_side(h.experts.arrays(), 0) if hasattr(h, "experts") else None for h in self.mtp]
            experts = [side_by_side(stack, layer) for layer in range(cfg.num_sparse_layers)]
        return Ready(unstack(self.dense), unstack(self.sparse), experts, heads)

    def decode(
        self, tokens: Int[Array, "B T"], cache: Cache, ready: Ready | None = None
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """A step of a few tokens a row, in absorbed form where the cache is latent.

        Args:
            tokens: what follows what the cache holds.
            cache: must have room for them. Its lengths stay: the caller knows how many of the tokens will count.
            ready: from `ready`, made outside the loop over tokens.
        Returns: (hidden states [B, T, D] before the final norm, the cache with the tokens' rows in it).
        """
        if cache.kind == "none":
            return self._decode_anew(tokens, cache)
        at = positions_of(self.cfg, places(cache, tokens.shape[1]), None)
        first, carry = self.cfg.num_dense_layers, (self.embedding(tokens), cache)

        def dense_layer(block, carry, layer):
            return block.decode(carry[0], at, carry[1], layer), None

        def sparse_layer(block, carry, layer, experts=None):
            experts = self.experts.arrays() if experts is None else experts
            return block.decode(carry[0], at, carry[1], first + layer, experts, layer), None

        if ready is not None:
            for i, own in enumerate(ready.dense):
                block = nnx.merge(nnx.graphdef(self.dense), own)
                carry, _ = dense_layer(block, carry, jnp.asarray(i, jnp.int32))
            for i, (own, experts) in enumerate(zip(ready.sparse, ready.experts, strict=True)):
                block = nnx.merge(nnx.graphdef(self.sparse), own)
                carry, _ = sparse_layer(block, carry, jnp.asarray(i, jnp.int32), experts)
            return carry
        if self.dense is not None:
            carry, _ = scan_stack(self.dense, dense_layer, carry, **self._how)
        if self.sparse is not None:
            carry, _ = scan_stack(self.sparse, sparse_layer, carry, **self._how)
        return carry

    def _decode_anew(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """The step without a cache: the whole forward pass over all tokens so far."""
        place = places(cache, tokens.shape[1])
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
        seen = cache.tokens.at[rows, place].set(tokens)
        x = jnp.take_along_axis(self.trace(seen).x, place[..., None], axis=1)
        return x, replace(cache, tokens=seen)

    def read_by_heads(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the multi-token heads read of the trunk's output: `mtp_input` says whether it is normed."""
        return self.norm(x) if self.cfg.mtp_input == "normed" else x

    def embedding(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding table, in the compute dtype."""
        table = whole(self.embed, **self._how)[...]

        def local(table, tokens):
            return (), jnp.take(table, tokens, axis=0, mode="clip").astype(self.compute_dtype)

        return by_rows(local, (table,), tokens)[1]

    def head_matrix(self) -> Float[Array, "D W"]:
        """What turns a hidden state into logits, shared by all depths, in the compute dtype."""
        table = whole(self.embed if self.head is None else self.head, **self._how)[...]
        return (table.T if self.head is None else table).astype(self.compute_dtype)

    def logits(self, h: Float[Array, "*n D"]) -> Float[Array, "*n W"]:
        """float32 logits of normed hidden states."""
        return jnp.dot(h, self.head_matrix(), preferred_element_type=jnp.float32)

    def next_logits(self, h: Float[Array, "*n D"]) -> Float[Array, "*n W"]:
        """`logits` for decoding, of a few rows. Takes no gradient."""
        if self.head is None or h.dtype != jnp.float32:  # a table that lies the other way round would be turned first
            return self.logits(h)
        return few_rows_product(h, self.head_matrix())

    @property
    def _how(self) -> dict[str, Any]:
        """How a mesh's weights are made whole, see `sharding.whole`."""
        return {"fsdp": self.cfg.layout.fsdp, "dtype": self.compute_dtype}

    @property
    def compute_dtype(self):
        return jnp.dtype(self.cfg.compute_dtype)


def abstract(cfg: ModelConfig) -> Transformer:
    """The model as shapes alone: nothing is allocated."""
    return nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
