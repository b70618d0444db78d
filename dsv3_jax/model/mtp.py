"""Multi-token prediction: four kinds of head that draft the tokens after the next one.

Head k = 1 … M at position i predicts token t_{i+k+1}; the trunk's own head predicts t_{i+1}. All kinds share the
trunk's embedding and unembedding. Two read the tokens that they are to go on from, each from the head before
(`MTPModule`) or from itself (`EagleHead`); two are parallel, and read the trunk's output alone.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.mesh.sharding import whole
from dsv3_jax.model.attention import Positions
from dsv3_jax.model.blocks import DenseBlock, SparseBlock
from dsv3_jax.model.cache import Cache, Kind
from dsv3_jax.model.layers import RMSNorm, param
from dsv3_jax.model.moe import Experts, LayerRouting, end_thread
from dsv3_jax.ops.dispatch import WideExperts
from dsv3_jax.ops.products import few_rows_product, product


class MTPModule(nnx.Module):
    """One depth of DeepSeek's causal chain: h^k_i = Block(W_eh [norm(Emb(t_{i+k})); norm(h^{k-1}_i)]), normed.

    The embedding comes first, then the hidden state, as in the released weights; the report writes them the other
    way round. What goes on to the next depth is the normed h^k. Source: DeepSeek-V3 report, section 2.2.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.embed_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.hidden_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.w_eh = param(rngs, (2 * cfg.dim, cfg.dim), ("dim", None), cfg.init_std)
        self.block = SparseBlock(cfg, rngs=rngs)
        self.experts = Experts(cfg, 1, rngs=rngs)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def combine(self, embedded: Array, h: Array, product: Callable = product) -> Float[Array, "B T D"]:
        both = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(h)], axis=-1)
        return product(both, self.w_eh[...])

    def __call__(self, embedded: Array, h: Array, at: Positions, mask: Array) -> tuple[Array, LayerRouting]:
        x, routing, _ = _sparse(self, self.combine(embedded, h), at, mask)
        return self.norm(x), routing

    def prefill(self, embedded: Array, h: Array, at: Positions, kind: Kind) -> tuple[Array, Array]:
        """A prompt's positions. Returns (normed h^k [B, T, D], what a cache of that kind remembers [B, G, T, X])."""
        x, _, rows = _sparse(self, self.combine(embedded, h), at, jnp.ones(h.shape[:2], jnp.bool_), kind)
        return self.norm(x), rows

    def decode(
        self, embedded: Array, h: Array, at: Positions, cache: Cache, experts: WideExperts | None = None
    ) -> tuple[Array, Cache]:
        """T new positions, which follow what the head's own cache of one layer holds; `experts`: its own, if ready."""
        x, cache = _sparse_step(self, self.combine(embedded, h, few_rows_product), at, cache, experts)
        return self.norm(x), cache


class MetaHead(nnx.Module):
    """One of Meta's parallel heads: h^k = norm(Block_k(h)), each with a block and a norm of its own.

    In the paper the next token's head has such a block too, and all are taken from the trunk's layers; here they are
    added to a whole trunk, whose own head is the next token's. Source: arXiv 2404.19737, section 2.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.block = SparseBlock(cfg, rngs=rngs)
        self.experts = Experts(cfg, 1, rngs=rngs)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def __call__(self, h: Array, at: Positions, mask: Array) -> tuple[Array, LayerRouting]:
        x, routing, _ = _sparse(self, h, at, mask)
        return self.norm(x), routing

    def prefill(self, h: Array, at: Positions, kind: Kind) -> tuple[Array, Array]:
        """As MTPModule's, of the trunk's output alone."""
        x, _, rows = _sparse(self, h, at, jnp.ones(h.shape[:2], jnp.bool_), kind)
        return self.norm(x), rows

    def decode(self, h: Array, at: Positions, cache: Cache, experts: WideExperts | None = None) -> tuple[Array, Cache]:
        """As MTPModule's, of the trunk's output alone."""
        x, cache = _sparse_step(self, h, at, cache, experts)
        return self.norm(x), cache


class MedusaHead(nnx.Module):
    """One of Medusa's parallel heads: h^k = h + silu(h W_k), W_k = 0 at first: it then says what the trunk's head says.

    The paper gives each head an unembedding of its own, which starts as a copy of the trunk's, and weighs the loss of
    head k by 0.8^k; here the unembedding is shared, and all heads weigh alike. Source: arXiv 2401.10774, section 2.1.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.w = nnx.Param(jnp.zeros((cfg.dim, cfg.dim), jnp.float32), axes=("dim", None))

    def __call__(self, h: Float[Array, "B T D"], at: Positions, mask: Array) -> tuple[Array, None]:
        return self.residual(h), None

    def residual(self, h: Float[Array, "B T D"], product: Callable = product) -> Float[Array, "B T D"]:
        """The head itself, which has nothing to remember."""
        return h + jax.nn.silu(product(h, self.w[...]))


class EagleHead(nnx.Module):
    """EAGLE's head goes on from features: f_{i+1} = Block(W_eh [Emb(t_{i+1}); h_i]) stands for the trunk's h_{i+1}.

    The unembedding of f_{i+1} predicts t_{i+2}; for the token after that the head reads f_{i+1} in the place of
    h_{i+1}. Its loss is in `objective`. Source: arXiv 2401.15077, section 3.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.w_eh = param(rngs, (2 * cfg.dim, cfg.dim), ("dim", None), cfg.init_std)
        self.block = DenseBlock(cfg, rngs=rngs)

    def combine(self, embedded: Array, h: Array, product: Callable = product) -> Float[Array, "B T D"]:
        both = jnp.concatenate([embedded, h], axis=-1)
        return product(both, self.w_eh[...])

    def __call__(self, embedded: Array, h: Array, at: Positions, mask: Array) -> tuple[Array, None]:
        return self.block(self.combine(embedded, h), at, "latent")[0], None

    def prefill(self, embedded: Array, h: Array, at: Positions, kind: Kind) -> tuple[Array, Array]:
        """As MTPModule's."""
        return self.block(self.combine(embedded, h), at, kind)

    def decode(
        self, embedded: Array, h: Array, at: Positions, cache: Cache, experts: None = None
    ) -> tuple[Array, Cache]:
        """As MTPModule's; it has no experts."""
        return self.block.decode(self.combine(embedded, h, few_rows_product), at, cache, jnp.zeros((), jnp.int32))


Head = MTPModule | MetaHead | MedusaHead | EagleHead
KINDS: dict[str, type[Head]] = {"deepseek": MTPModule, "meta": MetaHead, "medusa": MedusaHead, "eagle": EagleHead}


def make_heads(cfg: ModelConfig, rngs: nnx.Rngs) -> list[Head]:
    """The heads of a configuration, `mtp_depth` of its kind."""
    return [KINDS[cfg.mtp_kind](cfg, rngs=rngs) for _ in range(cfg.mtp_depth)]


def gathered(head: Head, *, fsdp: bool, dtype: Any) -> Head:
    """A head whose weights, but for its experts', are made whole where fsdp cuts them; see `sharding.whole`."""
    if not fsdp:
        return head
    graphdef, state = nnx.split(head)
    experts, rest = nnx.split_state(state, lambda path, _: path[0] == "experts", ...)
    return nnx.merge(graphdef, experts, whole(rest, fsdp=fsdp, dtype=dtype))


def run_heads(
    heads: Iterable[Head],
    embedding: Callable[[Array], Array],
    h: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    at: Positions,
    mask: Bool[Array, "B T"],
    *,
    remat: str = "none",
    fsdp: bool = False,
    dtype: Any = None,
) -> tuple[tuple[Array, ...], tuple[LayerRouting, ...]]:
    """All heads over whole rows, for training.

    Args:
        embedding: of tokens, the trunk's.
        h: the trunk's output, as `mtp_input` has it.
        mask: tokens that count for load.
        remat: all but "none" computes each head anew in the backward pass.
        fsdp, dtype: as in `scan_stack`.
    Returns: (hidden states, head k's (from 0) [B, T-1-k, D]; routing of those heads that have experts).
    """

    def run(head, *args) -> tuple[Array, LayerRouting | None]:
        # Split and merged, as in scan_stack: nnx.remat would write to variables that an outer trace holds.
        graphdef, state = nnx.split(head)

        def plain(state, *args):
            return gathered(nnx.merge(graphdef, state), fsdp=fsdp, dtype=dtype)(*args)

        return (plain if remat == "none" else jax.checkpoint(plain))(state, *args)

    out, routings = [], []
    for k, head in enumerate(heads, start=1):
        short = tokens.shape[1] - k  # later positions have no token k places on
        segment_ids, counts = None, mask[:, :short]
        if at.segment_ids is not None:
            segment_ids = at.segment_ids[:, :short]
            if isinstance(head, MTPModule | EagleHead):
                # A position whose next tokens are padding or another document's says nothing, and is not counted.
                counts = counts & (segment_ids == at.segment_ids[:, k:])
        cut = Positions(at.cos[:, :short], at.sin[:, :short], segment_ids)
        if isinstance(head, MTPModule | EagleHead):
            h, routing = run(head, embedding(tokens[:, k:]), h[:, :short], cut, counts)
            out.append(h)
        else:
            x, routing = run(head, h[:, :short], cut, counts)
            out.append(x)
        if routing is not None:
            routings.append(routing)
    return tuple(out), tuple(routings)


def _sparse(
    head: MTPModule | MetaHead, x: Array, at: Positions, mask: Array, kind: Kind = "latent"
) -> tuple[Array, LayerRouting, Array]:
    """A head's sparse block, whose experts stand in a stack of one layer: (x, routing, what a cache remembers)."""
    arrays = head.experts.arrays()
    x, rows, routing, thread = head.block(x, at, mask, arrays, arrays, jnp.zeros((), jnp.int32), kind)
    return end_thread(head.block.moe.cfg, x, thread), routing, rows


def _sparse_step(
    head: MTPModule | MetaHead, x: Array, at: Positions, cache: Cache, experts: WideExperts | None
) -> tuple[Array, Cache]:
    zero = jnp.zeros((), jnp.int32)
    return head.block.decode(x, at, cache, zero, head.experts.arrays() if experts is None else experts, zero)
