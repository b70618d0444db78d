"""What training minimises: L = L_main + (λ/M)·Σ_k L_k + balance losses, each L a mean over positions with a target.

L_k is the cross-entropy of head k on the text's own tokens, whatever its kind. EAGLE's head has 0.1 times that, and
a regression onto the trunk's next hidden state (arXiv 2401.15077, section 3.2; the paper takes the trunk's
distribution for the target in place of the tokens, and adds noise to what the head reads).
Source: DeepSeek-V3 report, equations 17-25.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.mesh.sharding import by_rows
from dsv3_jax.model.moe import LayerRouting
from dsv3_jax.model.transformer import Trace, Transformer
from dsv3_jax.ops.cross_entropy import chunked_cross_entropy, smooth_l1, token_scores

EAGLE_TOKEN_WEIGHT = 0.1  # of the cross-entropy, where the regression weighs 1


class Losses(NamedTuple):
    """One batch's losses; float32 scalars, and load [L, E]: the trunk's sparse layers, then the heads with experts."""

    total: Array
    main: Array  # nats a token
    mtp: Array  # [M] nats a token
    feature: Array  # EAGLE's regression, mean over positions and entries; 0 for other kinds
    balance: Array
    accuracy: Array  # share of next tokens that are the argmax
    load: Array
    dropped: Array  # share of assignments dropped, mean over layers
    crossed: Array  # copies of a token that go to another device's experts, mean over layers


def targets(tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"], ahead: int) -> tuple[Array, Array]:
    """Tokens `ahead` places on, and which positions have one in their own segment: two [B, T - ahead]."""
    here, there = segment_ids[:, :-ahead], segment_ids[:, ahead:]
    return tokens[:, ahead:], (here == there) & (here != 0)


def target_counts(segment_ids: Int[Array, "B T"], depths: int) -> Float[Array, " depths"]:
    """How many positions have a target 1, 2, …, `depths` places on; at least 1, to divide by."""
    counts = [targets(segment_ids, segment_ids, a)[1].sum(dtype=jnp.float32) for a in range(1, depths + 1)]
    return jnp.maximum(jnp.stack(counts), 1)


def losses(
    model: Transformer,
    batch: dict[str, Array],
    mtp_weight: Float[Array, ""] | float,
    *,
    counts: Float[Array, " depths"] | None = None,
    share: float = 1.0,
    heads_only: bool = False,
) -> Losses:
    """All losses of a batch.

    Args:
        batch: tokens, segment_ids, positions, int32 [B, T].
        mtp_weight: λ.
        counts: what to divide the sums by, from `target_counts`; of the whole batch where this is a part of one.
        share: of the whole batch that this part is: the weight of its balance losses.
        heads_only: the total is the multi-token heads' alone, (1/M)·Σ_k L_k and their balance losses: of λ nothing is
            left, for there is no other loss to weigh them against.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    trace = model.trace(tokens, segment_ids, batch["positions"])
    if counts is None:
        counts = target_counts(segment_ids, 1 + len(trace.mtp_h))
    head = model.head_matrix()
    nats, correct = [], []
    for ahead, h in enumerate((trace.h[:, :-1], *trace.mtp_h), start=1):
        length = tokens.shape[1] - ahead
        wanted, mask = targets(tokens, segment_ids, ahead)
        (total, right), _ = by_rows(_cross_entropy, (head,), h[:, :length], wanted, mask)
        nats.append(total / counts[ahead - 1])
        correct.append(right / counts[ahead - 1])
    main, mtp = nats[0], jnp.stack(nats[1:]) if nats[1:] else jnp.zeros((0,), jnp.float32)
    feature, heads = jnp.zeros((), jnp.float32), mtp.mean() if nats[1:] else jnp.zeros((), jnp.float32)
    if model.cfg.mtp_kind == "eagle" and nats[1:]:
        feature = _regression(trace, segment_ids) / counts[1]
        heads = feature + EAGLE_TOKEN_WEIGHT * heads
    balance = _balance(trace, heads_only) * share
    load, dropped, crossed = _load(trace)
    total = heads + balance if heads_only else main + balance + mtp_weight * heads
    return Losses(total, main, mtp, feature, balance, correct[0], load, dropped * share, crossed * share)


def _cross_entropy(head, h, wanted, mask) -> tuple[tuple[Array, Array], tuple[()]]:
    """For `by_rows`: (sums of nats and of right guesses, nothing a row)."""
    return chunked_cross_entropy(h.reshape(-1, h.shape[-1]), head, wanted.reshape(-1), mask.reshape(-1)), ()


def _regression(trace: Trace, segment_ids: Array) -> Array:
    """Of what EAGLE's head makes of position i onto h_{i+1}, summed over the positions whose token i+2 counts."""
    mask = targets(segment_ids, segment_ids, 2)[1]
    made, wanted = trace.mtp_h[0][:, : mask.shape[1]], jax.lax.stop_gradient(trace.h[:, 1:-1])
    return (smooth_l1(made, wanted) * mask.astype(jnp.float32)).sum()


def _routings(trace: Trace, heads_only: bool = False) -> list[LayerRouting]:
    """Of the trunk's sparse layers, then of the heads that have experts; each with a leading layer axis."""
    heads = [jax.tree.map(lambda x: x[None], r) for r in trace.mtp_routing]
    return heads if heads_only or trace.routing is None else [trace.routing, *heads]


def _balance(trace: Trace, heads_only: bool = False) -> Array:
    return sum((r.balance_loss.sum() for r in _routings(trace, heads_only)), jnp.zeros((), jnp.float32))


def _load(trace: Trace) -> tuple[Array, Array, Array]:
    """(load [L, E]; means over layers: share of assignments dropped, copies of a token that went elsewhere)."""
    routings = _routings(trace)
    if not routings:
        return jnp.zeros((0, 1), jnp.float32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    load, dropped, crossed = (
        jnp.concatenate(parts) for parts in zip(*((r.load, r.dropped, r.crossed) for r in routings), strict=True)
    )
    return load, dropped.mean(), crossed.mean()


class Scores(NamedTuple):
    """Token by token, for evaluation. `mask` says which positions have a target."""

    nll: Float[Array, "B S"]  # S = T-1: nats of each next token
    mask: Bool[Array, "B S"]
    agree: Float[Array, " M"]  # positions where head k drafts what the model itself then says
    drafted: Float[Array, " M"]  # positions counted
    load: Float[Array, "L E"]


def scores(model: Transformer, batch: dict[str, Array]) -> Scores:
    """Negative log-likelihoods, and how often each head's draft would be accepted under greedy decoding.

    Head k (from 0) at position i drafts token i+k+2; the model, shown the true tokens up to i+k+1, says its own. A
    draft of head k counts where all before it were right as well, for parallel heads as for a chain.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    trace = model.trace(tokens, segment_ids, batch["positions"])
    head = model.head_matrix()
    nll, own, mask = _score(trace.h[:, :-1], head, tokens, segment_ids, 1)
    agree, drafted = [], []
    alive = mask
    for ahead, h in enumerate(trace.mtp_h, start=2):
        length = tokens.shape[1] - ahead
        _, draft, mask_k = _score(h[:, :length], head, tokens, segment_ids, ahead)
        alive = alive[:, :length] & mask_k
        same = draft == own[:, ahead - 1 : ahead - 1 + length]
        drafted.append(alive.sum(dtype=jnp.float32))
        alive = alive & same
        agree.append(alive.sum(dtype=jnp.float32))
    none = jnp.zeros((0,), jnp.float32)
    return Scores(
        nll, mask, jnp.stack(agree) if agree else none, jnp.stack(drafted) if drafted else none, _load(trace)[0]
    )


def _score(h, head, tokens, segment_ids, ahead):
    wanted, mask = targets(tokens, segment_ids, ahead)

    def score(head, h, wanted):
        scored = token_scores(h.reshape(-1, h.shape[-1]), head, wanted.reshape(-1))
        return (), tuple(x.reshape(wanted.shape) for x in scored)

    _, (nll, best) = by_rows(score, (head,), h, wanted)
    return nll, best, mask
