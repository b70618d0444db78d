"""The ops with sums in bfloat16, and float32 weights as in training, against the op in float64.

The op in float64 is held to its oracle in the op's own test. Here both get the same numbers,
activations that bfloat16 represents and float32 weights. Outputs and gradients may then differ by
bfloat16's rounding of operands and results alone, and gradients of float32 weights must be float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.xla.in_order import look_up_in_order
from dsv3_jax.ops import attention, cross_entropy, dispatch, draft_loss, mla, products

B, T, H, D, C, N, R, V, E, F, W = 2, 6, 3, 12, 10, 8, 4, 5, 4, 7, 19
ALL_IDS = np.tile(np.arange(E, dtype=np.int32), (B * T, 1))
IDS = np.random.default_rng(1).permuted(ALL_IDS, axis=1)[:, :2]
TOKENS = np.random.default_rng(2).integers(0, W, (B, T), np.int32)
# hidden states in whole numbers, which take no gradient
OTHER = np.random.default_rng(3).integers(-2, 3, (B * T, D))
EXPERTS = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
ONE_EXPERT = {name: shape[1:] for name, shape in EXPERTS.items()}
ROWS = {"x": (B * T, D), "gates": (B * T, 2)}


def experts(x, gates, *weights):
    return dispatch.grouped_swiglu(x, jnp.asarray(IDS), gates, *weights)


def few_experts(x, gates, *weights):
    return dispatch.capacity_swiglu(x, jnp.asarray(IDS), gates, *weights, factor=0.8)[0]


def nats(h, w):
    targets, mask = jnp.asarray(TOKENS.reshape(-1)), jnp.ones(B * T, bool)
    return cross_entropy.chunked_cross_entropy(h, w.astype(h.dtype), targets, mask, chunk=5)[0]


def apart(h, w):
    args = h, jnp.asarray(OTHER, h.dtype), w.astype(h.dtype), jnp.ones(B * T, bool)
    return draft_loss.summed_distance(*args, "kl", chunk=5)


# Op → (function; shapes of its activations, in bfloat16, and of its weights, in float32)
OPS = {
    "attention": (
        partial(attention.causal_attention, scale=0.3),
        {"q": (B, T, H, N), "k": (B, T, H, N), "v": (B, T, H, V)},
        {},
    ),
    "cross_entropy": (nats, {"h": (B * T, D)}, {"w": (D, W)}),
    "grouped_swiglu": (experts, ROWS, EXPERTS),
    "capacity_swiglu": (few_experts, ROWS, EXPERTS),
    "draft_loss": (apart, {"h": (B * T, D)}, {"w": (D, W)}),
    "embedding": (lambda w: look_up_in_order(w, jnp.asarray(TOKENS)), {}, {"w": (W, D)}),
    "expand": (
        lambda *a: jnp.concatenate(mla.expand(*a), axis=-1),
        {"c_kv": (B, T, C), "k_rope": (B, T, R)},
        {"w_uk": (H, N, C), "w_uv": (H, V, C)},
    ),
    "product": (products.product, {"x": (B, T, D)}, {"w": (D, H, N)}),
    "exact_product": (products.exact_product, {"x": (B * T, D)}, {"w": (D, E)}),
    "swiglu": (products.swiglu, {"x": (B * T, D)}, ONE_EXPERT),
    "product_by_head": (products.product_by_head, {"x": (B, T, H, N)}, {"w": (H, N, V)}),
}


def drawn(dtype, of_weights):
    """Op → arrays by name: activations that bfloat16 represents, and weights that it does not."""
    rng, found = np.random.default_rng(0), {}
    for name, (_, activations, weights) in OPS.items():
        found[name] = arrays = {}
        for key, shape in activations.items():
            arrays[key] = rng.standard_normal(shape).astype(jnp.bfloat16).astype(dtype)
        for key, shape in weights.items():
            weight = np.float32(rng.standard_normal(shape) / np.sqrt(shape[-2]))
            arrays[key] = weight.astype(of_weights)
    return found


@jax.jit
def all_results(inputs):
    """Op → (output, gradients by name): one program for all ops compiles fastest."""
    results = {}
    for name, arrays in inputs.items():
        run, activations, weights = OPS[name]
        in_order = [arrays[key] for key in activations | weights]  # `jax.jit` sorts names
        y, pull_back = jax.vjp(run, *in_order)
        # the same numbers in both dtypes
        turn = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).astype(jnp.bfloat16)
        gradients = pull_back(turn.reshape(y.shape).astype(y.dtype))
        results[name] = (y, dict(zip(activations | weights, gradients, strict=True)))
    return results


@pytest.mark.long
def test_bfloat16_is_float64_to_its_rounding():
    """Operands and results are rounded by 2⁻⁹ of themselves; experts and MLA round 4 or 5 times."""
    found = all_results(drawn(jnp.bfloat16, np.float32))
    with jax.enable_x64(True):
        wanted = all_results(drawn(np.float64, np.float64))
    for name, (_, activations, weights) in OPS.items():
        (y, gradients), (want, want_gradients) = found[name], wanted[name]
        is_wide = name in ("cross_entropy", "draft_loss") or not activations
        assert y.dtype == (jnp.float32 if is_wide else jnp.bfloat16), name
        for key, g in gradients.items():
            assert g.dtype == (jnp.float32 if key in weights else jnp.bfloat16), (name, key)
        results = {"y": y, **gradients}
        for key, expected in {"y": want, **want_gradients}.items():
            largest, where = np.abs(expected).max(), f"{name}: {key}"
            assert expected.dtype == np.float64 and largest > 0.1
            got = np.float64(results[key])
            np.testing.assert_allclose(got, expected, atol=0.03 * largest, err_msg=where)
