"""Routing statistics made by hand, for tests of what is made of them."""

import numpy as np

from dsv3_jax.stats.collect import RoutingStats
from dsv3_jax.stats.tokens import AFTER, BEFORE, Contexts, TokenCounts


def made(document_load, document_domains, num_domains, **changes) -> RoutingStats:
    """Statistics of nothing but these loads [S, L, E], of one expert a token."""
    num_documents, num_layers, num_experts = document_load.shape
    none, zeros = np.zeros(0, np.int64), np.zeros((num_documents, num_layers))
    values = dict(
        layers=tuple(f"layer {i}" for i in range(num_layers)),
        domains=tuple("abcdefgh"[:num_domains]),
        experts_per_token=1,
        document_domains=np.asarray(document_domains, np.int64),
        document_load=document_load.astype(np.int64),
        document_gate_entropy=zeros,
        document_score_entropy=zeros,
        together=np.zeros((num_layers, num_experts, num_experts), np.int64),
        token_counts=TokenCounts(none, none, none, none),
        contexts=Contexts(none, none, np.zeros(0, np.float32), np.zeros((0, BEFORE + 1 + AFTER), np.int32)),
    )
    return RoutingStats(**values | changes)
