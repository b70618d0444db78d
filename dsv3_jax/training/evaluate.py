"""Held-out measures: loss, bits a byte (in all and by domain), MaxVio over the whole set, MTP acceptance.

Also the cost of a cache in quality: the same text read through caches of other dtypes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.cluster import processes
from dsv3_jax.data.batches import Batch, model_inputs
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model.cache import pick_dtype, pick_kind
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops import balance
from dsv3_jax.ops.cross_entropy import token_scores
from dsv3_jax.training.loss import score_tokens, targets

MOST_DOMAINS = 32  # whose load is counted apart


@partial(jax.jit, static_argnames=("graphdef", "num_domains"))
def _scores(graphdef, state, batch, num_domains=0):
    return score_tokens(nnx.merge(graphdef, state), batch, num_domains)


def evaluate(
    model: Transformer,
    batches: Sequence[Batch],
    tokenizer: Tokenizer,
    domains: Sequence[str] = (),
    mesh: Mesh | None = None,
    mix: Mapping[str, float] | None = None,
) -> dict[str, object]:
    """Measure a model on held-out batches; on a mesh their rows are sharded over its devices.

    Held-out rows have as much of each domain, and training has not. So MaxVio of all rows mixes uneven load with
    another mix of domains. `max_vio_training_mix` weights each domain's load by its share of the training tokens, and
    `max_vio_by_domain` is that of each domain alone.

    Args: mix: bytes of the training text by domain, see `Source.training_bytes`. None means unknown.
    Returns: val_loss (nats a token), val_bits_per_byte, mtp_acceptance (list, a share a depth), load ([L, E] float
    array: the trunk's sparse layers, then the heads with experts), and bits_per_byte_by_domain where `domains` names
    them. MaxVio, each the mean over layers: max_vio_global of all rows, max_vio_by_domain and max_vio_training_mix of
    the trunk's sparse layers, and max_vio_mtp of the heads. Bits a byte divide by the bytes of the target tokens;
    special tokens have none, but their cost counts.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.data.batches import one_row
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(cfg))  # all weights are 0
        >>> result = evaluate(model, [one_row(b"x = 1")], ds.tokenizer.load("bytes"))
        >>> round(result["val_bits_per_byte"], 2)  # even odds over 260 tokens: log2 260
        8.02
    """
    graphdef, state = nnx.split(model)
    nats, tokens, size = 0.0, 0.0, 0.0
    agree, drafted, load, domain_load = 0.0, 0.0, 0.0, 0.0
    apart = 1 < len(domains) <= MOST_DOMAINS and model.cfg.num_sparse_layers > 0
    by_domain = {name: np.zeros(2) for name in domains}
    for batch in batches:
        inputs = model_inputs(batch) | ({"domains": batch["domains"]} if apart else {})
        placed = processes.put(inputs, mesh, len(batch["tokens"]))
        out = processes.fetch(_scores(graphdef, state, placed, len(domains) if apart else 0), mesh)
        nll = np.where(out.mask, out.nll, 0).astype(np.float64)
        bytes_ = np.where(out.mask, tokenizer.byte_lengths[batch["tokens"][:, 1:]], 0)
        nats, tokens, size = nats + nll.sum(), tokens + out.mask.sum(), size + bytes_.sum()
        agree, drafted, load = agree + out.agree, drafted + out.drafted, load + out.load
        domain_load = domain_load + out.domain_load
        for i, name in enumerate(domains):
            here = batch["domains"][:, 1:] == i
            by_domain[name] += nll[here].sum(), bytes_[here].sum()
    to_bits = 1 / np.log(2)
    result: dict[str, object] = {
        "val_loss": float(nats / max(tokens, 1)),
        "val_bits_per_byte": float(nats * to_bits / max(size, 1)),
        "mtp_acceptance": [float(a) for a in np.atleast_1d(agree / np.maximum(drafted, 1))],
        "load": load,
    }
    layers = model.cfg.num_sparse_layers
    if layers:
        result["max_vio_global"] = _max_vio(np.asarray(load)[:layers])
    if len(np.atleast_2d(load)) > layers and np.size(load):
        result["max_vio_mtp"] = _max_vio(np.asarray(load)[layers:])
    if apart:
        read = {name: part for name, part in zip(domains, np.asarray(domain_load), strict=True) if part.any()}
        result["max_vio_by_domain"] = {name: _max_vio(part) for name, part in read.items()}
        if mix is not None and set(domains) == set(read):
            tokens_a_byte = np.array([read[name][0].sum() / max(by_domain[name][1], 1) for name in domains])
            mixed = training_mix(np.stack([read[name] for name in domains]), tokens_a_byte, [mix[n] for n in domains])
            result["max_vio_training_mix"] = mixed
    if domains:
        result["bits_per_byte_by_domain"] = {name: float(n * to_bits / s) for name, (n, s) in by_domain.items() if s}
    return result


def training_mix(load: np.ndarray, tokens_a_byte: np.ndarray, mix: Sequence[float]) -> float | None:
    """MaxVio, mean over layers, of the load of domains as they are mixed in training; None if a domain has no load.

    Args:
        load: [N, L, E], of what was read of each domain.
        tokens_a_byte: [N], as it was read: the bytes of training become tokens by it. Any unit that all domains share.
        mix: [N] bytes of the training text.

    Example:
        >>> load = np.array([[[3.0, 1.0]], [[0.0, 4.0]]])  # two domains, one layer
        >>> training_mix(load, np.ones(2), [2.0, 1.0])  # 1.5 to 1.5
        0.0
    """
    sums = load[:, 0].sum(-1)
    if not sums.all():
        return None
    weights = np.asarray(mix) * tokens_a_byte / sums
    return _max_vio((weights[:, None, None] * load).sum(0))


def _max_vio(load: np.ndarray) -> float:
    """Mean over layers."""
    return float(balance.max_vio(jnp.asarray(load, jnp.float32)).mean())


@dataclass(frozen=True)
class CacheQuality:
    """A model's quality when it reads through a cache of some dtype."""

    val_loss: float  # nats a token
    agreement: float  # share of tokens whose likeliest successor is the exact cache's
    bytes_per_token: int


STEP = 16  # tokens read at a time: each attends to cached rows alone, its own too, as in decoding


def cache_quality(
    model: Transformer, batches: Sequence[Batch], dtypes: Sequence[str], cache: str | None = None
) -> dict[str, CacheQuality]:
    """Read held-out rows through caches, each row as one text: its documents see one another.

    Args:
        dtypes: of cached rows; all are compared with the first, which should be the exact one, "float32".
        cache: "latent" or "expanded". None means the model's own.
    Raises: ValueError for an unknown kind or dtype.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.data.batches import one_row
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(cfg))  # all weights are 0
        >>> quality = cache_quality(model, [one_row(b"x = 1")], ["int8"])["int8"]
        >>> round(quality.val_loss, 2), quality.bytes_per_token  # ln 260; 48 numbers and two float32 scales
        (5.56, 56)
    """
    cfg, kind = model.cfg, pick_kind(model.cfg, cache)
    graphdef, state = nnx.split(model)
    found: dict[str, CacheQuality] = {}
    exact: list[np.ndarray] = []
    for name in dtypes:
        nats, same, count = 0.0, 0.0, 0.0
        for i, batch in enumerate(batches):
            tokens, segment_ids = (jnp.asarray(batch[key]) for key in ("tokens", "segment_ids"))
            read = _through_cache(graphdef, state, tokens, kind=kind, dtype=pick_dtype(model.compute_dtype, name))
            nll, best = (np.asarray(x) for x in read)
            if len(exact) == i:
                exact.append(best)
            loss_mask = jnp.asarray(batch["loss_mask"]) if "loss_mask" in batch else None
            mask = np.asarray(targets(tokens, segment_ids, 1, loss_mask)[1])
            nats, count = nats + nll.astype(np.float64)[mask].sum(), count + mask.sum()
            same += (best == exact[i])[mask].sum()
        dtype = pick_dtype(model.compute_dtype, name)
        found[name] = CacheQuality(
            float(nats / max(count, 1)),
            float(same / max(count, 1)),
            bytes_per_token(cfg, kind, dtype),
        )
    return found


@partial(jax.jit, static_argnames=("graphdef", "kind", "dtype"))
def _through_cache(graphdef, state, tokens, *, kind, dtype):
    """(negative log-likelihood of each next token, the likeliest one), both [B, T - 1]."""
    model = nnx.merge(graphdef, state)
    batch, length = tokens.shape
    steps = -(-length // STEP)
    padded = jnp.pad(tokens, ((0, 0), (0, steps * STEP - length)))
    start, weights = model.empty_cache(batch, steps * STEP, kind, dtype), model.prepare_decode()

    def read(cache, part):
        x, cache = model.run_layers(part, cache, weights)
        return cache.at_lengths(cache.lengths + STEP), model.norm(x)

    _, h = jax.lax.scan(read, start, padded.reshape(batch, steps, STEP).swapaxes(0, 1))
    h = h.swapaxes(0, 1).reshape(batch, steps * STEP, -1)[:, : length - 1]
    scored = token_scores(h.reshape(-1, h.shape[-1]), model.head_matrix(), tokens[:, 1:].reshape(-1))
    return tuple(x.reshape(batch, length - 1) for x in scored)
