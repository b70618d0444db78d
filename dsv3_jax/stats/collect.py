"""What a model's routers do with text, counted in one pass over batches.

A batch's choices come from one compiled function and are added up on the host, so that nothing as large as tokens ×
experts outlives its batch. Counts are kept by document: what belongs to a domain is the sum over its documents, and a
shuffle of domains has to move whole documents, for the tokens of one are not independent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float64, Int32, Int64

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.batches import Batch
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model.moe import LayerRouting
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops import balance
from dsv3_jax.stats.tokens import Contexts, TokenCounts, TokenTally
from dsv3_jax.training.loss import targets


@dataclass(frozen=True)
class RoutingStats:
    """Counts of S documents in N domains, in L layers of E experts: the trunk's sparse ones, then heads with experts.

    A position of a multi-token head counts where its targets lie in the same document, and under the token that stands
    there, whatever later tokens the head reads besides.
    """

    layers: tuple[str, ...]  # "layer 0", … of the trunk's sparse layers, "MTP 1", … of the heads
    domains: tuple[str, ...]
    experts_per_token: int  # K
    document_domains: Int64[np.ndarray, " S"]
    document_load: Int64[np.ndarray, "S L E"]  # assignments: a token that counts has K
    document_gate_entropy: Float64[np.ndarray, "S L"]  # sums over tokens of the entropy of the K chosen gates
    document_score_entropy: Float64[np.ndarray, "S L"]  # and of that of the scores of all E experts
    together: Int64[np.ndarray, "L E E"]  # tokens that chose both experts; the diagonal is the load
    token_counts: TokenCounts
    contexts: Contexts

    @property
    def load(self) -> Int64[np.ndarray, "L E"]:
        return self.document_load.sum(0)

    @property
    def load_by_domain(self) -> Int64[np.ndarray, "N L E"]:
        return by_domain(self.document_load, self.document_domains, len(self.domains))

    @property
    def tokens(self) -> Int64[np.ndarray, " L"]:
        """How many counted, in each layer."""
        return self.load.sum(-1) // self.experts_per_token

    @property
    def gate_entropy(self) -> Float64[np.ndarray, " L"]:
        """Mean over tokens, of the K chosen gates; 1 is even, as in `balance.entropy`."""
        return self.document_gate_entropy.sum(0) / np.maximum(self.tokens, 1)

    @property
    def score_entropy(self) -> Float64[np.ndarray, " L"]:
        """Mean over tokens, of the scores of all experts; 1 is even."""
        return self.document_score_entropy.sum(0) / np.maximum(self.tokens, 1)

    def mean_by_domain(self, document_sums: Float64[np.ndarray, "S L"]) -> Float64[np.ndarray, "N L"]:
        """Means over a domain's tokens of what is summed by document; NaN for a domain without any."""
        tokens = self.load_by_domain.sum(-1) / self.experts_per_token
        sums = by_domain(document_sums, self.document_domains, len(self.domains))
        return np.divide(sums, tokens, out=np.full_like(sums, np.nan), where=tokens > 0)


def by_domain(documents: np.ndarray, document_domains: Int64[np.ndarray, " S"], num_domains: int) -> np.ndarray:
    """Sums over the documents of each domain: [S, …] → [N, …]."""
    total = np.zeros((num_domains, *documents.shape[1:]), documents.dtype)
    np.add.at(total, document_domains, documents)
    return total


class Choices(NamedTuple):
    """What the routers of L layers did with a batch."""

    expert_ids: Int32[Array, "L B T K"]
    gates: Float[Array, "L B T K"]
    gate_entropy: Float[Array, "L B T"]
    score_entropy: Float[Array, "L B T"]
    counts: Array  # bool [L, B, T]
    together: Float[Array, "L E E"]


def layer_names(cfg: ModelConfig) -> tuple[str, ...]:
    """Of the layers with experts, in the order in which they are counted."""
    heads = [f"MTP {k + 1}" for k in range(cfg.num_sparse_heads)]
    return (*(f"layer {i}" for i in range(cfg.num_sparse_layers)), *heads)


def collect(model: Transformer, batches: Iterable[Batch], tokenizer: Tokenizer, domains: Sequence[str]) -> RoutingStats:
    """Count what the model's routers do with the batches; positions with segment_ids 0 do not count.

    Args:
        batches: of one shape, or each new shape compiles anew.
        tokenizer: the one that the batches were made with.
        domains: names of the batches' domains.
    Raises: ValueError for a model without experts, and when no token counts.
    """
    cfg, layers = model.cfg, layer_names(model.cfg)
    if not layers:
        raise ValueError(f"the model has no experts to count: all of its {cfg.num_layers} layers are dense")
    graphdef, state = nnx.split(model)
    documents = _Documents(len(layers), cfg.num_experts)
    together = np.zeros((len(layers), cfg.num_experts, cfg.num_experts), np.int64)
    words = TokenTally(cfg.num_experts, tokenizer.vocab_size)
    for batch in batches:
        read = {key: batch[key] for key in ("tokens", "segment_ids", "positions")}
        found = jax.device_get(_choices(graphdef, state, read))
        if not found.counts.any():
            continue
        documents.add(batch, found)
        together += found.together.astype(np.int64)
        words.add(batch["tokens"], batch["segment_ids"], found.expert_ids, found.gates, found.counts)
    if not documents.rows:
        raise ValueError("there is no token to count: the batches hold padding alone, or there are none")
    rows = [documents.rows[name] for name in sorted(documents.rows)]
    return RoutingStats(
        layers,
        tuple(domains),
        cfg.experts_per_token if cfg.router != "dense" else cfg.num_experts,
        np.array([row.domain for row in rows], np.int64),
        np.stack([row.load for row in rows]),
        np.stack([row.gate_entropy for row in rows]),
        np.stack([row.score_entropy for row in rows]),
        together,
        words.counts(),
        words.contexts(),
    )


@partial(jax.jit, static_argnames="graphdef")
def _choices(graphdef, state, batch) -> Choices:
    model = nnx.merge(graphdef, state)
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    trace = model.trace(tokens, segment_ids, batch["positions"])
    parts = []
    if trace.routing is not None:
        real = jnp.broadcast_to(segment_ids != 0, trace.routing.score_entropy.shape)
        parts.append((_kept(trace.routing), real))
    for k, routing in enumerate(trace.mtp_routing, start=1):
        one = jax.tree.map(lambda x: x[None], _kept(routing))
        # DeepSeek's heads read the token k places on, and count where that is the same document's; Meta's read none.
        real = targets(tokens, segment_ids, k)[1] if model.cfg.mtp_kind == "deepseek" else segment_ids[:, :-k] != 0
        parts.append(jax.tree.map(lambda x, k=k: jnp.pad(x, _after(k, x.ndim)), (one, real[None])))
    (ids, gates, score_entropy), counts = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    def pairs(layer) -> Array:
        ids, counts = layer
        chosen = jax.nn.one_hot(ids, model.cfg.num_experts, dtype=jnp.float32).sum(-2) * counts[..., None]
        return jnp.einsum("bte,btf->ef", chosen, chosen)

    together = jax.lax.map(pairs, (ids, counts.astype(jnp.float32)))
    return Choices(ids, gates, balance.entropy(gates), score_entropy, counts, together)


def _kept(routing: LayerRouting) -> tuple[Array, Array, Array]:
    return routing.expert_ids, routing.gates, routing.score_entropy


def _after(k: int, ndim: int) -> list[tuple[int, int]]:
    """Padding of k at the end of the third axis, T."""
    return [(0, k if axis == 2 else 0) for axis in range(ndim)]


class _Document(NamedTuple):
    domain: int
    load: np.ndarray  # [L, E]
    gate_entropy: np.ndarray  # [L]
    score_entropy: np.ndarray  # [L]


class _Documents:
    """Sums by document, over the batches so far."""

    def __init__(self, num_layers: int, num_experts: int):
        self.rows: dict[int, _Document] = {}
        self._shape = (num_layers, num_experts)

    def add(self, batch: Batch, found: Choices) -> None:
        num_layers, num_experts = self._shape
        real = batch["segment_ids"] != 0
        names, first, inverse = np.unique(batch["documents"][real], return_index=True, return_inverse=True)
        row = np.zeros(real.shape, np.int64)
        row[real] = inverse
        layer = np.arange(num_layers)[:, None, None]
        place = (row[None] * num_layers + layer)[found.counts]  # [n]: (document, layer) of what counts
        cells = place[:, None] * num_experts + found.expert_ids[found.counts]  # [n, K]

        def summed(values):
            sums = np.bincount(place, values[found.counts], len(names) * num_layers)
            return sums.reshape(len(names), num_layers)

        load = np.bincount(cells.ravel(), minlength=len(names) * num_layers * num_experts)
        parts = zip(
            names.tolist(),
            batch["domains"][real][first].tolist(),
            load.reshape(len(names), num_layers, num_experts),
            summed(found.gate_entropy),
            summed(found.score_entropy),
            strict=True,
        )
        for name, domain, *sums in parts:
            before = self.rows[name][1:] if name in self.rows else (0, 0, 0)
            self.rows[name] = _Document(domain, *(a + b for a, b in zip(before, sums, strict=True)))
