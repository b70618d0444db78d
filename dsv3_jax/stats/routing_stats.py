"""Routing decisions of a model on text, counted in one pass over batches.

One compiled function returns the decisions for a batch. The host adds them up, so that no array of
tokens × experts outlives its batch. Counts are kept by document: a domain's count is the sum over
its documents. A shuffle of domains must move all tokens of a document together, because the tokens
of one document are not independent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float64, Int64, Num

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.batches import Batch
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.stats.decisions import Choices, biases, decide
from dsv3_jax.stats.token_rows import MOST_CHOICES, TokenRows, join_rows, rows_of, rows_of_batch


class BiasWork(NamedTuple):
    """The routers' biases, and what the same tokens would have chosen by scores without them."""

    value: Float64[np.ndarray, "L E"]
    load_without: Int64[np.ndarray, "L E"]  # assignments
    changed: Int64[np.ndarray, " L"]  # assignments that differ without the bias


@dataclass(frozen=True)
class RoutingStats:
    """Routing counts of S documents of N domains, in L layers of E experts, with K of them a token.

    Layers are the trunk's sparse layers, then the multi-token heads with experts. An assignment is
    one token sent to one expert. A head's position is counted under its first input token, if its
    target is in the same document.
    """

    # of the trunk's sparse layers by their number in the model, "MTP 1", … of the heads
    layers: tuple[str, ...]
    domains: tuple[str, ...]
    experts_per_token: int  # K
    document_domains: Int64[np.ndarray, " S"]  # index into `domains`
    document_load: Int64[np.ndarray, "S L E"]  # assignments
    # sum over tokens: entropy of the K chosen gates
    document_gate_entropy: Float64[np.ndarray, "S L"]
    # sum over tokens: entropy of the scores of all E experts
    document_score_entropy: Float64[np.ndarray, "S L"]
    # tokens that chose both experts; the diagonal is the load
    coactivation: Int64[np.ndarray, "L E E"]
    rows: TokenRows  # of the first tokens, see `token_rows.MOST_CHOICES`
    bias: BiasWork | None = None  # None: the router reads no bias

    @classmethod
    def from_loads(
        cls,
        document_load: Num[np.ndarray, "S L E"],
        document_domains: Int64[np.ndarray, " S"],
        domains: Sequence[str],
    ) -> "RoutingStats":
        """Build statistics of one expert a token from loads: no rows of tokens, no entropies.

        Example:
            >>> loads = np.array([[[3, 1]], [[0, 4]]])
            >>> stats = RoutingStats.from_loads(loads, np.array([0, 1]), ["code", "prose"])
            >>> stats.load.tolist(), stats.tokens.tolist()
            ([[3, 5]], [8])
        """
        num_documents, num_layers, num_experts = document_load.shape
        load = document_load.astype(np.int64)
        return cls(
            layers=tuple(f"layer {i}" for i in range(num_layers)),
            domains=tuple(domains),
            experts_per_token=1,
            document_domains=document_domains,
            document_load=load,
            document_gate_entropy=np.zeros((num_documents, num_layers)),
            document_score_entropy=np.full((num_documents, num_layers), np.nan),
            coactivation=load.sum(0)[:, :, None] * np.eye(num_experts, dtype=np.int64)[None],
            rows=rows_of(np.zeros((num_layers, 0, 1), np.int16)),
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
        """Mean over tokens of the entropy of the K chosen gates; 1 is even (`balance.entropy`)."""
        return self.document_gate_entropy.sum(0) / np.maximum(self.tokens, 1)

    @property
    def score_entropy(self) -> Float64[np.ndarray, " L"]:
        """Mean over tokens of the entropy of the scores of all experts; 1 is even."""
        return self.document_score_entropy.sum(0) / np.maximum(self.tokens, 1)

    def mean_by_domain(
        self, document_sums: Float64[np.ndarray, "S L"]
    ) -> Float64[np.ndarray, "N L"]:
        """Divide sums over a domain's documents by its tokens; NaN for a domain without tokens."""
        tokens = self.load_by_domain.sum(-1) / self.experts_per_token
        sums = sum_by_domain(document_sums, self.document_domains, len(self.domains))
        return np.divide(sums, tokens, out=np.full_like(sums, np.nan), where=tokens > 0)


def sum_by_domain(
    document_values: Num[np.ndarray, "S ..."],
    document_domains: Int64[np.ndarray, " S"],
    num_domains: int,
) -> Num[np.ndarray, "N ..."]:
    """Sum over the documents of each domain.

    Example:
        >>> sum_by_domain(np.array([1, 2, 3]), np.array([0, 1, 0]), 2)
        array([4, 2])
    """
    total = np.zeros((num_domains, *document_values.shape[1:]), document_values.dtype)
    np.add.at(total, document_domains, document_values)
    return total


def layer_names(cfg: ModelConfig) -> tuple[str, ...]:
    """Name the layers with experts, in the order of `RoutingStats.layers`; dense layers count too.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> layer_names(preset("tiny"))
        ('layer 1', 'layer 2', 'layer 3', 'MTP 1')
    """
    heads = [f"MTP {k + 1}" for k in range(cfg.num_sparse_heads)]
    return (*(f"layer {i}" for i in range(cfg.num_dense_layers, cfg.num_layers)), *heads)


def collect(model: Transformer, batches: Iterable[Batch], domains: Sequence[str]) -> RoutingStats:
    """Count the routing decisions of a model on batches; padding (segment_ids of 0) is not counted.

    Args:
        batches: as `val_batches` returns them; each new shape compiles once more.
        domains: names of the domains that `Batch.domains` indexes.
    Raises: ValueError for a model without experts, and if the batches hold no token.

    Example:
        >>> from dsv3_jax.config import replace
        >>> from dsv3_jax.data.batches import one_row
        >>> from dsv3_jax.model.transformer import abstract
        >>> from dsv3_jax.presets import preset
        >>> cfg = replace(preset("tiny"), num_layers=1, num_dense_layers=0, dim=16, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract(cfg))  # all are 1
        >>> collect(model, [one_row(b"x = 1")], ["code"]).load[0, :6]
        array([5, 5, 5, 5, 0, 0])
    """
    cfg = model.cfg
    layers = layer_names(model.cfg)
    if not layers:
        raise ValueError(
            f"the model has no experts to count: all of its {cfg.num_layers} layers are dense"
        )
    graphdef, state = nnx.split(model)
    bias = biases(model)

    # By document, by token, and over all: what of a batch is kept.
    documents = []
    parts = []
    room = MOST_CHOICES
    coactivation = np.zeros((len(layers), cfg.num_experts, cfg.num_experts), np.int64)
    load_without = np.zeros((len(layers), cfg.num_experts), np.int64)
    changed = np.zeros(len(layers), np.int64)

    for batch in batches:
        # Tokens that are no targets of the losses have no nats here either.
        inputs = {key: batch[key] for key in ("tokens", "segment_ids", "positions")}
        choices = jax.device_get(decide(graphdef, state, inputs))
        if "loss_mask" in batch:
            targets_only = np.where(batch["loss_mask"], choices.nll, np.float32(np.nan))
            choices = choices._replace(nll=targets_only)

        # Keep a row for each of the first tokens, while there is room.
        parts.append(rows_of_batch(batch, choices, room))
        room -= parts[-1].expert_ids.size

        # All tokens are counted. A batch of padding has none.
        if not choices.mask.any():
            continue
        documents.append(_by_document(batch, choices))
        coactivation += choices.coactivation.astype(np.int64)
        if bias is not None:
            load_without += _load_without(choices)
            changed += _num_changed(choices)
    if not documents:
        raise ValueError("there is no token to count: the batches are empty or hold padding alone")

    # A document may go over several batches: its parts are added up.
    document, domain, *sums = map(np.concatenate, zip(*documents, strict=True))
    _, first, number = np.unique(document, return_index=True, return_inverse=True)
    load, gate_entropy, score_entropy = (
        sum_by_domain(values, number, len(first)) for values in sums
    )

    work = None
    if bias is not None:
        work = BiasWork(np.asarray(bias, np.float64), load_without, changed)
    return RoutingStats(
        layers=layers,
        domains=tuple(domains),
        experts_per_token=cfg.experts_per_token,
        document_domains=domain[first].astype(np.int64),
        document_load=load,
        document_gate_entropy=gate_entropy,
        document_score_entropy=score_entropy,
        coactivation=coactivation,
        rows=join_rows(parts),
        bias=work,
    )


def _load_without(choices: Choices) -> np.ndarray:
    """Assignments by scores without the bias, int64 [L, E]."""
    num_experts = choices.coactivation.shape[-1]
    layers = zip(choices.without_bias, choices.mask, strict=True)
    return np.stack([np.bincount(ids[m].ravel(), minlength=num_experts) for ids, m in layers])


def _num_changed(choices: Choices) -> np.ndarray:
    """Assignments that the scores without the bias do not have, int64 [L]."""
    layers = zip(choices.expert_ids, choices.without_bias, choices.mask, strict=True)
    return np.array(
        [(ids[m][:, :, None] != without[m][:, None]).all(-1).sum() for ids, without, m in layers]
    )


def tokens(model: Transformer, batches: Iterable[Batch], domains: Sequence[str]) -> TokenRows:
    """Return each token's experts, gates and margins in every layer, as arrays.

    Args: as `collect`.
    Raises: ValueError as `collect`.

    Example:
        >>> from dsv3_jax.config import replace
        >>> from dsv3_jax.data.batches import one_row
        >>> from dsv3_jax.model.transformer import abstract
        >>> from dsv3_jax.presets import preset
        >>> cfg = replace(preset("tiny"), num_layers=1, num_dense_layers=0, dim=16, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract(cfg))  # all are 1
        >>> rows = tokens(model, [one_row(b"x = 1")], ["code"])
        >>> rows.expert_ids.shape, rows.expert_ids[0, 4].tolist()  # [L, n, K]
        ((1, 5, 4), [0, 1, 2, 3])
    """
    return collect(model, batches, domains).rows


def _by_document(batch: Batch, choices: Choices) -> tuple[np.ndarray, ...]:
    """A batch's documents [S], domains, load [S, L, E], sums of gate and score entropies [S, L]."""
    num_layers, num_experts = choices.coactivation.shape[:2]
    real = batch["segment_ids"] != 0

    # The documents of this batch, and each position's among them: [B, T].
    documents, first, inverse = np.unique(
        batch["documents"][real], return_index=True, return_inverse=True
    )
    row = np.zeros(real.shape, np.int64)
    row[real] = inverse

    # One count for each (document, layer, expert), by a single number for all three.
    layer = np.arange(num_layers)[:, None, None]
    group = (row[None] * num_layers + layer)[choices.mask]  # [n], of each counted position
    cells = group[:, None] * num_experts + choices.expert_ids[choices.mask]  # [n, K]
    shape = (len(documents), num_layers)
    load = np.bincount(cells.ravel(), minlength=len(documents) * num_layers * num_experts)

    entropies = (
        np.bincount(group, values[choices.mask], len(documents) * num_layers).reshape(shape)
        for values in (choices.gate_entropy, choices.score_entropy)
    )
    return documents, batch["domains"][real][first], load.reshape(*shape, num_experts), *entropies
