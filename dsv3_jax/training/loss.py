"""What training minimises: L = L_main + (λ/M)·Σ_k L_k + balance losses, each L a mean over positions with a target.

L_k is the cross-entropy of head k on the text's own tokens, and what else its kind adds (`model.mtp.Head`). On a frozen
trunk it may be the head's distance to the trunk's own distribution instead (`ops.draft_loss`).
Source: DeepSeek-V3 report, equations 17-25.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import HeadLoss
from dsv3_jax.mesh.sharding import shard_map_over_batch
from dsv3_jax.model.moe import LayerRouting
from dsv3_jax.model.transformer import ForwardOut, Transformer
from dsv3_jax.ops import balance
from dsv3_jax.ops.cross_entropy import token_scores
from dsv3_jax.ops.draft_loss import Distance, summed_distance
from dsv3_jax.training import metrics
from dsv3_jax.training.metrics import Metrics


class Objective(NamedTuple):
    """Which losses are summed."""

    # The total has the multi-token heads alone, (1/M)·Σ_k L_k and their balance losses; λ has no other loss to weigh
    # them against, and is not used.
    heads_only: bool = False
    head_loss: HeadLoss = "ce"  # "kl" or "tv": heads learn the trunk's distribution of a token, not the text's token
    watch: tuple[str, ...] = ()  # see `model.context.Options`


ON_TEXT = Objective()


class Losses(NamedTuple):
    """One batch's losses; float32 scalars, and load [L, E]: the trunk's sparse layers, then the heads with experts."""

    total: Array
    main: Array  # nats a token
    mtp: Array  # [M] nats a token; with head_loss="tv" the mean share of drafts that sampling rejects
    feature: Array  # what heads add to their cross-entropy (EAGLE's regression), mean over positions; 0 without
    balance: Array
    accuracy: Array  # share of next tokens that are the argmax
    load: Array
    metrics: Metrics  # of blocks
    bias_measure: Array | None = None  # [L, E]: what the bias's rule needs beside the load; rows as of load


def targets(
    tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"], ahead: int, loss_mask: Bool[Array, "B T"] | None = None
) -> tuple[Array, Array]:
    """Tokens `ahead` positions on, and which positions have one in their own segment: two [B, T - ahead].

    Args: loss_mask: tokens that may be targets, as an assistant's in a chat. None means all.

    Example:
        >>> tokens, segment_ids = jnp.array([[5, 6, 7, 8]]), jnp.array([[1, 1, 2, 2]])
        >>> targets(tokens, segment_ids, ahead=1)
        (Array([[6, 7, 8]], dtype=int32), Array([[ True, False,  True]], dtype=bool))
    """
    here, there = segment_ids[:, :-ahead], segment_ids[:, ahead:]
    mask = (here == there) & (here != 0)
    return tokens[:, ahead:], mask if loss_mask is None else mask & loss_mask[:, ahead:]


def target_counts(
    segment_ids: Int[Array, "B T"], depths: int, loss_mask: Bool[Array, "B T"] | None = None
) -> Float[Array, " depths"]:
    """Count positions with a target 1, 2, …, `depths` positions on; at least 1, to divide by.

    Args: loss_mask: as in `targets`.

    Example:
        >>> target_counts(jnp.array([[1, 1, 1, 2]]), depths=2)
        Array([2., 1.], dtype=float32)
    """
    counts = [targets(segment_ids, segment_ids, a, loss_mask)[1].sum(dtype=jnp.float32) for a in range(1, depths + 1)]
    return jnp.maximum(jnp.stack(counts), 1)


def compute_loss(
    model: Transformer,
    batch: dict[str, Array],
    mtp_weight: Float[Array, ""] | float,
    objective: Objective = ON_TEXT,
    *,
    counts: Float[Array, " depths"] | None = None,
    share: float = 1.0,
) -> Losses:
    """Compute all losses of a batch.

    Args:
        batch: tokens, segment_ids, positions, int32 [B, T]; loss_mask, bool [B, T], if not all tokens are targets;
            keys, a random key for each row, [B], for a router with noise.
        mtp_weight: λ.
        counts: divisors of the sums, from `target_counts`: of the complete batch if this is a part of one.
        share: of the complete batch that this part is: the weight of its balance losses.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(cfg))  # all weights are 0
        >>> one = jnp.ones((1, 4), jnp.int32)
        >>> batch = {"tokens": one, "segment_ids": one, "positions": jnp.arange(4)[None]}
        >>> main = jax.jit(lambda: compute_loss(model, batch, mtp_weight=0.0).main)()
        >>> round(float(main), 2)  # even odds over 260 tokens: ln 260
        5.56
    """
    tokens, segment_ids, loss_mask = batch["tokens"], batch["segment_ids"], batch.get("loss_mask")
    out = model.forward_hidden(tokens, segment_ids, batch["positions"], batch.get("keys"), watch=objective.watch)
    if counts is None:
        counts = target_counts(segment_ids, 1 + len(out.mtp_h), loss_mask)
    nats, correct = _cross_entropies(model, out, batch, counts, objective.head_loss)
    main, mtp = nats[0], jnp.stack(nats[1:]) if nats[1:] else jnp.zeros((0,), jnp.float32)
    feature = _feature_loss(model, out, segment_ids, loss_mask, counts)
    heads = feature + model.mtp[0].token_weight * mtp.mean() if nats[1:] else jnp.zeros((), jnp.float32)
    balance = _balance(out, objective.heads_only) * share
    measures = [r.bias_measure for r in _routings(out) if r.bias_measure is not None]
    total = heads + balance if objective.heads_only else main + balance + mtp_weight * heads
    measure = jnp.concatenate(measures) * share if measures else None
    found = metrics.weighted(out.metrics, share)
    return Losses(total, main, mtp, feature, balance, correct[0], _load(out), found, measure)


def _cross_entropies(
    model: Transformer, out: ForwardOut, batch: dict[str, Array], counts: Array, head_loss: HeadLoss
) -> tuple[list[Array], list[Array]]:
    """(Mean loss, share of targets that are the argmax) of the trunk, then of each head."""
    matrix = model.head_matrix()

    @jax.named_scope("loss")
    def cross_entropy(matrix, h, wanted, mask):
        flat = h.reshape(-1, h.shape[-1]), matrix, wanted.reshape(-1), mask.reshape(-1)
        return model.kernels("cross_entropy", *flat), ()

    nats, correct = [], []
    for ahead, h in enumerate((out.h[:, :-1], *out.mtp_h), start=1):
        wanted, mask = targets(batch["tokens"], batch["segment_ids"], ahead, batch.get("loss_mask"))
        h = h[:, : wanted.shape[1]]
        (total, right), _ = shard_map_over_batch(cross_entropy, (matrix,), h, wanted, mask)
        if ahead > 1 and head_loss != "ce":
            # The trunk's prediction of the same token, one position before it.
            own = out.h[:, ahead - 1 : ahead - 1 + wanted.shape[1]]
            total = _distance(matrix, h, own, mask, head_loss)
        nats.append(total / counts[ahead - 1])
        correct.append(right / counts[ahead - 1])
    return nats, correct


@jax.named_scope("loss")
def _distance(matrix: Array, h: Array, own: Array, mask: Array, kind: Distance) -> Array:
    def summed(matrix, h, own, mask):
        flat = (x.reshape(-1, x.shape[-1]) for x in (h, own))
        return summed_distance(*flat, matrix, mask.reshape(-1), kind), ()

    return shard_map_over_batch(summed, (matrix,), h, own, mask)[0]


def _feature_loss(
    model: Transformer, out: ForwardOut, segment_ids: Array, loss_mask: Array | None, counts: Array
) -> Array:
    """The loss that heads add to their cross-entropy, mean over positions with a target and over heads."""
    total = jnp.zeros((), jnp.float32)
    for k, (head, h) in enumerate(zip(model.mtp, out.mtp_h, strict=True), start=1):
        mask = targets(segment_ids, segment_ids, k + 1, loss_mask)[1]
        wanted = jax.lax.stop_gradient(out.h[:, k:-1])
        loss = head.feature_loss(h[:, : mask.shape[1]], wanted)
        if loss is not None:
            total += (loss * mask.astype(jnp.float32)).sum() / counts[k] / len(out.mtp_h)
    return total


def _routings(out: ForwardOut, heads_only: bool = False) -> list[LayerRouting]:
    """Routing of the trunk's sparse layers, then of the heads that have experts; each has a leading layer axis."""
    heads = [jax.tree.map(lambda x: x[None], r) for r in out.mtp_routing]
    return heads if heads_only or out.routing is None else [out.routing, *heads]


def _balance(out: ForwardOut, heads_only: bool = False) -> Array:
    return sum((r.balance_loss.sum() for r in _routings(out, heads_only)), jnp.zeros((), jnp.float32))


def _load(out: ForwardOut) -> Array:
    """The load, [L, E]."""
    routings = _routings(out)
    return jnp.concatenate([r.load for r in routings]) if routings else jnp.zeros((0, 1), jnp.float32)


def add_parts(a: Losses, b: Losses) -> Losses:
    """Add the losses of two parts of a batch, and their metrics by their rules.

    Example:
        >>> one = Losses(*[jnp.ones(())] * 7, metrics={"dense": {"max_logit": jnp.array([1.0, 7.0])}})
        >>> both = add_parts(one, one._replace(metrics={"dense": {"max_logit": jnp.array([2.0, 3.0])}}))
        >>> both.main, both.metrics["dense"]["max_logit"]
        (Array(2., dtype=float32), Array([2., 7.], dtype=float32))
    """
    total = jax.tree.map(jnp.add, a._replace(metrics={}), b._replace(metrics={}))
    return total._replace(metrics=metrics.add(a.metrics, b.metrics))


class Scores(NamedTuple):
    """Token by token, for evaluation. `mask` says which positions have a target."""

    nll: Float[Array, "B S"]  # S = T-1: nats of each next token
    mask: Bool[Array, "B S"]
    agree: Float[Array, " M"]  # positions where head k drafts what the model itself then predicts
    drafted: Float[Array, " M"]  # positions counted
    load: Float[Array, "L E"]
    domain_load: Float[Array, "N L E"]  # of the trunk's sparse layers, by the tokens' domain; N = 0 without domains


def _domain_load(out: ForwardOut, mask: Array, domains: Array | None, num_domains: int, num_experts: int) -> Array:
    """Count the trunk's assignments by domain: tokens of padding do not count."""
    if out.routing is None or domains is None or not num_domains:
        return jnp.zeros((0, 0, num_experts), jnp.float32)
    ids = out.routing.expert_ids  # [L, B, T, K]
    # One count over domain and expert; padding is counted under a domain beyond the last one.
    cell = jnp.where(mask, domains, num_domains)[None, ..., None] * num_experts + ids
    count = jax.vmap(lambda c: balance.load(c[..., None], (num_domains + 1) * num_experts))(cell.reshape(len(ids), -1))
    return count.reshape(len(ids), num_domains + 1, num_experts)[:, :num_domains].swapaxes(0, 1)


def score_tokens(model: Transformer, batch: dict[str, Array], num_domains: int = 0) -> Scores:
    """Compute negative log-likelihoods, and how often each head's draft would be accepted under greedy decoding.

    Head k (from 0) at position i drafts token i+k+2. The model, given the true tokens up to i+k+1, predicts its own. A
    draft of head k counts only if all drafts before it were right, for parallel heads as for a chain.

    Args: num_domains: count the load of so many domains too, by the batch's `domains`.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(cfg))  # all weights are 0
        >>> one = jnp.ones((1, 4), jnp.int32)
        >>> batch = {"tokens": one, "segment_ids": one, "positions": jnp.arange(4)[None]}
        >>> nll = jax.jit(lambda: score_tokens(model, batch).nll)()
        >>> nll.shape, round(float(nll[0, 0]), 2)  # even odds over 260 tokens: ln 260
        ((1, 3), 5.56)
    """
    tokens, segment_ids, loss_mask = batch["tokens"], batch["segment_ids"], batch.get("loss_mask")
    out = model.forward_hidden(tokens, segment_ids, batch["positions"])
    matrix = model.head_matrix()
    wanted, mask = targets(tokens, segment_ids, 1, loss_mask)
    nll, own = _score(out.h[:, :-1], matrix, wanted)
    agree, drafted = [], []
    alive = mask
    for ahead, h in enumerate(out.mtp_h, start=2):
        length = tokens.shape[1] - ahead
        wanted, mask_k = targets(tokens, segment_ids, ahead, loss_mask)
        _, draft = _score(h[:, :length], matrix, wanted)
        alive = alive[:, :length] & mask_k
        same = draft == own[:, ahead - 1 : ahead - 1 + length]
        drafted.append(alive.sum(dtype=jnp.float32))
        alive = alive & same
        agree.append(alive.sum(dtype=jnp.float32))
    none = jnp.zeros((0,), jnp.float32)
    by_domain = _domain_load(out, segment_ids != 0, batch.get("domains"), num_domains, model.cfg.num_experts)
    agreed, counted = (jnp.stack(x) if x else none for x in (agree, drafted))
    return Scores(nll, mask, agreed, counted, _load(out), by_domain)


def _score(h: Array, matrix: Array, wanted: Array) -> tuple[Array, Array]:
    """(negative log-likelihood of the wanted token, the likeliest token), both [B, S]."""

    def score(matrix, h, wanted):
        scored = token_scores(h.reshape(-1, h.shape[-1]), matrix, wanted.reshape(-1))
        return (), tuple(x.reshape(wanted.shape) for x in scored)

    return shard_map_over_batch(score, (matrix,), h, wanted)[1]
