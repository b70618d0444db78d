"""The cost of a cache in quality: the same text read through caches of several dtypes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.data.batches import Batch
from dsv3_jax.model.cache import pick_dtype, pick_kind
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.decode import make_cache, prepare_decode, run_layers
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.cross_entropy import token_scores
from dsv3_jax.training.loss import targets


@dataclass(frozen=True)
class CacheQuality:
    """A model's quality when it reads through a cache of some dtype."""

    val_loss: float  # nats a token
    agreement: float  # share of tokens whose likeliest successor is the exact cache's
    bytes_per_token: int


# Tokens read at a time: each attends to cached rows alone, its own too, as in decoding.
TOKENS_A_STEP = 16


def cache_quality(
    model: Transformer, batches: Sequence[Batch], dtypes: Sequence[str], cache: str | None = None
) -> dict[str, CacheQuality]:
    """Read held-out rows through caches. Each row is one text, whose documents see one another.

    Args:
        dtypes: of cached rows; all are compared with the first, which should be the exact one,
            "float32".
        cache: "latent" or "expanded". None means the model's own.
    Raises: ValueError for an unknown kind or dtype.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.data.batches import one_row
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(cfg))  # all are 0
        >>> quality = cache_quality(model, [one_row(b"x = 1")], ["int8"])["int8"]
        >>> round(quality.val_loss, 2), quality.bytes_per_token  # ln 260; 48 int8 and 2 float32
        (5.56, 56)
    """
    cfg = model.cfg
    kind = pick_kind(model.cfg, cache)
    graphdef, state = nnx.split(model)
    found: dict[str, CacheQuality] = {}
    exact: list[np.ndarray] = []
    for name in dtypes:
        dtype = pick_dtype(model.compute_dtype, name)
        nats = 0.0
        same = 0.0
        count = 0.0
        for i, batch in enumerate(batches):
            tokens = jnp.asarray(batch["tokens"])
            scored = _through_cache(graphdef, state, tokens, kind=kind, dtype=dtype)
            nll, best = map(np.asarray, scored)
            if len(exact) == i:  # the first dtype
                exact.append(best)

            # Only targets of the loss count: none at the end of a document, or in padding.
            segment_ids = jnp.asarray(batch["segment_ids"])
            loss_mask = jnp.asarray(batch["loss_mask"]) if "loss_mask" in batch else None
            mask = np.asarray(targets(tokens, segment_ids, 1, loss_mask)[1])
            nats += nll.astype(np.float64)[mask].sum()
            count += mask.sum()
            same += (best == exact[i])[mask].sum()
        count = max(count, 1)
        found[name] = CacheQuality(
            float(nats / count), float(same / count), bytes_per_token(cfg, kind, dtype)
        )
    return found


@partial(jax.jit, static_argnames=("graphdef", "kind", "dtype"))
def _through_cache(graphdef, state, tokens, *, kind, dtype):
    """(negative log-likelihood of each next token, the likeliest one), both [B, T - 1]."""
    # Whole steps: rows of padding at the end are read, and cut off again.
    model = nnx.merge(graphdef, state)
    batch, length = tokens.shape
    steps = -(-length // TOKENS_A_STEP)
    padded = jnp.pad(tokens, ((0, 0), (0, steps * TOKENS_A_STEP - length)))
    start = make_cache(model, batch, steps * TOKENS_A_STEP, kind, dtype)
    weights = prepare_decode(model)

    def read(cache, part):
        x, cache, _ = run_layers(model, part, cache, weights)
        return cache.at_lengths(cache.lengths + TOKENS_A_STEP), model.norm(x)

    # [steps, B, TOKENS_A_STEP, D] → [B, T − 1, D]: the last token predicts none.
    _, h = jax.lax.scan(read, start, padded.reshape(batch, steps, TOKENS_A_STEP).swapaxes(0, 1))
    h = h.swapaxes(0, 1).reshape(batch, steps * TOKENS_A_STEP, -1)[:, : length - 1]
    wanted = tokens[:, 1:].reshape(-1)
    scored = token_scores(h.reshape(-1, h.shape[-1]), model.head_matrix(), wanted)
    return tuple(x.reshape(batch, length - 1) for x in scored)
