"""The C++ kernels for the experts on many tokens, with gradients, equal the oracle in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_dispatch import case, float32, value_and_gradients

from dsv3_jax.kernels.cpu import calls, library
from dsv3_jax.kernels.cpu.experts import grouped_swiglu

# Widths are below and above a register's 16 floats and a panel's 64. With n=900 an expert has more
# rows than a chunk's 256.
CASES = {
    "one row": ("uneven", dict(n=1, d=4, f=3, k=1)),
    "panels": ("two take all", dict(n=90, d=130, f=81)),
    "chunks": ("uneven", dict(n=900, d=20, f=33, num_experts=3)),
    "wide": ("two take all", dict(n=12, d=1100, f=2, num_experts=3)),
}


@pytest.fixture(autouse=True)
def _kernels():
    if why := library.why_not():
        pytest.skip(why)


def close(ours, theirs):
    """Assert equality up to float32 rounding (unit 6e-8) of sums of at most 1,100 products."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("choose, sizes", CASES.values(), ids=CASES)
def test_experts_and_their_gradients_equal_dense(rng, choose, sizes):
    arrays = [*map(float32, case(rng, choose, **sizes))]
    weight = jnp.asarray(rng.standard_normal(arrays[0].shape), jnp.float32)
    # a new lambda, so it is traced again
    ours = value_and_gradients(lambda *a: grouped_swiglu(*a), weight, *arrays)
    with jax.enable_x64(True):
        wide = [
            jnp.asarray(a, jnp.float64) if a.dtype == jnp.float32 else a for a in (weight, *arrays)
        ]
        theirs = value_and_gradients(oracles.routed_swiglu_jnp, *wide)
    close(ours, theirs)


def test_a_token_does_not_depend_on_other_tokens(rng):
    x, ids, gates, *weights = (jnp.asarray(float32(a)) for a in case(rng, "any", n=200, d=48, f=80))
    run = jax.jit(lambda *a: grouped_swiglu(*a))
    together = np.asarray(run(x, ids, gates, *weights))
    for first, count in ((0, 1), (30, 170)):
        part = slice(first, first + count)
        np.testing.assert_array_equal(
            run(x[part], ids[part], gates[part], *weights), together[part]
        )
    decoded = calls.decode_experts(x, ids, gates, *weights)
    np.testing.assert_allclose(decoded, together, rtol=1e-5, atol=1e-5 * np.abs(together).max())


def test_gradients_are_deterministic(rng):
    """They are bitwise equal in every run, although threads take the experts in any order."""
    arrays = [*map(float32, case(rng, "uneven", n=400, d=64, f=64))]
    first, *others = (
        jax.tree.leaves(value_and_gradients(grouped_swiglu, jnp.ones_like(arrays[0]), *arrays))
        for _ in range(6)
    )
    for other in others:
        assert all(map(np.array_equal, first, other))
