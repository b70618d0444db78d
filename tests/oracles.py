"""Oracles: slow, obvious versions of what `dsv3_jax/reference.py` lacks, in the equations' order.

They are plain loops in NumPy and float64. Functions that a test differentiates are written in
jax.numpy, and their names end in `_jnp`; run these under the `x64` fixture. No code is shared with
the library, so an error would have to be made twice.

Letters: B batch, T query length, S key length, H heads, V value dim, E experts, K experts for each
token, G groups, W vocabulary, n tokens.
"""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

# attention


def causal_mask(segment_ids):
    """Return bool[B, T, T]: query t sees key s if s <= t and both are in the same document."""
    ids = np.asarray(segment_ids)
    return (ids[:, :, None] == ids[:, None]) & np.tri(ids.shape[1], dtype=bool)


def attention_jnp(q, k, v, mask, *, scale):
    """Return softmax(scale q k^T) v: q [B,T,H,K], k [B,S,H,K], v [B,S,H,V], mask bool[B,T,S]."""
    scores = scale * jnp.einsum("bthk,bshk->bhts", q, k)
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores, axis=-1), v)


# the indexer, as DeepSeek's own inference code rounds it


def rounded(x, cfg):
    """Return rows [..., 128] of `reference.rotate` times a Hadamard matrix, rounded to e4m3.

    Scales are powers of two above max / 448. The code rotates a row's first numbers, the page its
    last. Halves are rotated: the page would move neighbours (2i, 2i + 1), and so the columns.
    """
    first = np.roll(x, cfg.rope_head_dim, axis=-1)
    hadamard = np.ones((1, 1))
    while len(hadamard) < x.shape[-1]:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    y = first @ hadamard * x.shape[-1] ** -0.5
    scale = np.exp2(np.ceil(np.log2(np.maximum(np.abs(y).max(-1, keepdims=True), 1e-4) / 448)))
    return np.clip(y / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(float) * scale


# routing: sets of experts


def best(values, count, among=None):
    """Return indices of the `count` largest values, largest first; of equal ones lower first."""
    among = range(len(values)) if among is None else among
    return sorted(among, key=lambda i: (-values[i], i))[:count]


def softmax_probs(row):
    """Return the softmax of one row."""
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def hash_route(tokens, num_experts, k):
    """Return expert_ids [n,K]: a token's k experts with the largest hash, in Python's integers."""

    def value(token, expert):
        x = (token * 0x9E3779B1 % 2**32) ^ (expert * 0x85EBCA77 % 2**32)
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    return np.array([best([value(int(t), e) for e in range(num_experts)], k) for t in tokens])


def quantile_target(scores, bias, k):
    """Return b*: with it and the old bias's cuts, each expert has floor(N K / E) of N tokens."""
    wanted = len(scores) * k // len(bias)
    cuts = [sorted(row + bias)[-k - 1] for row in scores]
    margins = [
        [row[e] - cut for row, cut in zip(scores, cuts, strict=True)] for e in range(len(bias))
    ]
    return np.array([-sorted(column, reverse=True)[wanted] for column in margins])


# dispatch


def routed_swiglu_jnp(x, expert_ids, gates, w_gate, w_up, w_down):
    """Return y [n, D]: every expert computes every token; gates weight a token's chosen ones."""
    y = jnp.zeros_like(x)
    for e in range(w_gate.shape[0]):
        gate = jnp.where(expert_ids == e, gates, 0.0).sum(axis=1)
        y = y + gate[:, None] * ((jax.nn.silu(x @ w_gate[e]) * (x @ w_up[e])) @ w_down[e])
    return y


def within_capacity(expert_ids, num_experts, factor):
    """Return bool[n, K]: the assignments within the experts' capacity, earlier tokens first."""
    expert_ids = np.asarray(expert_ids)
    capacity = math.ceil(factor * expert_ids.size / num_experts)
    taken, kept = [0] * num_experts, np.zeros(expert_ids.shape, bool)
    for place in np.ndindex(expert_ids.shape):
        kept[place] = taken[expert_ids[place]] < capacity
        taken[expert_ids[place]] += 1
    return kept


# sampling


def support(logits, *, temperature=1.0, top_k=None, top_p=None):
    """Return the tokens of a row that may be drawn: the fewest of the top_k that reach top_p."""
    logits = np.asarray(logits, np.float64) / temperature
    kept = best(logits, len(logits) if top_k is None else top_k)
    before = np.cumsum([0, *softmax_probs(logits[kept])])[:-1]  # largest first
    return {token for token, p in zip(kept, before, strict=True) if top_p is None or p < top_p}


def sampling_probs(logits, *, temperature=1.0, top_k=None, top_p=None):
    """Return f64[W]: the distribution that one row is drawn from."""
    kept = sorted(support(logits, temperature=temperature, top_k=top_k, top_p=top_p))
    probs = np.zeros(len(logits))
    probs[kept] = softmax_probs(np.asarray(logits, np.float64)[kept] / temperature)
    return probs
