"""The worth of an expert: the loss without its output, expert by expert.

The expert's gate is set to 0 wherever it is chosen. No other expert takes its place, and the other
gates stay. So this is the damage of a missing expert, not what another would have done for it.
Experts that do the same may each seem to be worth little.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float64, Int

from dsv3_jax.data.batches import Batch
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.stats.decisions import token_nll
from dsv3_jax.stats.reading import first_batches

TOKENS = 8192  # read for each expert, at most
RESAMPLES = 1000  # of the documents


class Worth(NamedTuple):
    """Losses of the trunk in nats a token, of the same tokens."""

    loss: float  # with all experts
    without: Float64[np.ndarray, "L E"]  # trunk's sparse layers
    low: Float64[np.ndarray, "L E"]  # of without − loss: 95 % of resamples of the documents
    high: Float64[np.ndarray, "L E"]
    tokens: int  # that have a loss
    documents: int
    resamples: int


def worth(
    model: Transformer,
    batches: Sequence[Batch],
    *,
    tokens: int = TOKENS,
    resamples: int = RESAMPLES,
    seed: int = 0,
    follow: Callable[[Iterable, int, str], Iterable] = lambda items, count, name: items,
) -> Worth:
    """Measure the loss without each routed expert of the trunk: a pass an expert over one text.

    The program is compiled once: the expert is an argument.

    Args:
        batches: the first ones are read, up to `tokens` tokens and at least one batch.
        resamples: of the documents, for the intervals; seed: of them.
        follow: wraps the experts to show progress.
    Raises: ValueError for a trunk without experts, and text without a token that has a loss.

    Example:
        >>> from dsv3_jax.config import replace
        >>> from dsv3_jax.data.batches import one_row
        >>> from dsv3_jax.model.transformer import abstract
        >>> from dsv3_jax.presets import preset
        >>> cfg = replace(preset("tiny"), num_layers=1, num_dense_layers=0, dim=16, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(cfg))  # all are 0
        >>> found = worth(model, [one_row(b"x = 1")], resamples=2)
        >>> found.tokens, found.without.shape, float(abs(found.without - found.loss).max())
        (4, (1, 16), 0.0)
    """
    cfg = model.cfg
    if not cfg.num_sparse_layers:
        raise ValueError(
            f"the trunk has no experts to leave out: all of its {cfg.num_layers} layers are dense"
        )
    # The text goes to the device once, and every expert reads it there.
    read = first_batches(batches, tokens)
    graphdef, state = nnx.split(model)
    names, column = np.unique(
        np.concatenate([b["documents"].ravel() for b in read]), return_inverse=True
    )
    placed = [
        {key: jnp.asarray(b[key]) for key in ("tokens", "segment_ids", "positions")} for b in read
    ]
    target = np.concatenate([b.get("loss_mask", b["segment_ids"] != 0).ravel() for b in read])

    def by_document(layer: int, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """Sums of nats and numbers of tokens, of each document."""
        muted = jnp.array([layer, expert], jnp.int32)
        nll = np.concatenate(
            [np.asarray(_nll(graphdef, state, batch, muted)).ravel() for batch in placed]
        )
        known = target & ~np.isnan(nll)
        where = column.ravel()[known]
        sums = np.bincount(where, nll[known].astype(np.float64), len(names))
        return sums, np.bincount(where, minlength=len(names))

    base, sizes = by_document(-1, -1)  # there is no such layer
    if not sizes.sum():
        raise ValueError("there is no token with a loss: each piece of the text has one token")
    layers = range(cfg.num_dense_layers, cfg.num_layers)
    experts = [(layer, expert) for layer in layers for expert in range(cfg.num_experts)]
    followed = follow(experts, len(experts), "experts")
    more = np.stack([by_document(*one)[0] - base for one in followed])  # [L E, S]

    # Each resample draws as many documents as there are, with repeats.
    present = sizes > 0
    rng = np.random.default_rng(seed)
    size = int(present.sum())
    weights = rng.multinomial(size, np.full(size, 1 / size), resamples)
    # [L E, resamples]
    drawn = more[:, present] @ weights.T / np.maximum(weights @ sizes[present], 1)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)

    shape = (len(layers), cfg.num_experts)
    total = sizes.sum()
    loss = base.sum() / sizes.sum()
    without = loss + more.sum(-1) / total
    return Worth(
        loss=float(loss),
        without=without.reshape(shape),
        low=low.reshape(shape),
        high=high.reshape(shape),
        tokens=int(total),
        documents=size,
        resamples=resamples,
    )


@partial(jax.jit, static_argnames="graphdef")
def _nll(
    graphdef: nnx.GraphDef, state: nnx.State, batch: dict[str, Array], muted: Int[Array, "2"]
) -> Float[Array, "B T"]:
    model = nnx.merge(graphdef, state)

    def mute(layer, ids, gates):
        return jnp.where((muted[0] == layer) & (muted[1] == ids), 0.0, gates)

    out = model.forward_hidden(
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        how=model.how(edit_gates=mute),
    )
    return token_nll(model, out.h, batch["tokens"], batch["segment_ids"])
