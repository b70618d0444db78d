"""The ops with sums in bfloat16, with float32 weights where training has them, against the same op in float64.

The op in float64 is held to its oracle in the op's own test. Here both get the same numbers, activations that bfloat16
represents and float32 weights. Outputs and gradients may then differ by bfloat16's rounding of operands and results
alone, and gradients of float32 weights must be float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Yarn
from dsv3_jax.ops import (
    attention,
    cached_attention,
    cross_entropy,
    dispatch,
    draft_loss,
    embedding,
    mla,
    products,
    rope,
)

B, T, H, D, C, N, R, V, E, F, W = 2, 6, 3, 12, 10, 8, 4, 5, 4, 7, 19
IDS = jnp.asarray(np.random.default_rng(1).permuted(np.tile(np.arange(E), (B * T, 1)), axis=1)[:, :2], jnp.int32)
TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, W, (B, T)), jnp.int32)
LAST = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
YARN = Yarn()
ANGLES = rope.frequencies(R, 1e4, YARN)
LATENT = {"c_kv": (B, T, C), "k_rope": (B, T, R)}
UP = {"w_uk": (H, N, C), "w_uv": (H, V, C)}
EXPERTS = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
ROWS = {"x": (B * T, D), "gates": (B * T, 2)}


def experts(op, **settings):
    """An op of the routed experts as a function of arrays."""

    def run(x, gates, w_gate, w_up, w_down):
        y = op(x, IDS, gates, w_gate, w_up, w_down, **settings)
        return y[0] if isinstance(y, tuple) else y

    return run


def rotated(x, interleaved):
    cos, sin = rope.cos_sin(LAST, ANGLES, YARN)
    return rope.rotate(x, cos[:, :, None], sin[:, :, None], interleaved=interleaved)


def over_cache(q, rows, run):
    stored, last = cached_attention.Stored(rows[:, None], None), jnp.repeat(LAST, H, axis=1)
    return run([q.reshape(B, 1, T * H, C)], [stored], stored, last, scale=0.3)


def nats(h, w, op):
    return op(h, w.astype(h.dtype), TOKENS.reshape(-1), jnp.ones(B * T, bool))[0]


def apart(h, w):
    """From the distribution of other hidden states, whole numbers, which take no gradient."""
    other = jnp.asarray(np.random.default_rng(3).integers(-2, 3, h.shape), h.dtype)
    return draft_loss.summed_distance(h, other, w.astype(h.dtype), jnp.ones(B * T, bool), "kl", chunk=5)


def attend(op):
    return {"q": (B, T, H, N), "k": (B, T, H, N), "v": (B, T, H, V)}, {}, partial(op, scale=0.3)


# Op → (activations, in bfloat16; weights, in float32; function of both). Ops without weights have all in bfloat16.
OPS = {
    "attention.causal_attention": attend(attention.causal_attention),
    "attention.row_maxima": (
        {"q": (B, T, H, N), "k": (B, T, H, N)}, {}, lambda q, k: attention.row_maxima(q, k, scale=0.3),
    ),
    "cached_attention.cached_attention": (
        {"q": (B, T, H, C), "rows": (B, T, C)}, {}, partial(over_cache, run=cached_attention.cached_attention),
    ),
    "cached_attention.cached_attention_in_blocks": (
        {"q": (B, T, H, C), "rows": (B, T, C)}, {},
        partial(over_cache, run=partial(cached_attention.cached_attention_in_blocks, block=3)),
    ),
    "cross_entropy.chunked_cross_entropy": (
        {"h": (B * T, D)}, {"w": (D, W)}, partial(nats, op=partial(cross_entropy.chunked_cross_entropy, chunk=5)),
    ),
    "cross_entropy.cross_entropy_by_memory": (
        {"h": (B * T, D)}, {"w": (D, W)}, partial(nats, op=cross_entropy.cross_entropy_by_memory),
    ),
    "dispatch.dense_swiglu": (ROWS, EXPERTS, experts(dispatch.dense_swiglu)),
    "dispatch.grouped_swiglu": (ROWS, EXPERTS, experts(dispatch.grouped_swiglu)),
    "dispatch.capacity_swiglu": (ROWS, EXPERTS, experts(dispatch.capacity_swiglu, factor=0.8)),
    "dispatch.decode_experts": (ROWS, EXPERTS, experts(dispatch.decode_experts)),
    "dispatch.decode_by_row": (ROWS, EXPERTS, experts(dispatch.decode_by_row)),
    "draft_loss.summed_distance": ({"h": (B * T, D)}, {"w": (D, W)}, apart),
    "embedding.look_up_in_order": ({}, {"w": (W, D)}, lambda w: embedding.look_up_in_order(w, TOKENS)),
    "mla.expand": (LATENT, UP, lambda *a: jnp.concatenate(mla.expand(*a), axis=-1)),
    "products.product": ({"x": (B, T, D)}, {"w": (D, H, N)}, products.product),
    "products.exact_product": ({"x": (B * T, D)}, {"w": (D, E)}, products.exact_product),
    "products.swiglu": (
        {"x": (B * T, D)}, {"w_gate": (D, F), "w_up": (D, F), "w_down": (F, D)}, products.swiglu,
    ),
    "products.product_by_head": ({"x": (B, T, H, N)}, {"w": (H, N, V)}, products.product_by_head),
    "rope.rotate": ({"x": (B, T, H, R)}, {}, lambda x: jnp.concatenate([rotated(x, True), rotated(x, False)], axis=-1)),
}  # fmt: skip
FORWARD_ONLY = {
    "attention.row_maxima",
    "cached_attention.cached_attention",
    "cached_attention.cached_attention_in_blocks",
} | {name for name in OPS if name.startswith("dispatch.decode")}


def drawn():
    """Op → (activations that bfloat16 represents, float32 weights that it does not), as NumPy arrays by name."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        name: (
            {key: np.asarray(jnp.asarray(draw(shape), jnp.bfloat16), np.float32) for key, shape in activations.items()},
            {key: draw(shape) / np.float32(np.sqrt(shape[-2])) for key, shape in weights.items()},
        )
        for name, (activations, weights, _) in OPS.items()
    }


def call(name, arrays):
    activations, weights, run = OPS[name]
    return run(*(arrays[key] for key in activations | weights))  # in their order there: `jax.jit` sorts names


def all_results(inputs):
    """Op → (output, gradients by name): one program for all ops compiles fastest."""
    results = {}
    for name, (activations, weights) in inputs.items():
        run = partial(call, name)
        if name in FORWARD_ONLY:
            results[name] = run(activations | weights), {}
            continue
        y, pull_back = jax.vjp(run, activations | weights)
        turn = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).astype(jnp.bfloat16)  # the same numbers in both dtypes
        results[name] = y, pull_back(turn.reshape(y.shape).astype(y.dtype))[0]
    return results


@pytest.fixture(scope="module")
def found(light_compiles):
    inputs = {
        name: ({key: jnp.asarray(a, jnp.bfloat16) for key, a in activations.items()}, weights)
        for name, (activations, weights) in drawn().items()
    }
    return jax.jit(all_results)(inputs)


@pytest.fixture(scope="module")
def wanted(light_compiles):
    with jax.enable_x64(True):
        return jax.jit(all_results)(jax.tree.map(lambda a: a.astype(np.float64), drawn()))


@pytest.mark.parametrize("name", OPS)
def test_bfloat16_is_float64_to_its_rounding(found, wanted, name):
    """An operand or a result is rounded by 2⁻⁹ of itself; experts and MLA round four or five times in a row."""
    (y, gradients), (want, want_gradients) = found[name], wanted[name]
    activations, weights, _ = OPS[name]
    is_wide = name.startswith(("cross_entropy", "draft_loss")) or name.endswith("row_maxima")
    assert y.dtype == (jnp.float32 if is_wide or not activations else jnp.bfloat16)
    assert gradients.keys() == want_gradients.keys()
    assert all(g.dtype == (jnp.float32 if key in weights else jnp.bfloat16) for key, g in gradients.items())
    for key, got, expected in [("y", y, want), *((key, g, want_gradients[key]) for key, g in gradients.items())]:
        expected = np.asarray(expected)
        assert expected.dtype == np.float64 and np.abs(expected).max() > 0.1
        limit = 0.03 * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=limit, err_msg=key)
