"""The whole model: embedding, dense layers, sparse layers, norm, head, and multi-token heads."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import CacheKind, Execution, ModelConfig, check_inputs, check_kind, replace
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.mesh.sharding import on_mesh, shard_map_over_batch, unshard_weights
from dsv3_jax.model.attention import ATTENTION
from dsv3_jax.model.blocks import DenseBlock, SparseBlock
from dsv3_jax.model.cache import Cache, empty_cache
from dsv3_jax.model.context import DECODING, Context, Options, from_zero, make_context
from dsv3_jax.model.layers import (
    RMSNorm,
    draws_together,
    in_use,
    loop_layers,
    param,
    stack,
    unstack,
)
from dsv3_jax.model.moe import Experts, LayerRouting, check_expert_ids
from dsv3_jax.model.mtp import make_heads, run_heads

# most layers that decoding unrolls: a scan copies each layer out of its stack, experts too
UNROLLED = 64
UNROLLED_PREFILL = 16  # most layers that reading prompts unrolls on the CPU
# most layers that training unrolls on the CPU; see experiments/bench/README.md
UNROLLED_IN_TRAINING = 4


class ForwardOut(NamedTuple):
    """What a forward pass gives before the unembedding; the training loss is computed from it."""

    x: Array  # [B, T, D]: the last layer's output
    h: Array  # [B, T, D]: the same after the final norm
    # head k (from 0): [B, T-1-k, D], for the shared unembedding; entry i predicts token i+k+2
    mtp_h: tuple[Array, ...]
    routing: LayerRouting | None  # of the trunk's sparse layers, stacked along a leading axis
    mtp_routing: tuple[LayerRouting, ...]  # of the heads that have experts
    # by the path of the blocks in the model ("dense", "sparse" or "mtp.0.block") and by name:
    # [L, …], or […] of one
    metrics: dict[str, dict[str, Array]]


class DecodeWeights(NamedTuple):
    """Each layer's arrays, sliced once a request: a loop over stacks copies them each step."""

    dense: list[nnx.State]
    sparse: list[nnx.State]


class Output(NamedTuple):
    """A model's answer. See ForwardOut; `logits` and `mtp_logits` are float32."""

    logits: Array  # [B, T, W]
    mtp_logits: tuple[Array, ...]
    routing: LayerRouting | None
    mtp_routing: tuple[LayerRouting, ...]


class Transformer(nnx.Module):
    """A DeepSeek-V3 family model.

    Args:
        cfg: what it computes.
        execution: how it computes it.
        rngs: for the initial parameters.
        kernels: from `kernels.choose.prepare`. None chooses those of the default device.
    Raises: ConfigError from the configuration, before anything is allocated.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> cfg = ds.replace(ds.preset("tiny"), num_layers=2, num_dense_layers=0, mtp_kind="medusa")
    >>> model = ds.Transformer(cfg, rngs=nnx.Rngs(0))
    >>> out = model(jnp.ones((1, 8), jnp.int32))
    >>> out.logits.shape, out.mtp_logits[0].shape, out.routing.expert_ids.shape
    ((1, 8, 260), (1, 7, 260), (2, 1, 8, 4))
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
        check_kind("cfg", cfg, ModelConfig)
        execution = execution or Execution()
        kernels = kernels or prepare(execution)
        self.embed = param(
            rngs, (cfg.vocab_size, cfg.dim), ("vocab", "dim"), cfg.init_std, exact=True
        )
        self.dense = stack(
            lambda r: DenseBlock(cfg, execution, rngs=r, kernels=kernels),
            cfg.num_dense_layers,
            rngs,
        )
        sparse: Any = stack(
            lambda r: SparseBlock(cfg, execution, rngs=r, kernels=kernels),
            cfg.num_sparse_layers,
            rngs,
        )
        if sparse is not None:
            # one draw of all layers
            sparse.moe.experts = Experts(cfg, cfg.num_sparse_layers, rngs=rngs)
        self.sparse = sparse
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        head = (
            None
            if cfg.tie_embeddings
            else param(rngs, (cfg.dim, cfg.vocab_size), ("dim", "vocab"), cfg.init_std)
        )
        self.head = head
        self.mtp = nnx.List(make_heads(cfg, execution, rngs, kernels))
        self.cfg = cfg
        self.execution = execution
        self.kernels = kernels

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        expert_ids: Int[Array, "Lmoe B T K"] | None = None,
        mtp_expert_ids: Sequence[Int[Array, "B _ K"]] = (),
    ) -> Output:
        """Compute the logits of every next token.

        Args:
            tokens: ids below vocab_size.
            segment_ids: documents of a packed row, 1, 2, …; 0 is padding. None means one document a
                row.
            positions: None counts from 0.
            expert_ids: experts that take the place of the routers' choices, as `routing.expert_ids`
                of another pass; a token whose ids are −1 chooses freely. See `ops.routing.replay`.
            mtp_expert_ids: the same of each head that has experts, [B, T-1-k, K], as in
                `mtp_routing`.
        Raises: ValueError if T is over max_positions, or not over mtp_depth, or the shapes are
            others; outside jit, for token or expert ids out of range, or the same expert twice for
            a token.
        """
        out = self.forward_hidden(
            tokens, segment_ids, positions, expert_ids=(expert_ids, *mtp_expert_ids)
        )
        return Output(
            self.logits(out.h),
            tuple(self.logits(h) for h in out.mtp_h),
            out.routing,
            out.mtp_routing,
        )

    def forward_hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        keys: Array | None = None,
        *,
        watch: Iterable[str] = (),
        edit_gates: Callable | None = None,
        expert_ids: Sequence[Array | None] = (None,),
        counts: Float[Array, " depths"] | None = None,
        one_document: bool = False,
    ) -> ForwardOut:
        """Run trunk and heads up to the unembedding.

        Args:
            tokens, segment_ids, positions: as `__call__`.
            one_document: each row holds one document, and padding after it. Attention then runs
                without segments, also by a kernel that knows none. What it gives for padding is
                another number, and counts nowhere.
            keys: a random key for each row, [B], of the router's noise. None means no noise.
            watch, edit_gates: see `context.Options`.
            expert_ids: of the trunk, then of each head, see `__call__`.
            counts: divisors of the losses that are means over tokens, of the trunk, then of each
                head. None means the numbers of their tokens, see `mtp.token_counts`.
        """
        cfg = self.cfg
        check_inputs(None, tokens=tokens, segment_ids=segment_ids, positions=positions)
        _check_ids(tokens, cfg.vocab_size)
        batch, length = tokens.shape
        if length > cfg.max_positions:
            raise ValueError(
                f"length {length} is over the model's max_positions={cfg.max_positions}"
            )
        if length <= cfg.mtp_depth:
            raise ValueError(
                f"length {length} leaves nothing for mtp_depth={cfg.mtp_depth} to read"
            )
        positions = from_zero(batch, length) if positions is None else positions
        options = Options(watch=frozenset(watch), edit_gates=edit_gates)
        ctx = make_context(
            cfg,
            positions,
            segment_ids,
            tokens=tokens,
            keys=keys,
            options=options,
            one_document=one_document,
        )
        given, *of_heads_given = self._checked(expert_ids, batch, length)
        divisor, *of_heads_counts = (None,) if counts is None else counts
        x, _, metrics = self._trunk(tokens, ctx._replace(expert_ids=given, divisor=divisor))
        h = self.norm(x)
        mtp_h, of_heads = run_heads(
            self.mtp, cfg, self.embedding, h if cfg.mtp_input == "normed" else x, tokens, ctx,
            given=of_heads_given, counts=of_heads_counts, remat=self.execution.remat,
            unshard=self.unshard,
        )  # fmt: skip
        metrics |= {f"mtp.{k}.block": of_head for k, of_head in enumerate(of_heads)}
        routing = {
            path: of_block.pop("routing")
            for path, of_block in metrics.items()
            if "routing" in of_block
        }
        trunk = routing.pop("sparse", None)
        return ForwardOut(x, h, mtp_h, trunk, tuple(routing.values()), metrics)

    def run_layers(
        self, tokens: Int[Array, "B T"], cache: Cache | None, weights: DecodeWeights | None = None
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """Run the trunk for decoding, over tokens that follow what the cache holds.

        Args:
            cache: None means that the tokens are all there are.
            weights: from `prepare_decode`, made outside the loop over tokens.
        Returns: (the last layer's output before the final norm; the cache with the tokens' rows;
            the experts that the routers chose, int32 [Lmoe, B, T, K], or None). Lengths stay: the
            caller knows how many tokens will count.
        """
        positions = from_zero(*tokens.shape) if cache is None else cache.positions(tokens.shape[1])
        ctx = make_context(self.cfg, positions, tokens=tokens, cache=cache, options=DECODING)
        x, cache, found = self._trunk(tokens, ctx, weights)
        return x, cache, found.get("sparse")

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        cache: Cache,
        weights: DecodeWeights | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache, Any]:
        """Read prompts, whose first `lengths` tokens count, into an empty cache.

        Args: weights: from `prepare_decode`, used where a scan would copy each layer's experts and
            the model is not so deep that it takes long to compile.
        Returns: as `run_layers`, with the filled cache.
        """
        ctx = make_context(self.cfg, from_zero(*tokens.shape), tokens=tokens, options=DECODING)
        weights = (
            weights
            if self.kernels.device.scan_copies and self.cfg.num_layers <= UNROLLED_PREFILL
            else None
        )
        x, rows, found = self._trunk(tokens, ctx, weights, keep=tuple(cache.parts[0]))
        return x, cache.fill(rows, lengths), found.get("sparse")

    def _trunk(
        self,
        tokens: Array,
        ctx: Context,
        weights: DecodeWeights | None = None,
        keep: tuple[str, ...] = (),
    ) -> tuple[Array, Any, dict[str, Any]]:
        """Run all layers.

        Args: keep: names of the rows that are returned in place of the cache, stacked by layer.
        Returns: (the last layer's output, the cache, metrics of "dense" and "sparse" layers; of
            those that decode, the experts chosen alone).
        """
        if ctx.cache is not None and weights is None:
            weights = self.prepare_decode()
        decoding = not ctx.options.may_drop
        given = ctx.expert_ids
        how: dict[str, Any] = (
            {} if decoding else {"remat": self.execution.remat, "unroll": self.trains_unrolled}
        )

        def run(stacked, first, layers, carry):
            def layer(block, carry, index):
                x, cache, chosen = carry
                own = None if given is None or first < self.cfg.num_dense_layers else given[index]
                new = ctx._replace(cache=cache, chosen=chosen, layer=first + index, expert_ids=own)
                x, after, metrics = block(x, new)
                if decoding:
                    metrics = metrics["routing"].expert_ids if "routing" in metrics else None
                carry = x, after.cache, None if chosen is None else after.chosen
                return carry, (metrics, {name: after.rows[name] for name in keep})

            return loop_layers(stacked, layer, carry, layers=layers, unshard=self.unshard, **how)

        slots = tokens.shape[1] if ctx.cache is None else ctx.cache.capacity
        shares = self.cfg.attention == "dsa" and not all(self.cfg.has_indexer)
        chosen = (
            jnp.zeros((*tokens.shape, min(slots, self.cfg.index_topk)), jnp.int32)
            if shares
            else None
        )
        carry = self.embedding(tokens), ctx.cache, chosen
        carry, dense = run(self.dense, 0, weights and weights.dense, carry)
        (x, cache, _), sparse = run(
            self.sparse, self.cfg.num_dense_layers, weights and weights.sparse, carry
        )
        found = {path: of for path, of in (("dense", dense), ("sparse", sparse)) if of is not None}
        if keep:
            cache = jax.tree.map(
                lambda *rows: jnp.concatenate(rows), *(rows for _, rows in found.values())
            )
        return x, cache, {path: metrics for path, (metrics, _) in found.items()}

    def _checked(
        self, expert_ids: Sequence[Array | None], batch: int, length: int
    ) -> Sequence[Array | None]:
        """Experts to replay, of the trunk and of each head: see `check_expert_ids`."""
        trunk, *heads = expert_ids
        if trunk is not None:
            check_expert_ids(self.cfg, trunk, (self.cfg.num_sparse_layers, batch, length))
        with_experts = self.cfg.mtp_depth if self.cfg.head_kind.has_experts else 0
        if len(heads) not in (0, with_experts):
            raise ValueError(
                f"mtp_expert_ids has {len(heads)} arrays, and {with_experts} heads have experts"
            )
        for k, ids in enumerate(heads):
            check_expert_ids(self.cfg, ids, (batch, length - 1 - k), f"mtp_expert_ids[{k}]")
        return expert_ids

    @property
    def unrolls(self) -> bool:
        """Whether decoding unrolls the layers; not on a mesh, and not in very deep models."""
        return not on_mesh() and self.cfg.num_layers <= UNROLLED

    @property
    def trains_unrolled(self) -> bool:
        """Whether a pass without a cache unrolls its scans: on one CPU, in float32.

        In fewer bits XLA rounds inside a fusion or not, and fuses otherwise without the loop.
        """
        run = self.execution
        exact = run.compute_dtype == "float32" and run.precision == run.remat == "none"
        shallow = self.cfg.num_layers <= UNROLLED_IN_TRAINING
        return exact and shallow and self.kernels.device.scan_copies and not on_mesh()

    def prepare_decode(self) -> DecodeWeights | None:
        """Take each layer's arrays out of the stacks, once a request; None if no layer is unrolled.

        Outside `jax.jit` a CPU copies nothing. A GPU copies all but the experts, which XLA can
        slice; a TPU copies all.
        """
        if not self.unrolls:
            return None
        return DecodeWeights(
            unstack(self.dense),
            unstack(self.sparse, experts=not self.kernels.device.slices_experts),
        )

    def empty_cache(
        self, batch: int, capacity: int, kind: CacheKind, dtype: Any, *, layers: int | None = None
    ) -> Cache:
        """An empty cache of the trunk, or of so many layers. See `model.cache.empty_cache`."""
        layers = layers or self.cfg.num_layers
        multiple = self.kernels.device.cache_row_multiple
        rows = ATTENTION[self.cfg.attention].cache_rows(self.cfg, kind)
        rows = {
            name: (heads, -(-width // multiple) * multiple) for name, (heads, width) in rows.items()
        }
        return empty_cache(rows, [1] * layers if self.unrolls else [layers], batch, capacity, dtype)

    def read_by_heads(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The multi-token heads' input: the trunk's output, normed if `mtp_input` says so."""
        return self.norm(x) if self.cfg.mtp_input == "normed" else x

    def embedding(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up rows of the embedding table, in the compute dtype."""
        table = self.unshard(self.embed)[...]

        def local(table, tokens):
            return (), self.kernels("embedding", table, tokens).astype(self.compute_dtype)

        return shard_map_over_batch(local, (table,), tokens)[1]

    def head_matrix(self) -> Float[Array, "D W"]:
        """The unembedding, shared by all depths, in the compute dtype."""
        table = self.unshard(self.embed if self.head is None else self.head)[...]
        return (table.T if self.head is None else table).astype(self.compute_dtype)

    def logits(self, h: Float[Array, "*n D"]) -> Float[Array, "*n W"]:
        """Compute float32 logits of normed hidden states."""
        # a transposed table would first be copied for a kernel
        if self.head is None or h.dtype != jnp.float32:
            return jnp.dot(h, self.head_matrix(), preferred_element_type=jnp.float32)
        return self.kernels.in_compute_dtype("product", h, self.head_matrix())

    def unshard(self, v: Any) -> Any:
        """Prepare weights for use (`layers.in_use`), and gather them (`unshard_weights`)."""
        dtype = self.compute_dtype
        return unshard_weights(in_use(v, dtype), fsdp=self.execution.layout.fsdp, dtype=dtype)

    def in_compute_dtype(self) -> "Transformer":
        """The model on the same arrays without 8-bit products, which are for training alone.

        Example:
            >>> import dsv3_jax as ds
            >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1)
            >>> model = abstract(cfg, Execution(precision="fp8"))
            >>> model.in_compute_dtype().execution.precision
            'none'
        """
        if self.execution.precision == "none":
            return self
        execution = replace(self.execution, precision="none")
        graphdef = nnx.graphdef(abstract(self.cfg, execution, self.kernels.in_compute_dtype))
        return nnx.merge(graphdef, nnx.state(self))

    @property
    def compute_dtype(self):
        return jnp.dtype(self.execution.compute_dtype)


def _check_ids(tokens: Array, vocab_size: int) -> None:
    """Check token ids, which the embedding would clip, if they are known: not under jit."""
    if isinstance(tokens, jax.core.Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    ids = np.asarray(tokens)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"tokens holds {wrong[0]}, which is no id of a vocabulary of {vocab_size}")


def abstract(
    cfg: ModelConfig, execution: Execution | None = None, kernels: Kernels | None = None
) -> Transformer:
    """The model as shapes alone: nothing is allocated.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> abstract(preset("v3")).sparse.moe.experts.w_gate.shape  # [L, E, D, F]
        (58, 256, 7168, 2048)
    """
    return nnx.eval_shape(lambda: Transformer(cfg, execution, rngs=nnx.Rngs(0), kernels=kernels))
