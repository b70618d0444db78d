"""The pieces of the reference page against loops, in float64.

test_model, test_heads and test_loss compare the page with the models of the package.
"""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from models import parameters, random_model, small, tokens_of

from dsv3_jax import reference
from dsv3_jax.config import Balance, Yarn

BATCH, LENGTH = 2, 9
# Row 0: documents of 4 and 3 tokens, then padding. Row 1: one of 9.
SEGMENTS = np.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 9])
POSITIONS = np.array([[*range(4), *range(3), *range(2)], [*range(9)]])
# Low and high pair differ from the ends of the ramp, and mscale from mscale_all_dim.
YARN = Yarn(factor=8.0, original_max_positions=16, beta_fast=4.0, mscale=1.3, mscale_all_dim=0.7)


def context_of(cfg, xp=np):
    return reference.Context(cfg, POSITIONS, SEGMENTS, xp)


def draw(rng, **shapes):
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def rms_normed(x, scale, eps):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * scale


# positions


@pytest.mark.parametrize(
    "rope_dim, theta, yarn",
    [
        (64, 1e4, Yarn()),
        (64, 1e4, Yarn(factor=40.0)),
        (8, 1e4, Yarn(factor=8.0, original_max_positions=64)),  # low is clamped to 0
        (16, 10.0, Yarn(factor=3.0, original_max_positions=1000)),  # high is clamped to R-1
    ],
)
def test_frequencies(rope_dim, theta, yarn):
    cfg = small(rope_head_dim=rope_dim, rope_theta=theta, yarn=yarn, max_positions=64)
    expected = oracles.yarn_frequencies(
        rope_dim, theta, yarn.factor, yarn.original_max_positions, yarn.beta_fast, yarn.beta_slow
    )
    np.testing.assert_allclose(reference.rope_frequencies(cfg), expected, rtol=1e-14)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("yarn", [Yarn(), YARN])
def test_rotated_scores(rng, interleaved, yarn):
    """A score depends on the distance of two positions; the first N features are left alone."""
    cfg = small(rope_head_dim=8, rope_interleaved=interleaved, yarn=yarn)
    freqs = reference.rope_frequencies(cfg)
    ratio = oracles.yarn_mscale(yarn.factor, yarn.mscale) / oracles.yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    q, k = rng.standard_normal((2, BATCH, LENGTH, 3, 6 + 8))
    turned_q, turned_k = reference.rotate(context_of(cfg), q), reference.rotate(context_of(cfg), k)
    np.testing.assert_array_equal(turned_q[..., :6], q[..., :6])
    for b, t, s, h in np.ndindex(BATCH, LENGTH, LENGTH, 3):
        where = POSITIONS[b, t], POSITIONS[b, s]
        want = oracles.rope_score(q[b, t, h, 6:], k[b, s, h, 6:], *where, freqs, interleaved=interleaved)
        assert turned_q[b, t, h, 6:] @ turned_k[b, s, h, 6:] == pytest.approx(ratio**2 * want, abs=1e-12)


# attention


@pytest.mark.parametrize("q_latent_dim", [12, None])
@pytest.mark.parametrize("yarn", [Yarn(), YARN])
def test_mla(rng, q_latent_dim, yarn):
    """D 16, H 3, Q 12, C 10, N 6, R 4, V 5."""
    cfg = small(q_latent_dim=q_latent_dim, yarn=yarn)
    query = dict(w_q=(16, 3, 10)) if q_latent_dim is None else dict(w_dq=(16, 12), w_uq=(12, 3, 10))
    p = draw(rng, w_dkv=(16, 14), w_uk=(3, 6, 10), w_uv=(3, 5, 10), w_o=(3, 5, 16), **query)
    p["kv_norm"], p["q_norm"] = draw(rng, scale=10), draw(rng, scale=12)
    x, ctx = 1e-3 * rng.standard_normal((BATCH, LENGTH, 16)), context_of(cfg)  # so small that the norms' eps matters
    if q_latent_dim is None:
        q = np.tensordot(x, p["w_q"], 1)
    else:
        q = np.tensordot(rms_normed(x @ p["w_dq"], p["q_norm"]["scale"], 1e-6), p["w_uq"], 1)
    down = x @ p["w_dkv"]
    c_kv = rms_normed(down[..., :10], p["kv_norm"]["scale"], 1e-6)
    nothing = np.zeros((BATCH, LENGTH, 1, 6))
    q_rope = reference.rotate(ctx, q)[..., 6:]
    k_rope = reference.rotate(ctx, np.concatenate([nothing, down[:, :, None, 10:]], axis=-1))[:, :, 0, 6:]
    scale = 10**-0.5 * oracles.yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    mask = oracles.causal_mask(BATCH, LENGTH, SEGMENTS)
    heads = oracles.mla(q[..., :6], q_rope, c_kv, k_rope, p["w_uk"], p["w_uv"], mask, scale=scale)
    np.testing.assert_allclose(reference.mla(ctx, p, x), np.tensordot(heads, p["w_o"], 2), atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        dict(attention="mha"),
        dict(attention="gqa", num_kv_heads=2),
        dict(attention="mqa", yarn=YARN),
        dict(attention="mha", qk_norm=True, norm_eps=0.1),
    ],
)
def test_gqa(rng, changes):
    """One head and one query at a time; consecutive query heads share a key and a value."""
    cfg = small(num_heads=4, **changes)
    p = draw(rng, w_q=(16, 4, 10), w_k=(16, cfg.kv_heads, 10), w_v=(16, cfg.kv_heads, 5), w_o=(4, 5, 16))
    p |= {norm: {"scale": rng.standard_normal(10)} for norm in ("q_norm", "k_norm") if cfg.qk_norm}
    x, want = rng.standard_normal((BATCH, LENGTH, 16)), np.zeros((BATCH, LENGTH, 16))
    freqs, yarn = reference.rope_frequencies(cfg), cfg.yarn

    def normed(y, norm):
        return rms_normed(y, p[norm]["scale"], cfg.norm_eps) if cfg.qk_norm else y

    m = oracles.yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    ratio = oracles.yarn_mscale(yarn.factor, yarn.mscale) / m
    mask = oracles.causal_mask(BATCH, LENGTH, SEGMENTS)
    for b, t, h in np.ndindex(BATCH, LENGTH, 4):
        g = h // (4 // cfg.kv_heads)
        q, seen = normed(x[b, t] @ p["w_q"][:, h], "q_norm"), np.flatnonzero(mask[b, t])
        scores = []
        for s in seen:
            k = normed(x[b, s] @ p["w_k"][:, g], "k_norm")
            rope = oracles.rope_score(q[6:], k[6:], POSITIONS[b, t], POSITIONS[b, s], freqs, interleaved=True)
            scores.append((q[:6] @ k[:6] + ratio**2 * rope) * 10**-0.5 * m**2)
        weights = oracles.softmax_probs(np.array(scores))
        want[b, t] += weights @ (x[b, seen] @ p["w_v"][:, g]) @ p["w_o"][h]
    np.testing.assert_allclose(reference.gqa(context_of(cfg), p, x), want, atol=1e-11)


# experts


NO_GROUPS = dict(num_groups=1, groups_per_token=1)
ROUTERS = {
    "V3": dict(),
    "V3, best groups by maximum": dict(group_score="max"),
    "V3, gates not normalised": dict(normalize_gates=False, groups_per_token=3),
    "V3, no groups": NO_GROUPS,
    "V2": dict(router="softmax", group_score="max", normalize_gates=False, routed_scale=16.0),
    "V2, gates normalised": dict(router="softmax", group_score="top2_sum"),
    "V2-Lite": dict(router="softmax", normalize_gates=False, routed_scale=1.0, **NO_GROUPS),
    "V4": dict(router="sqrtsoftplus"),
    "topk": dict(router="topk", normalize_gates=False),
    "dense": dict(router="dense", experts_per_token=16, **NO_GROUPS),
}


def route_by_loops(cfg, logits, bias):
    """(expert_ids, gates, scores) of n tokens."""
    k = cfg.experts_per_token
    rules = dict(
        k=k, groups=cfg.num_groups, groups_kept=cfg.groups_per_token, group_score=cfg.group_score,
        normalize=cfg.normalize_gates, scale=cfg.routed_scale,
    )  # fmt: skip
    if cfg.router == "sigmoid":
        return oracles.sigmoid_route(logits, bias, **rules)
    if cfg.router == "sqrtsoftplus":
        return oracles.sigmoid_route(logits, bias, **rules, score=oracles.sqrtsoftplus_scores)
    if cfg.router == "softmax":
        return oracles.softmax_route(logits, **rules)
    return *oracles.topk_route(logits, k=k), np.array([oracles.softmax_probs(row) for row in logits])


def by_id(expert_ids, gates):
    """Both in the order of ids: a router chooses a set."""
    order = np.argsort(expert_ids, axis=-1)
    return np.take_along_axis(expert_ids, order, axis=-1), np.take_along_axis(gates, order, axis=-1)


@pytest.mark.parametrize("biases", [(-0.9, -0.1), (-0.4, 0.4)])
@pytest.mark.parametrize("router", ROUTERS)
def test_route(rng, router, biases):
    """Chosen sets are exact, with biases that are all negative, too."""
    cfg = small(**{"num_experts": 16, "experts_per_token": 4, **ROUTERS[router]})
    p = dict(w_router=rng.standard_normal((16, 16)), bias=rng.uniform(*biases, 16))
    x, one = rng.standard_normal((1, 200, 16)), np.ones((1, 200), int)
    got = reference.route(reference.Context(cfg, one, one), p, x)
    *want, scores = route_by_loops(cfg, x[0] @ p["w_router"], p["bias"])
    (ids, gates), (want_ids, want_gates) = by_id(got.expert_ids[0], got.gates[0]), by_id(*want)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(gates, want_gates, rtol=1e-12)
    np.testing.assert_allclose(got.scores[0], scores, rtol=1e-12)


def test_underflowing_sigmoids_stay_finite():
    """sigmoid(-800) is 0 in float64."""
    p = dict(w_router=np.full((1, 8), -800.0), bias=np.linspace(-0.3, 0.2, 8))
    with np.errstate(over="ignore"):  # of e^800
        got = reference.route(context_of(small()), p, np.ones((BATCH, LENGTH, 1)))
    assert not got.scores.any() and not got.gates.any()
    assert not reference.balance_loss(got, np).any()


@pytest.mark.parametrize("num_shared", [0, 2])
def test_moe(x64, rng, num_shared):
    """Routed experts of width 7, and a shared one of width 14."""
    cfg = small(num_shared_experts=num_shared)
    p = draw(rng, w_router=(16, 8), bias=8)
    p["shared"] = draw(rng, w_gate=(16, 14), w_up=(16, 14), w_down=(14, 16))
    experts = draw(rng, w_gate=(8, 16, 7), w_up=(8, 16, 7), w_down=(8, 7, 16))
    x = rng.standard_normal((BATCH, LENGTH, 16))
    y, routing = reference.moe(context_of(cfg), p, experts, x)
    flat = (jnp.asarray(a.reshape(-1, a.shape[-1])) for a in (x, routing.expert_ids, routing.gates))
    want = np.asarray(oracles.routed_swiglu_jnp(*flat, *map(jnp.asarray, experts.values()))).reshape(x.shape)
    if num_shared:
        want = want + np.asarray(oracles.swiglu_jnp(jnp.asarray(x), *map(jnp.asarray, p["shared"].values())))
    np.testing.assert_allclose(y, want, rtol=1e-11, atol=1e-11)
    np.testing.assert_array_equal(routing.counted, SEGMENTS != 0)


# losses


def test_balance_losses(rng):
    """One formula is both: the rows are sequences, or one row holds the batch."""
    scores = rng.uniform(0.05, 1.0, (3, 9, 6))  # sigmoids: they do not sum to 1
    mask = rng.uniform(0, 1, (3, 9)) < 0.6
    top = np.array([[oracles.best(row, 2) for row in sequence] for sequence in scores])
    sequence = reference.balance_loss(reference.Routing(top, None, scores, None, mask), np)
    np.testing.assert_allclose(sequence, oracles.sequence_loss(scores, 2, mask), rtol=1e-12)
    ids = np.array([rng.permutation(6)[:2] for _ in range(27)])
    flat = scores.reshape(27, 6)
    batch = reference.Routing(ids[None], None, flat[None], None, mask.reshape(1, 27))
    switch = oracles.switch_loss(flat, ids, mask.reshape(27))
    assert reference.balance_loss(batch, np) == pytest.approx(switch, rel=1e-12)


def test_updated_bias():
    """Up for an idle expert, down for a busy one, and not at all at the mean."""
    load, bias = np.array([3.0, 0.0, 7.0, 2.0, 3.0]), np.array([0.5, -0.5, 0.0, 0.25, -1.0])
    got = reference.updated_bias(bias, load, 0.125)
    np.testing.assert_array_equal(got, oracles.bias_update(bias, load, 0.125))
    np.testing.assert_array_equal(got, [0.5, -0.375, -0.125, 0.375, -1.0])


def smooth_l1(a, b):
    d = np.abs(a - b)
    return np.mean([x * x / 2 if x < 1 else x - 0.5 for x in d])


@pytest.mark.parametrize("kind, depth", [("deepseek", 2), ("eagle", 1)])
def test_total_loss(kind, depth):
    """Every part from the outputs, position by position; targets stay within their document."""
    balance = Balance(sequence_alpha=0.02, switch_alpha=0.03, z_alpha=0.05)
    cfg = small(num_layers=2, mtp_kind=kind, mtp_depth=depth, balance=balance)
    params, tokens = parameters(random_model(cfg)), np.asarray(tokens_of(cfg, BATCH, LENGTH))
    ctx = context_of(cfg)
    out, got = reference.transformer(ctx, params, tokens), reference.losses(ctx, params, tokens, 0.3)

    def positions(ahead):
        return [(b, i) for b, i in np.ndindex(BATCH, LENGTH - ahead) if 0 < SEGMENTS[b, i] == SEGMENTS[b, i + ahead]]

    means = []
    for ahead, logits in enumerate([out.logits, *out.mtp_logits], start=1):
        probs = [oracles.softmax_probs(logits[b, i])[tokens[b, i + ahead]] for b, i in positions(ahead)]
        means.append(-np.mean(np.log(probs)))
    np.testing.assert_allclose([got.main, *got.mtp], means, rtol=1e-12)

    want = 0.0
    for k, (ids, _, scores, log_sums, counted) in enumerate(out.routing):  # the trunk's router, then those of the heads
        reads = [[0 < SEGMENTS[b, i] == SEGMENTS[b, i + k] for i in range(LENGTH - k)] for b in range(BATCH)]
        np.testing.assert_array_equal(counted, reads)
        flat = scores.reshape(-1, 8), ids.reshape(-1, 3), counted.reshape(-1)
        want += 0.02 * oracles.sequence_loss(scores, 3, counted).mean() + 0.03 * oracles.switch_loss(*flat)
        # A sigmoid's logit is ln s / (1 - s).
        logits = np.log(scores) - np.log1p(-scores)
        np.testing.assert_allclose(log_sums, np.log(np.exp(logits).sum(-1)), rtol=1e-9)
        want += 0.05 * (log_sums[counted] ** 2).mean()
    assert got.balance == pytest.approx(want, rel=1e-12)

    heads = np.mean(means[1:])
    if kind == "eagle":
        h, made = out.hidden, out.mtp_hidden[0]
        feature = np.mean([smooth_l1(made[b, i], h[b, i + 1]) for b, i in positions(2)])
        assert got.feature == pytest.approx(feature, rel=1e-12)
        heads = feature + 0.1 * heads
    assert got.total == pytest.approx(means[0] + 0.3 * heads + want, rel=1e-12)
