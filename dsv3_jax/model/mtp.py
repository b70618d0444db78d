"""Multi-token prediction: four kinds of head that draft the tokens after the next one.

Head k = 1 … M at position i predicts token t_{i+k+1}; the trunk's own head predicts t_{i+1}. All
kinds share the trunk's embedding and unembedding. Two read the tokens that they continue, each
after the head before (`MTPModule`) or after itself (`EagleHead`). Two are parallel, and read the
trunk's output alone.

A new kind is a class here, with a row of HEADS, and a row of `config.HEAD_KINDS`. Its loss and its
drafter follow from what these declare.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.mesh.length import filled, first, later
from dsv3_jax.model.blocks import Block
from dsv3_jax.model.context import Context, LayerResult
from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.parameters import param
from dsv3_jax.model.stack import recompute

Hidden = Float[Array, "B T D"]


class Head(nnx.Module):
    """The protocol of a multi-token head. `config.HEAD_KINDS` says what it reads, if it routes."""

    remembers = True  # has a block whose attention needs a separate cache while decoding
    token_weight = 1.0  # weight of the cross-entropy in the head's loss

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        """Draw the head's weights."""

    def __call__(self, h: Hidden, ctx: Context, embedded: Hidden | None = None) -> LayerResult:
        """Turn hidden states into those that the unembedding reads.

        Args:
            h: the trunk's output, or what the head before returned.
            ctx: positions; a cache of one layer while decoding.
            embedded: of the token that the head continues, k positions later; None if it reads
                none.
        Returns: (hidden states [B, T, D], the context with the head's cache, metrics of its block).
        """
        raise ValueError(f"{type(self).__name__} must define __call__")

    def feature_loss(self, h: Hidden, target: Hidden) -> Float[Array, "B T"] | None:
        """Loss of a position against the trunk's next hidden state; None if the head has none."""
        return None


class MetaHead(Head):
    """One of Meta's parallel heads: h^k = norm(Block_k(h)), each with its own block and norm.

    Source: arXiv 2404.19737, section 2.
    Departs from the paper: there the next token's head has such a block too, and all blocks are
    taken from the trunk's layers. Here they are added to a complete trunk, whose own head predicts
    the next token.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = preset("tiny")
        >>> def make():
        ...     return MetaHead(cfg, rngs=nnx.Rngs(0))
        >>> head = nnx.eval_shape(make)
        >>> head.block.moe.experts.w_gate.shape  # experts of its own
        (16, 128, 64)
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.block = Block(cfg, sparse=True, rngs=rngs)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def __call__(self, h: Hidden, ctx: Context, embedded: Hidden | None = None) -> LayerResult:
        x, ctx, metrics = self.block(h, ctx)
        return self.norm(x), ctx, metrics


class MTPModule(MetaHead):
    """One depth of DeepSeek's causal chain.

        h^k_i = norm(Block(W_eh [norm(Emb(t_{i+k})); norm(h^{k-1}_i)]))

    It is a Meta head that reads the joined token and hidden state. The next depth reads the normed
    h^k.
    Source: DeepSeek-V3 report, section 2.2.
    Departs from the paper: the embedding comes first, then the hidden state, as in the released
    weights.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = preset("tiny")
        >>> def make():
        ...     return MTPModule(cfg, rngs=nnx.Rngs(0))
        >>> head = nnx.eval_shape(make)
        >>> head.w_eh.shape  # of [norm(e), norm(h)] to D
        (256, 128)
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.embed_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.hidden_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.w_eh = param(rngs, (2 * cfg.dim, cfg.dim), ("dim", None), cfg.init_std)
        super().__init__(cfg, rngs=rngs)

    def __call__(self, h: Hidden, ctx: Context, embedded: Hidden | None = None) -> LayerResult:
        assert embedded is not None
        both = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(h)], axis=-1)
        return super().__call__(ctx.run("product", both, self.w_eh[...]), ctx)


class MedusaHead(Head):
    """One of Medusa's parallel heads: h^k = h + silu(h W_k), at first the trunk's, as W_k is 0.

    Source: arXiv 2401.10774, section 2.1.
    Departs from the paper: the unembedding is shared, and all heads weigh alike. There each head
    has its own, a copy of the trunk's at first, and the loss of head k weighs 0.8^k.

    Example:
        >>> from dsv3_jax.model.context import from_zero, make_context
        >>> from dsv3_jax.presets import preset
        >>> cfg, h = preset("tiny"), jnp.ones((1, 2, 128))
        >>> head = MedusaHead(cfg, rngs=nnx.Rngs(0))
        >>> bool((head(h, make_context(cfg, from_zero(1, 2)))[0] == h).all())
        True
    """

    remembers = False

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.w = nnx.Param(jnp.zeros((cfg.dim, cfg.dim), jnp.float32), axes=("dim", None))

    def __call__(self, h: Hidden, ctx: Context, embedded: Hidden | None = None) -> LayerResult:
        return h + jax.nn.silu(ctx.run("product", h, self.w[...])), ctx, {}


class EagleHead(Head):
    """EAGLE's head continues features: f_{i+1} = Block(W_eh [Emb(t_{i+1}); h_i]), nearly h_{i+1}.

    The unembedding of f_{i+1} predicts t_{i+2}. For the token after that the head reads f_{i+1}
    instead of h_{i+1}.
    Source: arXiv 2401.15077, section 3; its loss is in section 3.2.
    Departs from the paper: cross-entropy is on the text's own tokens, not on the trunk's
    distribution, and no noise is added to what the head reads.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = preset("tiny")
        >>> def make():
        ...     return EagleHead(cfg, rngs=nnx.Rngs(0))
        >>> head = nnx.eval_shape(make)
        >>> head.w_eh.shape  # of [e, h] to D
        (256, 128)
    """

    token_weight = 0.1  # the regression weighs 1

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.w_eh = param(rngs, (2 * cfg.dim, cfg.dim), ("dim", None), cfg.init_std)
        self.block = Block(cfg, sparse=False, rngs=rngs)

    def __call__(self, h: Hidden, ctx: Context, embedded: Hidden | None = None) -> LayerResult:
        assert embedded is not None
        both = jnp.concatenate([embedded, h], axis=-1)
        return self.block(ctx.run("product", both, self.w_eh[...]), ctx)

    def feature_loss(self, h: Hidden, target: Hidden) -> Float[Array, "B T"]:
        return smooth_l1(h, target)


HEADS: dict[str, type[Head]] = {
    "deepseek": MTPModule,
    "meta": MetaHead,
    "medusa": MedusaHead,
    "eagle": EagleHead,
}


def make_heads(cfg: ModelConfig, rngs: nnx.Rngs) -> list[Head]:
    """The heads of a configuration, `mtp_depth` of its kind.

    Example:
        >>> from dsv3_jax.config import replace
        >>> from dsv3_jax.presets import preset
        >>> cfg = replace(preset("tiny"), mtp_kind="medusa", mtp_depth=2)
        >>> [type(head).__name__ for head in make_heads(cfg, nnx.Rngs(0))]
        ['MedusaHead', 'MedusaHead']
    """
    return [HEADS[cfg.mtp_kind](cfg, rngs=rngs) for _ in range(cfg.mtp_depth)]


def smooth_l1(x: Float[Array, "*n D"], target: Float[Array, "*n D"]) -> Float[Array, "*n"]:
    """Mean over D of d²/2 where |d| < 1, else |d| - 1/2, d = x - target; float32 (float64 stays).

    Example:
        >>> smooth_l1(jnp.array([0.5, 3.0]), jnp.zeros(2))  # mean of 0.5² / 2 and 3 − 1/2
        Array(1.3125, dtype=float32)
    """
    wide = np.promote_types(x.dtype, np.float32)
    d = jnp.abs(x.astype(wide) - target.astype(wide))
    return jnp.where(d < 1, 0.5 * d * d, d - 0.5).mean(-1)


def unshard_head(head: Head, unshard: Callable) -> Head:
    """A head with its weights gathered; see `mesh.fsdp.unshard_weights`."""
    graphdef, state = nnx.split(head)
    return nnx.merge(graphdef, unshard(state))


def counted(
    cfg: ModelConfig, mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None, k: int
) -> Bool[Array, "B _"]:
    """The positions that count for load and balance losses: of head k from 1, or of the trunk (0).

    A position that reads padding or another document's token is not counted.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> segment_ids = jnp.array([[1, 1, 2, 0]])
        >>> counted(preset("tiny"), segment_ids != 0, segment_ids, k=1)
        Array([[ True, False, False]], dtype=bool)
    """
    here = first(mask, k)  # later positions have no token k positions on
    if not cfg.head_kind.reads_tokens:
        return here
    real = here & later(mask, k)
    return real if segment_ids is None else real & (first(segment_ids, k) == later(segment_ids, k))


def token_counts(cfg: ModelConfig, segment_ids: Int[Array, "B T"]) -> Float[Array, " depths"]:
    """Count the positions of `counted`, of the trunk and of each head; at least 1, to divide by.

    Example:
        >>> from dsv3_jax.config import replace
        >>> from dsv3_jax.presets import preset
        >>> token_counts(replace(preset("tiny"), mtp_depth=2), jnp.array([[1, 1, 2, 0]]))
        Array([3., 1., 1.], dtype=float32)
    """
    masks = [counted(cfg, segment_ids != 0, segment_ids, k) for k in range(1 + cfg.mtp_depth)]
    return jnp.maximum(jnp.stack([mask.sum(dtype=jnp.float32) for mask in masks]), 1)


@jax.named_scope("heads")
def run_heads(
    model: Any,
    h: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    ctx: Context,
    given: Sequence[Array | None] = (),
    counts: Sequence[Array] = (),
) -> tuple[tuple[Array, ...], tuple[dict[str, Any], ...]]:
    """Run all heads of a model over complete rows, for training.

    Args:
        model: a `Transformer`: its heads, embedding and recomputation.
        h: the trunk's output, as `mtp_input` has it.
        given: of each head k = 1 … M, the experts that take the place of its router's choice,
            int32 [B, T-k, K].
        counts: of each head, its context's `divisor`.
    Returns: (hidden states, of head k [B, T-k, D]; the metrics of each).
    """
    cfg = model.cfg
    reads_tokens = cfg.head_kind.reads_tokens
    hidden = []
    metrics = []
    for k, head in enumerate(model.mtp, start=1):
        # Head k has T - k positions: those with a token k positions on.
        part = _context_of_head(cfg, k, tokens, ctx)
        part = part._replace(
            given=filled(given[k - 1], k, -1) if given else None,
            divisor=counts[k - 1] if len(counts) else None,
        )
        # Position i reads h_i, and the embedding of token i + k if this kind reads tokens.
        embedded = model.embedding(later(tokens, k)) if reads_tokens else None
        read = first(h, k - (tokens.shape[1] - h.shape[1]))  # a chain's is shorter already
        made, of_head = _run_head(model, head, read, part, embedded)
        if reads_tokens:  # a chain: the next head reads what this one made
            h = made
        hidden.append(made)
        metrics.append(of_head)
    return tuple(hidden), tuple(metrics)


def _context_of_head(cfg: ModelConfig, k: int, tokens: Array, ctx: Context) -> Context:
    """The context of head k, from 1: of the positions that have a token k later."""
    mask = counted(cfg, ctx.mask, ctx.segment_ids, k)
    read = None
    if ctx.tokens is not None:  # a router that reads tokens reads the one that the head does
        read = later(tokens, k) if cfg.head_kind.reads_tokens else first(tokens, k)

    # Edits of gates name layers of the trunk, so heads run without them.
    return ctx._replace(
        how=replace(ctx.how, edit_gates=None),
        cos=first(ctx.cos, k),
        sin=first(ctx.sin, k),
        segment_ids=None if ctx.segment_ids is None else first(ctx.segment_ids, k),
        mask=mask,
        tokens=read,
    )


def _run_head(
    model: Any, head: Head, h: Array, ctx: Context, embedded: Array | None
) -> tuple[Array, dict[str, Any]]:
    # Split and merged, as in `run_trunk`: nnx.remat would write to variables that an outer trace
    # holds.
    graphdef, state = nnx.split(head)

    def run(
        state: nnx.State, h: Array, ctx: Context, embedded: Array | None
    ) -> tuple[Array, dict[str, Any]]:
        h, _, metrics = nnx.merge(graphdef, model.unshard(state))(h, ctx, embedded)
        return h, metrics

    return recompute(run, model.execution.remat)(state, h, ctx, embedded)
