"""Routing decisions of a model on text, counted in one pass over batches.

One compiled function returns the decisions for a batch. The host adds them up, so that no array of tokens × experts
outlives its batch. Counts are kept by document: a domain's count is the sum over its documents. A shuffle of domains
must move all tokens of a document together, because the tokens of one document are not independent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float64, Int32, Int64, Num

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.batches import Batch
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model.moe import LayerRouting
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops import balance
from dsv3_jax.stats.tokens import AFTER, BEFORE, Contexts, TokenCounts, TokenTally
from dsv3_jax.training.loss import targets


@dataclass(frozen=True)
class RoutingStats:
    """Routing counts of S documents from N domains, in L layers of E experts, with K experts a token.

    Layers are the trunk's sparse layers, then the multi-token heads with experts. An assignment is one token sent to
    one expert. A head's position is counted under its first input token, if its target is in the same document.
    """

    layers: tuple[str, ...]  # "layer 0", … of the trunk's sparse layers, "MTP 1", … of the heads
    domains: tuple[str, ...]
    experts_per_token: int  # K
    document_domains: Int64[np.ndarray, " S"]  # index into `domains`
    document_load: Int64[np.ndarray, "S L E"]  # assignments
    document_gate_entropy: Float64[np.ndarray, "S L"]  # sum over tokens: entropy of the K chosen gates
    document_score_entropy: Float64[np.ndarray, "S L"]  # sum over tokens: entropy of the scores of all E experts
    coactivation: Int64[np.ndarray, "L E E"]  # tokens that chose both experts; the diagonal is the load
    token_counts: TokenCounts
    contexts: Contexts

    @classmethod
    def from_loads(
        cls,
        document_load: Num[np.ndarray, "S L E"],
        document_domains: Int64[np.ndarray, " S"],
        domains: Sequence[str],
    ) -> "RoutingStats":
        """Build statistics of one expert a token from loads alone: without tokens, contexts or score entropies.

        Example:
            >>> stats = RoutingStats.from_loads(np.array([[[3, 1]], [[0, 4]]]), np.array([0, 1]), ["code", "prose"])
            >>> stats.load.tolist(), stats.tokens.tolist()
            ([[3, 5]], [8])
        """
        num_documents, num_layers, num_experts = document_load.shape
        load = document_load.astype(np.int64)
        none = np.zeros(0, np.int64)
        return cls(
            layers=tuple(f"layer {i}" for i in range(num_layers)),
            domains=tuple(domains),
            experts_per_token=1,
            document_domains=document_domains,
            document_load=load,
            document_gate_entropy=np.zeros((num_documents, num_layers)),
            document_score_entropy=np.full((num_documents, num_layers), np.nan),
            coactivation=load.sum(0)[:, :, None] * np.eye(num_experts, dtype=np.int64)[None],
            token_counts=TokenCounts(none, none, none, none),
            contexts=Contexts(none, none, np.zeros(0, np.float32), np.zeros((0, BEFORE + 1 + AFTER), np.int32)),
        )

    @property
    def load(self) -> Int64[np.ndarray, "L E"]:
        """Assignments over all documents."""
        return self.document_load.sum(0)

    @property
    def load_by_domain(self) -> Int64[np.ndarray, "N L E"]:
        """Assignments over the documents of each domain."""
        return sum_by_domain(self.document_load, self.document_domains, len(self.domains))

    @property
    def tokens(self) -> Int64[np.ndarray, " L"]:
        """Number of tokens counted in each layer."""
        return self.load.sum(-1) // self.experts_per_token

    @property
    def gate_entropy(self) -> Float64[np.ndarray, " L"]:
        """Mean over tokens of the entropy of the K chosen gates; 1 is even, as in `balance.entropy`."""
        return self.document_gate_entropy.sum(0) / np.maximum(self.tokens, 1)

    @property
    def score_entropy(self) -> Float64[np.ndarray, " L"]:
        """Mean over tokens of the entropy of the scores of all experts; 1 is even."""
        return self.document_score_entropy.sum(0) / np.maximum(self.tokens, 1)

    def mean_by_domain(self, document_sums: Float64[np.ndarray, "S L"]) -> Float64[np.ndarray, "N L"]:
        """Divide sums over a domain's documents by its tokens; NaN for a domain without tokens."""
        tokens = self.load_by_domain.sum(-1) / self.experts_per_token
        sums = sum_by_domain(document_sums, self.document_domains, len(self.domains))
        return np.divide(sums, tokens, out=np.full_like(sums, np.nan), where=tokens > 0)


def sum_by_domain(
    document_values: Num[np.ndarray, "S ..."], document_domains: Int64[np.ndarray, " S"], num_domains: int
) -> Num[np.ndarray, "N ..."]:
    """Sum over the documents of each domain.

    Example:
        >>> sum_by_domain(np.array([1, 2, 3]), np.array([0, 1, 0]), 2)
        array([4, 2])
    """
    total = np.zeros((num_domains, *document_values.shape[1:]), document_values.dtype)
    np.add.at(total, document_domains, document_values)
    return total


class Choices(NamedTuple):
    """Routing decisions of L layers for one batch."""

    expert_ids: Int32[Array, "L B T K"]
    gates: Float[Array, "L B T K"]
    gate_entropy: Float[Array, "L B T"]
    score_entropy: Float[Array, "L B T"]
    mask: Array  # bool [L, B, T]: positions that are counted
    coactivation: Float[Array, "L E E"]


def layer_names(cfg: ModelConfig) -> tuple[str, ...]:
    """Name the layers with experts, in the order of `RoutingStats.layers`.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> layer_names(preset("tiny"))
        ('layer 0', 'layer 1', 'layer 2', 'MTP 1')
    """
    heads = [f"MTP {k + 1}" for k in range(cfg.num_sparse_heads)]
    return (*(f"layer {i}" for i in range(cfg.num_sparse_layers)), *heads)


def collect(model: Transformer, batches: Iterable[Batch], tokenizer: Tokenizer, domains: Sequence[str]) -> RoutingStats:
    """Count the routing decisions of a model on batches; padding (segment_ids of 0) is not counted.

    Args:
        batches: as `val_batches` returns them; each new shape compiles once more.
        tokenizer: the tokenizer of the batches.
        domains: names of the domains that `Batch.domains` indexes.
    Raises: ValueError for a model without experts, and if the batches hold no token.

    Example:
        >>> from dsv3_jax.config import replace
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> from dsv3_jax.model.transformer import abstract
        >>> from dsv3_jax.presets import preset
        >>> cfg = replace(preset("tiny"), num_layers=1, num_dense_layers=0, dim=16, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract(cfg))  # all weights are 1
        >>> tokens = np.array([[*b"x = 1"]], np.int32)
        >>> zeros, positions = np.zeros_like(tokens), np.arange(5, dtype=np.int32)[None]
        >>> batch = {"tokens": tokens, "segment_ids": zeros + 1, "positions": positions,
        ...          "domains": zeros, "documents": zeros}
        >>> collect(model, [batch], ByteTokenizer(), ["code"]).load[0, :6]
        array([5, 5, 5, 5, 0, 0])
    """
    cfg, layers = model.cfg, layer_names(model.cfg)
    if not layers:
        raise ValueError(f"the model has no experts to count: all of its {cfg.num_layers} layers are dense")
    graphdef, state = nnx.split(model)
    documents = _DocumentSums(len(layers), cfg.num_experts)
    coactivation = np.zeros((len(layers), cfg.num_experts, cfg.num_experts), np.int64)
    tally = TokenTally(cfg.num_experts, tokenizer.vocab_size)
    for batch in batches:
        inputs = {key: batch[key] for key in ("tokens", "segment_ids", "positions")}
        choices = jax.device_get(_choices(graphdef, state, inputs))
        if not choices.mask.any():
            continue
        documents.add(batch, choices)
        coactivation += choices.coactivation.astype(np.int64)
        tally.add(batch["tokens"], batch["segment_ids"], choices.expert_ids, choices.gates, choices.mask)
    if not documents.sums:
        raise ValueError("there is no token to count: the batches are empty or hold padding alone")
    rows = [documents.sums[document] for document in sorted(documents.sums)]
    return RoutingStats(
        layers,
        tuple(domains),
        cfg.experts_per_token,
        np.array([row.domain for row in rows], np.int64),
        np.stack([row.load for row in rows]),
        np.stack([row.gate_entropy for row in rows]),
        np.stack([row.score_entropy for row in rows]),
        coactivation,
        tally.counts(),
        tally.contexts(),
    )


@partial(jax.jit, static_argnames="graphdef")
def _choices(graphdef, state, batch) -> Choices:
    model = nnx.merge(graphdef, state)
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    out = model.forward_hidden(tokens, segment_ids, batch["positions"])
    parts = []
    if out.routing is not None:
        mask = jnp.broadcast_to(segment_ids != 0, out.routing.score_entropy.shape)
        parts.append((_decisions(out.routing), mask))
    for k, routing in enumerate(out.mtp_routing, start=1):
        decisions = jax.tree.map(lambda x: x[None], _decisions(routing))
        # A head that also reads token t + k counts only where that token is in the same document.
        reads_tokens = model.cfg.head_kind.reads_tokens
        mask = targets(tokens, segment_ids, k)[1] if reads_tokens else segment_ids[:, :-k] != 0
        parts.append(jax.tree.map(lambda x, k=k: jnp.pad(x, _padding(k, x.ndim)), (decisions, mask[None])))
    (ids, gates, score_entropy), mask = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    def count_pairs(layer) -> Array:
        ids, mask = layer
        chosen = jax.nn.one_hot(ids, model.cfg.num_experts, dtype=jnp.float32).sum(-2) * mask[..., None]
        return jnp.einsum("bte,btf->ef", chosen, chosen)

    coactivation = jax.lax.map(count_pairs, (ids, mask.astype(jnp.float32)))
    return Choices(ids, gates, balance.entropy(gates), score_entropy, mask, coactivation)


def _decisions(routing: LayerRouting) -> tuple[Array, Array, Array]:
    return routing.expert_ids, routing.gates, routing.score_entropy


def _padding(k: int, ndim: int) -> list[tuple[int, int]]:
    """Pad the third axis, T, by k at its end."""
    return [(0, k if axis == 2 else 0) for axis in range(ndim)]


class _Sums(NamedTuple):
    """Sums over the tokens of one document."""

    domain: int
    load: np.ndarray  # int64 [L, E]
    gate_entropy: np.ndarray  # float64 [L]
    score_entropy: np.ndarray  # float64 [L]


class _DocumentSums:
    """Sums of each document over the batches so far."""

    def __init__(self, num_layers: int, num_experts: int):
        self.sums: dict[int, _Sums] = {}
        self._shape = (num_layers, num_experts)

    def add(self, batch: Batch, choices: Choices) -> None:
        """Add a batch's decisions to the sums of its documents."""
        num_layers, num_experts = self._shape
        real = batch["segment_ids"] != 0
        documents, first, inverse = np.unique(batch["documents"][real], return_index=True, return_inverse=True)
        row = np.zeros(real.shape, np.int64)
        row[real] = inverse
        layer = np.arange(num_layers)[:, None, None]
        group = (row[None] * num_layers + layer)[choices.mask]  # [n]: (document, layer) of each counted position
        cells = group[:, None] * num_experts + choices.expert_ids[choices.mask]  # [n, K]

        def by_document(values):
            sums = np.bincount(group, values[choices.mask], len(documents) * num_layers)
            return sums.reshape(len(documents), num_layers)

        load = np.bincount(cells.ravel(), minlength=len(documents) * num_layers * num_experts)
        parts = zip(
            documents.tolist(),
            batch["domains"][real][first].tolist(),
            load.reshape(len(documents), num_layers, num_experts),
            by_document(choices.gate_entropy),
            by_document(choices.score_entropy),
            strict=True,
        )
        for document, domain, *sums in parts:
            earlier = self.sums[document][1:] if document in self.sums else (0, 0, 0)
            self.sums[document] = _Sums(domain, *(a + b for a, b in zip(earlier, sums, strict=True)))
