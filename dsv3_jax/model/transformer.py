"""The whole model: embedding, dense layers, sparse layers, norm and head; the heads on the side."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Execution, ModelConfig, check_inputs, check_kind
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.mesh.fsdp import unshard_weights
from dsv3_jax.mesh.sharding import on_mesh, shard_map_over_batch
from dsv3_jax.model.blocks import Block
from dsv3_jax.model.context import Context, How, from_zero, make_context
from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.moe import Experts, LayerRouting, check_expert_ids
from dsv3_jax.model.mtp import make_heads, run_heads
from dsv3_jax.model.parameters import draws_together, in_use, param, unpack_all
from dsv3_jax.model.stack import loop_layers, recompute, stack

# most layers that training unrolls on the CPU; see experiments/bench/README.md
UNROLLED_IN_TRAINING = 8


class ForwardOut(NamedTuple):
    """A forward pass before the unembedding; the training loss is computed from it."""

    x: Array  # [B, T, D]: the last layer's output
    h: Array  # [B, T, D]: the same after the final norm
    # of head k = 1 … M: [B, T-k, D], for the shared unembedding; entry i predicts token i+k+1
    mtp_h: tuple[Array, ...]
    routing: LayerRouting | None  # of the trunk's sparse layers, stacked along a leading axis
    mtp_routing: tuple[LayerRouting, ...]  # of the heads that have experts
    # by the path of the blocks in the model ("dense", "sparse" or "mtp.0.block") and by name: [L,
    # …], or […] of one
    metrics: dict[str, dict[str, Array]]


class Trunk(NamedTuple):
    """What the layers of the trunk return."""

    x: Array  # [B, T, D]: the last layer's output
    cache: Any  # the context's cache, with these tokens' rows; None without one
    # by "dense" and "sparse", each layer's metrics, and of its rows those that were to be kept
    metrics: dict[str, dict[str, Any]]
    rows: dict[str, dict[str, Array]]


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
        self.cfg = cfg
        self.execution = execution or Execution()
        self.kernels = kernels or prepare(self.execution)

        def blocks(count: int, *, sparse: bool) -> Any:
            return stack(lambda r: Block(cfg, sparse=sparse, rngs=r), count, rngs)

        # The order of these lines is that of the random draws.
        table, std = (cfg.vocab_size, cfg.dim), cfg.init_std
        self.embed = param(rngs, table, ("vocab", "dim"), std, exact=True)
        self.dense = blocks(cfg.num_dense_layers, sparse=False)
        self.sparse = blocks(cfg.num_sparse_layers, sparse=True)
        if self.sparse is not None:
            # one draw of all layers
            self.sparse.moe.experts = Experts(cfg, cfg.num_sparse_layers, rngs=rngs)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        if cfg.tie_embeddings:
            self.head = None
        else:
            self.head = param(rngs, table[::-1], ("dim", "vocab"), std)
        self.mtp = nnx.List(make_heads(cfg, rngs))

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
            mtp_expert_ids: the same of each head that has experts: of head k = 1 … M, [B, T-k, K],
                as in `mtp_routing`.
        Raises: ValueError if T is over max_positions, or not over mtp_depth, or a shape is wrong;
            outside jit, for token or expert ids out of range, or the same expert twice for a token.
        """
        given = (expert_ids, *mtp_expert_ids)
        out = self.forward_hidden(tokens, segment_ids, positions, expert_ids=given)
        mtp_logits = tuple(self.logits(h) for h in out.mtp_h)
        return Output(self.logits(out.h), mtp_logits, out.routing, out.mtp_routing)

    def forward_hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        how: How | None = None,
        expert_ids: Sequence[Array | None] = (None,),
        counts: Float[Array, " depths"] | None = None,
        one_document: bool = False,
    ) -> ForwardOut:
        """Run trunk and heads up to the unembedding.

        Args:
            tokens, segment_ids, positions: as `__call__`.
            how: from `how`, if something is to be watched or edited.
            expert_ids: of the trunk, then of each head, see `__call__`.
            counts: divisors of the losses that are means over tokens, of the trunk, then of each
                head. None means the numbers of their tokens, see `mtp.token_counts`.
            one_document: each row holds one document, and padding after it. Attention then runs
                without segments, also by a kernel that knows none. What it gives for padding is
                another number, and counts nowhere.
        """
        cfg = self.cfg
        check_inputs(None, tokens=tokens, segment_ids=segment_ids, positions=positions)
        _check_ids(tokens, cfg)
        _check_experts(expert_ids, cfg, *tokens.shape)

        # One context for all layers: positions, documents, and how to compute.
        positions = from_zero(*tokens.shape) if positions is None else positions
        ctx = make_context(
            cfg,
            positions,
            segment_ids,
            how=how or self.how(),
            tokens=tokens,
            one_document=one_document,
        )
        # The trunk's own, then those of each head.
        given, *of_heads_given = expert_ids
        divisor, *of_heads_counts = (None,) if counts is None else counts

        # The trunk; then the heads, whose h^0 is its output after the final norm or before.
        trunk = self.run_trunk(tokens, ctx._replace(given=given, divisor=divisor))
        h = self.norm(trunk.x)
        read = h if cfg.mtp_input == "normed" else trunk.x
        mtp_h, of_heads = run_heads(self, read, tokens, ctx, of_heads_given, of_heads_counts)

        # The blocks' metrics hold the routers' decisions, which are taken out here.
        metrics = trunk.metrics | {f"mtp.{k}.block": of_head for k, of_head in enumerate(of_heads)}
        routing = {path: of.pop("routing") for path, of in metrics.items() if "routing" in of}
        of_trunk = routing.pop("sparse", None)
        return ForwardOut(trunk.x, h, mtp_h, of_trunk, tuple(routing.values()), metrics)

    def how(self, mode: Literal["train", "decode"] = "train", **watching: Any) -> How:
        """How this model computes a pass.

        Products in 8 bits are for training; decoding does without.

        Args: watching: watch and edit_gates, see `context.How`.

        Example:
            >>> import dsv3_jax as ds
            >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1)
            >>> model = abstract(cfg, Execution(precision="fp8"))
            >>> [model.how(mode).kernels.target.precision for mode in ("train", "decode")]
            ['fp8', 'none']
        """
        kernels = self.kernels if mode == "train" else self.kernels.in_compute_dtype
        return How(kernels, self.execution.layout, mode, **watching)

    def run_trunk(
        self,
        tokens: Int[Array, "B T"],
        ctx: Context,
        layers: Any = None,
        keep: Sequence[str] = (),
    ) -> Trunk:
        """Embed tokens and run all layers over them.

        Args:
            layers: each layer's own arrays, from `decode.prepare_decode`.
            keep: names of the rows that are returned, stacked by layer.
        """
        cfg = self.cfg
        training = ctx.how.mode == "train"
        remat = self.execution.remat if training else "none"
        unroll = training and self.trains_unrolled

        # From layer to layer go x, the cache, and the last indexer's choice where layers share it.
        carry: Any = self.embedding(tokens), ctx.cache, self._first_choice(tokens.shape, ctx)
        metrics, rows = {}, {}
        kinds = (
            ("dense", 0, cfg.num_dense_layers),
            ("sparse", cfg.num_dense_layers, cfg.num_sparse_layers),
        )
        for path, first, count in kinds:
            if not count:
                continue
            graphdef, state = nnx.split(getattr(self, path))
            # Experts to replay, [Lmoe, B, T, K], are those of the sparse layers.
            of_kind = ctx if path == "sparse" else ctx._replace(given=None)
            run = partial(_run_layer, graphdef=graphdef, ctx=of_kind, first=first, keep=keep)

            if layers is None:
                # Compile time does not grow with depth, unless the scan is written out. A layer's
                # weights are gathered in its turn, inside what `remat` recomputes. It is no
                # nnx.scan, which has had silent faults with memory and sharding.
                step = recompute(partial(run, prepare=self.unshard), remat)
                xs = state, jnp.arange(count, dtype=jnp.int32)
                carry, found = jax.lax.scan(step, carry, xs, unroll=unroll)
            else:
                # Each layer has arrays of its own, which nothing copies out of a stack.
                step = partial(run, prepare=unpack_all)
                carry, found = loop_layers(step, carry, state, getattr(layers, path))
            metrics[path], rows[path] = found
        x, cache, _ = carry
        return Trunk(x, cache, metrics, rows)

    def _first_choice(self, shape: tuple[int, ...], ctx: Context) -> Array | None:
        """A placeholder int32 [B, T, k] for an indexer's choice, if layers share one; else None."""
        if self.cfg.attention != "dsa" or all(self.cfg.has_indexer):
            return None
        slots = shape[1] if ctx.cache is None else ctx.cache.capacity
        return jnp.zeros((*shape, min(slots, self.cfg.index_topk)), jnp.int32)

    @property
    def trains_unrolled(self) -> bool:
        """Whether a pass of mode "train" unrolls its scans: on one CPU, in float32, if not deep.

        In fewer bits unrolling would change results: XLA fuses differently without the loop, and
        does not round inside a fusion.
        """
        run = self.execution
        exact = run.compute_dtype == "float32" and run.precision == run.remat == "none"
        shallow = self.cfg.num_layers <= UNROLLED_IN_TRAINING
        return exact and shallow and self.kernels.device.scan_copies and not on_mesh()

    def read_by_heads(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The multi-token heads' input: the trunk's output, normed if `mtp_input` says so."""
        return self.norm(x) if self.cfg.mtp_input == "normed" else x

    def embedding(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up rows of the embedding table, in the compute dtype."""
        table = self.unshard(self.embed)[...]

        def local(table: Array, tokens: Array) -> tuple[tuple, Array]:
            return (), self.kernels("embedding", table, tokens).astype(self.compute_dtype)

        return shard_map_over_batch(local, tokens)(table, tokens)[1]

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
        """Prepare weights for use (`parameters.in_use`), and gather them (`unshard_weights`)."""
        dtype = self.compute_dtype
        return unshard_weights(in_use(v, dtype), fsdp=self.execution.layout.fsdp, dtype=dtype)

    @property
    def compute_dtype(self) -> np.dtype:
        return jnp.dtype(self.execution.compute_dtype)


def _run_layer(
    carry: tuple,
    xs: tuple[nnx.State, Array | int],
    *,
    graphdef: nnx.GraphDef[Block],
    prepare: Callable[[nnx.State], nnx.State],
    ctx: Context,
    first: int,
    keep: Sequence[str],
) -> tuple[tuple, tuple[dict, dict]]:
    """Run one layer of a stack whose first one is the trunk's layer `first`.

    Args:
        xs: the layer's arrays and its index in the stack.
        prepare: makes the arrays ready for use.
    Returns: (what the next layer gets, (metrics, rows that are kept)).
    """
    arrays, index = xs
    block = nnx.merge(graphdef, prepare(arrays))

    # The layer before passes these on; the experts to replay are the layer's own.
    x, cache, chosen = carry
    given = None if ctx.given is None else ctx.given[index]
    own = ctx._replace(cache=cache, chosen=chosen, layer=first + index, given=given)
    x, after, metrics = block(x, own)

    # Of a step's decisions, decoding reads the experts alone.
    if ctx.how.mode == "decode":
        routed = metrics.get("routing")
        names = () if routed is None else ("expert_ids", *ctx.how.watch & {"gates"})
        metrics = {name: getattr(routed, name) for name in names}

    carry = x, after.cache, None if chosen is None else after.chosen
    return carry, (metrics, {name: after.rows[name] for name in keep})


def _check_ids(tokens: Array, cfg: ModelConfig) -> None:
    """Check the length, and ids, which the embedding would clip.

    Under jit, and on other processes, ids are not known.
    """
    length = tokens.shape[1]
    if length > cfg.max_positions:
        raise ValueError(f"length {length} is over the model's max_positions={cfg.max_positions}")
    if length <= cfg.mtp_depth:
        raise ValueError(f"length {length} leaves nothing for mtp_depth={cfg.mtp_depth} to read")
    if isinstance(tokens, jax.core.Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    ids = np.asarray(tokens)
    wrong = ids[(ids < 0) | (ids >= cfg.vocab_size)]
    if wrong.size:
        size = cfg.vocab_size
        raise ValueError(f"tokens holds {wrong[0]}, which is no id of a vocabulary of {size}")


def _check_experts(
    expert_ids: Sequence[Array | None], cfg: ModelConfig, batch: int, length: int
) -> None:
    """Check experts to replay, of the trunk and of each head: see `check_expert_ids`."""
    trunk, *heads = expert_ids
    if trunk is not None:
        check_expert_ids(cfg, trunk, (cfg.num_sparse_layers, batch, length))
    count = cfg.num_sparse_heads
    if len(heads) not in (0, count):
        raise ValueError(f"mtp_expert_ids has {len(heads)} arrays, and {count} heads have experts")
    for k, ids in enumerate(heads):
        check_expert_ids(cfg, ids, (batch, length - 1 - k), f"mtp_expert_ids[{k}]")


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
