"""Oracles: slow and obvious versions of dsv3_jax.ops, in the order of the equations.

They are plain loops in NumPy and float64. Functions that a test differentiates are written in jax.numpy, and their
names end in `_jnp`; run these under the `x64` fixture. No code is shared with the library, so an error would have to be
made twice.

Letters: B batch, T query length, S key length, H heads, N nope dim, R rope dim, V value dim, C latent, E experts,
K experts for each token, G groups, W vocabulary, n tokens.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# RoPE


def rope_score(q, k, q_position, k_position, freqs, *, interleaved):
    """Return q . k after both are rotated: the real part of q conj(k) e^{i f (m - n)}, summed over pairs."""
    half = len(freqs)
    total = 0.0
    for i, f in enumerate(freqs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        rotation = complex(math.cos(f * (q_position - k_position)), math.sin(f * (q_position - k_position)))
        total += (complex(q[a], q[b]) * complex(k[a], k[b]).conjugate() * rotation).real
    return total


# attention and MLA


def causal_mask(batch, length, segment_ids=None):
    """Return bool[B, T, T]: query t sees key s if s <= t and both are in the same document."""
    mask = np.zeros((batch, length, length), bool)
    for b in range(batch):
        for t in range(length):
            for s in range(t + 1):
                mask[b, t, s] = segment_ids is None or segment_ids[b, t] == segment_ids[b, s]
    return mask


def attention_jnp(q, k, v, mask, *, scale):
    """Return softmax(scale q k^T) v for q [B,T,H,K], k [B,S,H,K], v [B,S,H,V], mask bool[B,T,S]; all scores at once."""
    scores = scale * jnp.einsum("bthk,bshk->bhts", q, k)
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores, axis=-1), v)


def mla(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, mask, *, scale):
    """Return f64[B, T, H, V]. Keys and values are expanded from the latent, for one head and one query at a time."""
    batch, length, heads, _ = q_nope.shape
    out = np.zeros((batch, length, heads, w_uv.shape[1]))
    for b in range(batch):
        for h in range(heads):
            k_nope = c_kv[b] @ w_uk[h].T  # [S,N]
            value = c_kv[b] @ w_uv[h].T  # [S,V]
            for t in range(length):
                seen = [s for s in range(mask.shape[-1]) if mask[b, t, s]]
                scores = np.array(
                    [scale * (q_nope[b, t, h] @ k_nope[s] + q_rope[b, t, h] @ k_rope[b, s]) for s in seen]
                )
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                for weight, s in zip(weights, seen, strict=True):
                    out[b, t, h] += weight * value[s]
    return out


# routing


def best(values, count, among=None):
    """Return the indices of the `count` largest values, largest first; if values are equal, the lower index first."""
    among = range(len(values)) if among is None else among
    return sorted(among, key=lambda i: (-values[i], i))[:count]


def allowed_experts(choice, groups, groups_kept, group_score):
    """Return the experts in one token's best groups; choice f64[E] is the biased score."""
    members = [[int(e) for e in m] for m in np.split(np.arange(len(choice)), groups)]
    value = {
        "top2_sum": lambda m: sum(sorted(choice[m])[-2:]),
        "max": lambda m: max(choice[m]),
    }[group_score]
    kept = best([value(m) for m in members], groups_kept)
    return [e for g in kept for e in members[g]]


def sigmoid_scores(row):
    """Return 1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-row))


def sqrtsoftplus_scores(row):
    """Return the square root of ln(1 + e^x)."""
    return np.sqrt(np.logaddexp(0, row))


def sigmoid_route(
    logits,
    bias,
    *,
    k,
    groups=1,
    groups_kept=1,
    group_score="top2_sum",
    normalize=True,
    scale=1.0,
    score=sigmoid_scores,
):
    """Return (expert_ids [n,K], gates [n,K], scores [n,E]) of the V3 router, or with V4's scores."""
    logits, bias = np.asarray(logits, np.float64), np.asarray(bias, np.float64)
    ids, gates, scores = [], [], []
    for row in logits:
        s = score(row)
        choice = s + bias
        chosen = best(choice, k, allowed_experts(choice, groups, groups_kept, group_score))
        g = s[chosen]
        if normalize:
            g = g / (g.sum() + 1e-20)
        ids.append(chosen)
        gates.append(g * scale)
        scores.append(s)
    return np.array(ids), np.array(gates), np.array(scores)


def softmax_probs(row):
    """Return the softmax of one row."""
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def softmax_route(logits, *, k, groups=1, groups_kept=1, group_score="max", normalize=False, scale=1.0):
    """Return (expert_ids, gates, scores) of the V2 router: a softmax over all experts, then the best groups."""
    ids, gates, scores = [], [], []
    for row in np.asarray(logits, np.float64):
        s = softmax_probs(row)
        chosen = best(s, k, allowed_experts(s, groups, groups_kept, group_score))
        g = s[chosen]
        if normalize:
            g = g / (g.sum() + 1e-20)
        ids.append(chosen)
        gates.append(g * scale)
        scores.append(s)
    return np.array(ids), np.array(gates), np.array(scores)


def topk_route(logits, *, k):
    """Return (expert_ids, gates); the softmax is over the k chosen experts alone."""
    logits = np.asarray(logits, np.float64)
    ids = np.array([best(row, k) for row in logits])
    return ids, np.array([softmax_probs(row[chosen]) for row, chosen in zip(logits, ids, strict=True)])


def hash_route(tokens, num_experts, k):
    """Return expert_ids [n,K]: a token's k experts with the largest hash, in Python's integers."""

    def value(token, expert):
        x = (token * 0x9E3779B1 % 2**32) ^ (expert * 0x85EBCA77 % 2**32)
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    return np.array([best([value(int(t), e) for e in range(num_experts)], k) for t in tokens])


# dispatch


def swiglu_jnp(x, w_gate, w_up, w_down):
    """Return (silu(x w_gate) * (x w_up)) w_down."""
    return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down


def routed_swiglu_jnp(x, expert_ids, gates, w_gate, w_up, w_down):
    """Return y [n, D]. Every expert computes every token; a token sums its chosen experts, weighted by its gates."""
    y = jnp.zeros_like(x)
    for e in range(w_gate.shape[0]):
        gate = jnp.where(expert_ids == e, gates, 0.0).sum(axis=1)
        y = y + gate[:, None] * swiglu_jnp(x, w_gate[e], w_up[e], w_down[e])
    return y


def within_capacity(expert_ids, num_experts, factor):
    """Return bool[n, K]: the assignments within the experts' capacity, if earlier tokens come first."""
    expert_ids = np.asarray(expert_ids)
    capacity = math.ceil(factor * expert_ids.size / num_experts)
    taken = [0] * num_experts
    kept = np.zeros(expert_ids.shape, bool)
    for token, chosen in enumerate(expert_ids):
        for slot, e in enumerate(chosen):
            if taken[e] < capacity:
                taken[e] += 1
                kept[token, slot] = True
    return kept


# balance


def load(expert_ids, num_experts):
    """Return f64[E]: how many assignments each expert has."""
    counts = [0] * num_experts
    for e in np.asarray(expert_ids).ravel():
        counts[e] += 1
    return np.array(counts, np.float64)


def proportional_update(bias, counts, rate):
    """Return b_e + rate * (mean(load) - load_e) / mean(load)."""
    mean = sum(counts) / len(counts)
    return np.array([float(b) + rate * (mean - count) / mean for b, count in zip(bias, counts, strict=True)])


def quantile_target(scores, bias, k):
    """Return b*: with it, and the cuts of the old bias, each expert has floor(N K / E) of the N tokens."""
    num_experts = len(bias)
    wanted = len(scores) * k // num_experts
    cuts = [sorted(row + bias)[-k - 1] for row in scores]
    margins = [[row[e] - cut for row, cut in zip(scores, cuts, strict=True)] for e in range(num_experts)]
    return np.array([-sorted(column, reverse=True)[wanted] for column in margins])


def max_vio(counts):
    """Return (max - mean) / mean."""
    mean = sum(counts) / len(counts)
    return (max(counts) - mean) / mean


def entropy(counts):
    """Return the entropy of the shares, divided by its maximum ln E."""
    shares = [count / sum(counts) for count in counts]
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(counts))


def gini(counts):
    """Return half the mean absolute difference of two experts' loads, divided by the mean load."""
    n, mean = len(counts), sum(counts) / len(counts)
    return sum(abs(a - b) for a in counts for b in counts) / (2 * n * n * mean)


# sampling


def support(logits, *, temperature=1.0, top_k=None, top_p=None):
    """Return the tokens of one row that may be drawn: the fewest of the top_k largest that reach top_p."""
    logits = np.asarray(logits, np.float64) / temperature
    kept = best(logits, len(logits) if top_k is None else top_k)
    if top_p is None:
        return set(kept)
    probs = softmax_probs(logits[kept])
    nucleus, reached = set(), 0.0
    for token, p in zip(kept, probs, strict=True):  # largest first
        nucleus.add(token)
        reached += p
        if reached >= top_p:
            break
    return nucleus


def sampling_probs(logits, *, temperature=1.0, top_k=None, top_p=None):
    """Return f64[W]: the distribution that one row is drawn from."""
    kept = sorted(support(logits, temperature=temperature, top_k=top_k, top_p=top_p))
    probs = np.zeros(len(logits))
    probs[kept] = softmax_probs(np.asarray(logits, np.float64)[kept] / temperature)
    return probs
