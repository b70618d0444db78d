"""Held-out measures: loss, bits a byte (in all and by domain), MaxVio over the whole set, MTP acceptance."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.cluster import processes
from dsv3_jax.data.batches import Batch, model_inputs
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops import balance
from dsv3_jax.training.loss import Scores, score_tokens

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

    Held-out rows contain equal amounts of each domain; the training text does not. So MaxVio of all rows mixes uneven
    load with another mix of domains. `max_vio_training_mix` weights each domain's load by its share of the training
    tokens, and `max_vio_by_domain` is that of each domain alone.

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
    sums = _Sums(tokenizer, domains, model.cfg.num_sparse_layers, mix)
    for batch in batches:
        inputs = model_inputs(batch) | ({"domains": batch["domains"]} if sums.apart else {})
        placed = processes.put(inputs, mesh, len(batch["tokens"]))
        found = _scores(graphdef, state, placed, len(domains) if sums.apart else 0)
        sums.add(batch, processes.fetch(found, mesh))
    return sums.result()


class _Sums:
    """Sums over batches: nats and bytes by domain, drafts, and load."""

    def __init__(self, tokenizer: Tokenizer, domains: Sequence[str], layers: int, mix: Mapping[str, float] | None):
        self._byte_lengths, self._domains, self._layers, self._mix = tokenizer.byte_lengths, domains, layers, mix
        self.apart = 1 < len(domains) <= MOST_DOMAINS and layers > 0  # whether load is counted by domain
        self._all, self._by_domain = np.zeros(3), np.zeros((len(domains), 2))  # nats, bytes and tokens; nats and bytes
        self._agree, self._drafted, self._load, self._domain_load = np.zeros((4, 1, 1))

    def add(self, batch: Batch, out: Scores) -> None:
        nats = np.where(out.mask, out.nll, 0).astype(np.float64)
        size = np.where(out.mask, self._byte_lengths[batch["tokens"][:, 1:]], 0)
        self._all += nats.sum(), size.sum(), out.mask.sum()
        for i, sums in enumerate(self._by_domain):
            here = batch["domains"][:, 1:] == i
            sums += nats[here].sum(), size[here].sum()
        self._agree, self._drafted = self._agree + out.agree, self._drafted + out.drafted
        self._load, self._domain_load = self._load + out.load, self._domain_load + out.domain_load

    def result(self) -> dict[str, object]:
        (nats, size, tokens), layers = self._all, self._layers
        result: dict[str, object] = {
            "val_loss": float(nats / max(tokens, 1)),
            "val_bits_per_byte": float(nats / np.log(2) / max(size, 1)),
            "mtp_acceptance": (self._agree / np.maximum(self._drafted, 1)).ravel().tolist(),
            "load": self._load,
        }
        if layers:
            result["max_vio_global"] = _max_vio(self._load[:layers])
        if len(self._load) > layers:
            result["max_vio_mtp"] = _max_vio(self._load[layers:])
        if self.apart:
            read = {name: load for name, load in zip(self._domains, self._domain_load, strict=True) if load.any()}
            result["max_vio_by_domain"] = {name: _max_vio(load) for name, load in read.items()}
            if self._mix is not None and len(read) == len(self._domains):
                tokens_a_byte = self._domain_load[:, 0].sum(-1) / np.maximum(self._by_domain[:, 1], 1)
                shares = [self._mix[name] for name in self._domains]
                result["max_vio_training_mix"] = training_mix(self._domain_load, tokens_a_byte, shares)
        if self._domains:
            pairs = zip(self._domains, self._by_domain, strict=True)
            result["bits_per_byte_by_domain"] = {name: float(n / np.log(2) / s) for name, (n, s) in pairs if s}
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
