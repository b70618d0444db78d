"""What training minimises: L = L_main + (λ/M)·Σ_k L_k + balance losses, each a mean over targets.

With sparse attention, the indexers' losses are added (`model.sparse.DSA`). They share no
parameter with the others. In its warm-up they are the total.

L_k is the cross-entropy of head k on the text's own tokens, and what else its kind adds
(`model.mtp.Head`). On a frozen trunk it may be the head's distance to the trunk's own distribution
instead (`ops.draft_loss`).

With `RunConfig.grpo`, L_main is the loss of `training.policy` on answers that the model wrote.
Source: DeepSeek-V3 report, equations 17-25.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Grpo, HeadLoss
from dsv3_jax.mesh.length import by_layout, first, later, shards_length
from dsv3_jax.mesh.logits import score_by_rows
from dsv3_jax.mesh.sharding import shard_map_over_batch
from dsv3_jax.model.moe import LayerRouting
from dsv3_jax.model.transformer import ForwardOut, Transformer
from dsv3_jax.ops import balance
from dsv3_jax.ops.draft_loss import summed_distance
from dsv3_jax.training import metrics
from dsv3_jax.training.metrics import Metrics
from dsv3_jax.training.policy import policy_loss


class Losses(NamedTuple):
    """One batch's losses, float32 scalars; load [L, E]: sparse layers, then heads with experts."""

    total: Array
    main: Array  # nats a token
    # [M] nats a token; with head_loss="tv" the mean share of drafts that sampling rejects
    mtp: Array
    # what heads add to their cross-entropy (EAGLE's regression), mean over positions; 0 without
    feature: Array
    balance: Array
    accuracy: Array  # share of next tokens that are the argmax
    load: Array
    metrics: Metrics  # of blocks
    # [L, E]: what the bias's rule needs beside the load; rows as of load
    bias_measure: Array | None = None


def targets(
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    ahead: int,
    loss_mask: Bool[Array, "B T"] | None = None,
) -> tuple[Array, Array]:
    """Tokens `ahead` on, and which positions have one in their own segment: two [B, T - ahead].

    Args: loss_mask: tokens that may be targets, as an assistant's in a chat. None means all.

    Example:
        >>> tokens, segment_ids = jnp.array([[5, 6, 7, 8]]), jnp.array([[1, 1, 2, 2]])
        >>> targets(tokens, segment_ids, ahead=1)
        (Array([[6, 7, 8]], dtype=int32), Array([[ True, False,  True]], dtype=bool))
    """
    here = first(segment_ids, ahead)
    there = later(segment_ids, ahead)
    mask = (here == there) & (here != 0)
    return later(tokens, ahead), mask if loss_mask is None else mask & later(loss_mask, ahead)


def target_counts(
    segment_ids: Int[Array, "B T"], depths: int, loss_mask: Bool[Array, "B T"] | None = None
) -> Float[Array, " depths"]:
    """Count positions with a target 1, 2, …, `depths` positions on; at least 1, to divide by.

    Args: loss_mask: as in `targets`.

    Example:
        >>> target_counts(jnp.array([[1, 1, 1, 2]]), depths=2)
        Array([2., 1.], dtype=float32)
    """
    counts = [
        targets(segment_ids, segment_ids, a, loss_mask)[1].sum(dtype=jnp.float32)
        for a in range(1, depths + 1)
    ]
    return jnp.maximum(jnp.stack(counts), 1)


class Part(NamedTuple):
    """How a part of a batch counts in the complete batch, so that losses of parts add up to its.

    Attributes:
        counts: divisors of sums over targets, from `target_counts` of the complete batch.
        token_counts: the same of sums over all tokens, from `model.mtp.token_counts`: z-loss and
            indexers' losses.
        share: of the complete batch's rows: the weight of its other balance losses.

    None means that the part is the batch.
    """

    counts: Float[Array, " depths"] | None = None
    token_counts: Float[Array, " depths"] | None = None
    share: float = 1.0


COMPLETE = Part()


@by_layout
def compute_loss(
    model: Transformer,
    batch: dict[str, Array],
    mtp_weight: Float[Array, ""] | float | None,
    *,
    head_loss: HeadLoss = "ce",
    watch: tuple[str, ...] = (),
    grpo: Grpo | None = None,
    part: Part = COMPLETE,
    one_document: bool = False,
) -> Losses:
    """Compute all losses of a batch, or of a part of one.

    Args:
        batch: tokens, segment_ids, positions, int32 [B, T]; loss_mask, bool [B, T], if not all
            tokens are targets; expert_ids, int32 [B, L, T, K], experts that take the place of the
            routers' choices, of the trunk's sparse layers and then of heads with experts; of
            answers their advantages, old_logprobs and possibly start_logprobs, float32 [B, T].
        mtp_weight: λ. None: the total has the multi-token heads alone, (1/M)·Σ_k L_k and their
            balance losses; there is no other loss to weigh them against.
        head_loss: "kl" or "tv": heads learn the trunk's distribution of a token, not the text's
            token.
        watch: see `model.context.How`.
        grpo: L_main is that of `training.policy`. None means the cross-entropy.
        part: of a complete batch, whose counts divide the sums.
        one_document: see `Transformer.forward_hidden`.

    Example:
        >>> import numpy as np, dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(cfg))  # all 0
        >>> one = jnp.ones((1, 4), jnp.int32)
        >>> batch = {"tokens": one, "segment_ids": one, "positions": jnp.arange(4)[None]}
        >>> main = jax.jit(lambda model: compute_loss(model, batch, mtp_weight=0.0).main)(model)
        >>> round(float(main), 2)  # even odds over 260 tokens: ln 260
        5.56
    """
    tokens = batch["tokens"]
    segment_ids = batch["segment_ids"]
    loss_mask = batch.get("loss_mask")
    share = part.share

    # The forward pass. Its z-losses and indexers' losses are divided by the complete batch's
    # counts. So the factor `share`, which they get below with all balance losses, must cancel.
    given = _given(model, batch.get("expert_ids"))
    divisors = None if part.token_counts is None else part.token_counts * share
    out = model.forward_hidden(
        tokens,
        segment_ids,
        batch["positions"],
        how=model.how(watch=frozenset(watch)),
        expert_ids=given,
        counts=divisors,
        one_document=one_document,
    )

    # L_main, of the text or of answers, and the losses of the heads.
    counts = part.counts
    if counts is None:
        counts = target_counts(segment_ids, 1 + len(out.mtp_h), loss_mask)
    (main, *nats), accuracy, feature = _token_losses(model, out, batch, counts, head_loss)
    of_blocks = out.metrics
    if grpo is not None:  # the compiler leaves the trunk's cross-entropy out
        main, accuracy, of_answers = _of_answers(model, out, batch, counts[0], share, grpo)
        of_blocks = of_blocks | {"answers": of_answers}
    mtp = jnp.zeros((0,), jnp.float32)
    heads = jnp.zeros((), jnp.float32)
    if nats:
        mtp = jnp.stack(nats)
        heads = feature + model.mtp[0].token_weight * mtp.mean()

    # The total.
    balance = _balance(out, heads_only=mtp_weight is None) * share
    total = heads + balance if mtp_weight is None else main + balance + mtp_weight * heads

    # Indexers learn on the side; in their warm-up there is nothing else to learn.
    indexers = [of["index_kl"].sum() * share for of in out.metrics.values() if "index_kl" in of]
    if indexers:
        own = jnp.stack(indexers).sum()
        total = own if "index_warm" in watch else total + own

    # What moves the routers' biases, beside the load.
    measures = [r.bias_measure for r in _routings(out) if r.bias_measure is not None]
    measure = jnp.concatenate(measures) * share if measures else None
    return Losses(total, main, mtp, feature, balance, accuracy, _load(out), of_blocks, measure)


def _given(model: Transformer, expert_ids: Array | None) -> tuple[Array | None, ...]:
    """A batch's expert_ids for `forward_hidden`: [Lmoe, B, T, K], then head k's [B, T-k, K]."""
    if expert_ids is None:
        return (None,)
    trunk, heads = jnp.split(jnp.moveaxis(expert_ids, 1, 0), [model.cfg.num_sparse_layers])
    return trunk, *(ids[:, :-k] for k, ids in enumerate(heads, start=1))


def _token_losses(
    model: Transformer, out: ForwardOut, batch: dict[str, Array], counts: Array, head_loss: HeadLoss
) -> tuple[list[Array], Array, Array]:
    """(Mean losses of trunk and heads; the trunk's accuracy; what heads add to cross-entropy.)"""
    matrix = model.head_matrix()

    def summed(score: Callable, *rows: Array) -> Any:
        """`score(*rows, matrix)`, added up over the devices; rows are tokens."""

        @jax.named_scope("loss")
        def local(matrix: Array, *rows: Array) -> tuple[Any, tuple]:
            return score(*(x.reshape(-1, *x.shape[2:]) for x in rows), matrix), ()

        return shard_map_over_batch(local, rows[0])(matrix, *rows)[0]

    def cross_entropy(h: Array, wanted: Array, mask: Array, matrix: Array) -> tuple[Array, Array]:
        return model.kernels("cross_entropy", h, matrix, wanted, mask)

    def distance(h: Array, trunk: Array, mask: Array, matrix: Array) -> Array:
        # never called with head_loss="ce"
        return summed_distance(h, trunk, matrix, mask, head_loss)  # type: ignore[arg-type]

    # Depth 0 is the trunk, depth k the head that predicts k tokens further on.
    nats = []
    accuracy = jnp.zeros(())
    feature = jnp.zeros((), jnp.float32)
    for k, h, wanted, mask in _by_depth(out, batch):
        trunk = later(out.h, k, end=1)  # from these it predicts the same tokens
        if k and head_loss != "ce":
            total = summed(distance, h, trunk, mask)
        else:
            total, right = summed(cross_entropy, h, wanted, mask)
            accuracy = accuracy if k else right / counts[0]
        nats.append(total / counts[k])

        # Some heads also learn the trunk's hidden state, which takes no gradient of it.
        loss = model.mtp[k - 1].feature_loss(h, jax.lax.stop_gradient(trunk)) if k else None
        if loss is not None:
            feature += (loss * mask.astype(jnp.float32)).sum() / counts[k] / len(out.mtp_h)
    return nats, accuracy, feature


def _of_answers(
    model: Transformer,
    out: ForwardOut,
    batch: dict[str, Array],
    count: Array,
    share: float,
    cfg: Grpo,
) -> tuple[Array, Array, dict[str, Array]]:
    """(GRPO's loss, accuracy, measures of `policy_loss`): the parts' mean is the batch's."""
    _, h, wanted, mask = next(_by_depth(out, batch))
    nats, best = score_by_rows(h, model.head_matrix(), wanted, cfg.temperature)
    right = jnp.where(mask, best == wanted, False).sum(dtype=jnp.float32)

    # What the sampler and the start said of each token, at the position that predicts it.
    of_wanted = {name: x[:, 1:] for name, x in batch.items() if x.ndim == 2}
    start = of_wanted.get("start_logprobs")
    loss, found = policy_loss(
        -nats, of_wanted["old_logprobs"], start, of_wanted["advantages"], mask, cfg
    )

    # Sums become means over the complete batch; a maximum stays one.
    tokens = count if cfg.form == "token_mean" else len(wanted) / share * cfg.max_new_tokens
    means = {name: x if name.startswith("max_") else x / count / share for name, x in found.items()}
    return loss / tokens, right / count, means


def _by_depth(
    out: ForwardOut, batch: dict[str, Array]
) -> Iterator[tuple[int, Array, Array, Array]]:
    """Yield (k, hidden states, targets, mask): k is 0 for the trunk, else a head's number."""
    for k, h in enumerate((out.h, *out.mtp_h)):
        wanted, mask = targets(batch["tokens"], batch["segment_ids"], k + 1, batch.get("loss_mask"))
        yield k, h[:, : wanted.shape[1]], wanted, mask


def _routings(out: ForwardOut, heads_only: bool = False) -> list[LayerRouting]:
    """Routing of sparse layers, then of heads with experts; each has a leading layer axis."""
    heads = [jax.tree.map(lambda x: x[None], r) for r in out.mtp_routing]
    return heads if heads_only or out.routing is None else [out.routing, *heads]


def _balance(out: ForwardOut, heads_only: bool = False) -> Array:
    losses = (r.balance_loss.sum() for r in _routings(out, heads_only))
    return sum(losses, jnp.zeros((), jnp.float32))


def _load(out: ForwardOut) -> Array:
    """The load, [L, E]."""
    routings = _routings(out)
    if not routings:
        return jnp.zeros((0, 1), jnp.float32)
    return jnp.concatenate([r.load for r in routings])


def over_parts(parts: Losses) -> Losses:
    """The losses of a batch, from its stacked parts: sums, and metrics by their rules.

    Example:
        >>> found = {"max_logit": jnp.array([[1.0, 7.0], [2.0, 3.0]])}
        >>> parts = Losses(*[jnp.ones(2)] * 7, metrics={"dense": found})
        >>> batch = over_parts(parts)
        >>> batch.main, batch.metrics["dense"]["max_logit"]
        (Array(2., dtype=float32), Array([2., 7.], dtype=float32))
    """
    total = jax.tree.map(lambda x: x.sum(0), parts._replace(metrics={}))
    return total._replace(metrics=metrics.over_parts(parts.metrics))


class Scores(NamedTuple):
    """Token by token, for evaluation. `mask` says which positions have a target."""

    nll: Float[Array, "B S"]  # S = T-1: nats of each next token
    mask: Bool[Array, "B S"]
    agree: Float[Array, " M"]  # positions where a head drafts what the model itself then predicts
    drafted: Float[Array, " M"]  # positions counted
    load: Float[Array, "L E"]
    # of the trunk's sparse layers, by the tokens' domain; N = 0 without domains
    domain_load: Float[Array, "N L E"]


def _domain_load(
    out: ForwardOut, mask: Array, domains: Array | None, num_domains: int, num_experts: int
) -> Array:
    """Count the trunk's assignments by domain: tokens of padding do not count."""
    if out.routing is None or domains is None or not num_domains:
        return jnp.zeros((0, 0, num_experts), jnp.float32)
    ids = out.routing.expert_ids  # [L, B, T, K]
    # One count over domain and expert; padding is counted under a domain beyond the last one.
    cell = jnp.where(mask, domains, num_domains)[None, ..., None] * num_experts + ids
    count_cells = jax.vmap(lambda c: balance.load(c[..., None], (num_domains + 1) * num_experts))
    count = count_cells(cell.reshape(len(ids), -1))
    return count.reshape(len(ids), num_domains + 1, num_experts)[:, :num_domains].swapaxes(0, 1)


@by_layout
def score_tokens(model: Transformer, batch: dict[str, Array], num_domains: int = 0) -> Scores:
    """Compute negative log-likelihoods, and how often greedy decoding would accept a head's draft.

    Head k = 1 … M at position i drafts token i+k+1. The model, given the true tokens up to i+k,
    predicts its own. A draft of head k counts only if all drafts before it were right, for parallel
    heads as for a chain.

    Args: num_domains: count the load of so many domains too, by the batch's `domains`.

    Example:
        >>> import numpy as np, dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(cfg))  # all 0
        >>> one = jnp.ones((1, 4), jnp.int32)
        >>> batch = {"tokens": one, "segment_ids": one, "positions": jnp.arange(4)[None]}
        >>> nll = jax.jit(lambda model: score_tokens(model, batch).nll)(model)
        >>> nll.shape, round(float(nll[0, 0]), 2)  # even odds over 260 tokens: ln 260
        ((1, 3), 5.56)
    """
    segment_ids = batch["segment_ids"]
    matrix = model.head_matrix()
    out = model.forward_hidden(batch["tokens"], segment_ids, batch["positions"])

    # The trunk: the nats of each token, and the token that it predicts itself.
    (_, h, wanted, mask), *heads = _by_depth(out, batch)
    nll, own = score_by_rows(h, matrix, wanted)

    # The heads: a draft is compared with that; it is alive while all before it were right.
    agree = []
    drafted = []
    alive = mask
    for k, h, wanted, is_target in heads:
        _, draft = score_by_rows(h, matrix, wanted)
        alive = first(alive, 1) & is_target
        drafted.append(alive.sum(dtype=jnp.float32))
        alive = alive & (draft == later(own, k))
        agree.append(alive.sum(dtype=jnp.float32))

    by_domain = _domain_load(
        out, segment_ids != 0, batch.get("domains"), num_domains, model.cfg.num_experts
    )
    if shards_length():  # the last place has no target
        nll, mask = nll[:, :-1], mask[:, :-1]
    agreed, counted = (jnp.array(x, jnp.float32) for x in (agree, drafted))
    return Scores(nll, mask, agreed, counted, _load(out), by_domain)
