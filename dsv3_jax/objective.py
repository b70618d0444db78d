"""What training minimises: L = L_main + (λ/M)·Σ_k L_k + balance losses, each L a mean over positions with a target.

Source: DeepSeek-V3 report, equations 17-25.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.modules.transformer import Trace, Transformer
from dsv3_jax.ops.losses import chunked_cross_entropy, token_scores


class Losses(NamedTuple):
    """One batch's losses; float32 scalars, and load [Lmoe + M, E]: the trunk's sparse layers, then the MTP blocks."""

    total: Array
    main: Array  # nats a token
    mtp: Array  # [M] nats a token
    balance: Array
    accuracy: Array  # share of next tokens that are the argmax
    load: Array
    dropped: Array  # share of assignments dropped, mean over layers


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
) -> Losses:
    """All losses of a batch.

    Args:
        batch: tokens, segment_ids, positions, int32 [B, T].
        mtp_weight: λ.
        counts: what to divide the sums by, from `target_counts`; of the whole batch where this is a part of one.
        share: of the whole batch that this part is: the weight of its balance losses.
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
        total, right = chunked_cross_entropy(
            h[:, :length].reshape(-1, h.shape[-1]), head, wanted.reshape(-1), mask.reshape(-1)
        )
        nats.append(total / counts[ahead - 1])
        correct.append(right / counts[ahead - 1])
    main, mtp = nats[0], jnp.stack(nats[1:]) if nats[1:] else jnp.zeros((0,), jnp.float32)
    load, balance, dropped = _routing_sums(trace)
    balance = balance * share
    total = main + balance
    if len(nats) > 1:
        total = total + mtp_weight * mtp.mean()
    return Losses(total, main, mtp, balance, correct[0], load, dropped * share)


def _routing_sums(trace: Trace) -> tuple[Array, Array, Array]:
    loads, balance, dropped = [], jnp.zeros((), jnp.float32), []
    if trace.routing is not None:
        loads.append(trace.routing.load)
        balance = balance + trace.routing.balance_loss.sum()
        dropped.append(trace.routing.dropped)
    for r in trace.mtp_routing:
        loads.append(r.load[None])
        balance = balance + r.balance_loss
        dropped.append(r.dropped[None])
    if not loads:
        return jnp.zeros((0, 1), jnp.float32), balance, jnp.zeros((), jnp.float32)
    return jnp.concatenate(loads), balance, jnp.concatenate(dropped).mean()


class Scores(NamedTuple):
    """Token by token, for evaluation. `mask` says which positions have a target."""

    nll: Float[Array, "B S"]  # S = T-1: nats of each next token
    mask: Bool[Array, "B S"]
    agree: Float[Array, " M"]  # positions where MTP depth k drafts what the model itself then says
    drafted: Float[Array, " M"]  # positions counted
    load: Float[Array, "L E"]


def scores(model: Transformer, batch: dict[str, Array]) -> Scores:
    """Negative log-likelihoods, and how often each MTP depth's draft would be accepted under greedy decoding.

    Depth k at position i drafts token i+k+2; the model, shown the true tokens up to i+k+1, says its own. A draft
    at depth k counts where all shallower ones were right as well, as in a chain.
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
        nll, mask, jnp.stack(agree) if agree else none, jnp.stack(drafted) if drafted else none, _routing_sums(trace)[0]
    )


def _score(h, head, tokens, segment_ids, ahead):
    wanted, mask = targets(tokens, segment_ids, ahead)
    nll, best = token_scores(h.reshape(-1, h.shape[-1]), head, wanted.reshape(-1))
    return nll.reshape(wanted.shape), best.reshape(wanted.shape), mask
