"""Products with a weight, by C++ and of flat rows; values and gradients are the ops'."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import needs_cpp, value_and_gradients
from runs import assert_near

from dsv3_jax.kernels.cpu import calls, products
from dsv3_jax.kernels.table import TABLE
from dsv3_jax.ops import products as ops

# Widths around multiples of 16 and 256 test full and partial registers and strips.
CASES = [  # the op, the shapes of its arrays, its settings
    *(("product", ((17, d), (d, n)), {}) for d, n in ((5, 1), (7, 19), (33, 256), (300, 523))),
    ("product", ((2, 3, 24), (24, 4, 8)), {}),
    ("product", ((2, 3, 4, 6), (4, 6, 7)), {"axes": 2}),
    ("swiglu", ((1, 48), (48, 700), (48, 700), (700, 48)), {}),
    ("swiglu", ((17, 48), (48, 1), (48, 1), (1, 48)), {}),
    ("product_by_head", ((2, 1, 4, 64), (4, 64, 128)), {}),
    ("product_by_head", ((17, 1, 3, 5), (3, 19, 5)), {"transposed": True}),
]


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@needs_cpp
@pytest.mark.parametrize("name, shapes, settings", CASES)
def test_values_and_gradients_are_those_of_the_ops_in_float64(name, shapes, settings):
    """A training step with few rows differentiates them. A row does not depend on the others."""
    arrays = draw(*shapes)
    ours, theirs = (partial(getattr(module, name), **settings) for module in (products, ops))
    y = ours(*map(jnp.asarray, arrays))
    weight = np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape)
    with jax.enable_x64(True):
        wide = [a.astype(np.float64) for a in (weight, *arrays)]
        want = value_and_gradients(theirs, *wide)
    assert_near(value_and_gradients(ours, weight, *arrays), want, 3e-5)  # up to 700 products
    for rows in (1, 3, 8):
        x, *weights = map(jnp.asarray, arrays)
        alone = ours(x[-rows:], *weights)
        np.testing.assert_array_equal(alone, y[-rows:])


@needs_cpp
def test_swiglu_is_finite_for_large_gates():
    """silu of ±10⁴, for which e^−x overflows float32."""
    x, one = jnp.asarray([[1e4], [-1e4]], jnp.float32), jnp.ones((1, 1), jnp.float32)
    y = calls.small_batch_swiglu(x, one, one, one)
    np.testing.assert_allclose(np.asarray(y), [[1e8], [0.0]], atol=1e-20)


@needs_cpp
def test_concurrent_calls_share_the_helper_threads():
    """Every call returns its own product, whichever call the helpers work on."""
    x, w = map(jnp.asarray, draw((6, 300), (300, 2048)))
    jitted = jax.jit(calls.small_batch_matmul)

    def run(i):
        return np.asarray(jitted(x[i % 6 : i % 6 + 1], w))

    alone = [run(i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for i, found in enumerate(pool.map(run, range(600))):
            np.testing.assert_array_equal(found, alone[i % 6])


@pytest.mark.parametrize(
    "name, shapes, settings",
    [
        ("product", ((2, 9, 4, 6), (4, 6, 7)), {"axes": 2}),
        ("swiglu", ((2, 9, 8), (8, 12), (8, 12), (12, 8)), {}),
        ("expand", ((2, 9, 8), (2, 9, 4), (3, 6, 8), (3, 5, 8)), {}),
    ],
)
def test_flat_rows_give_the_same_numbers(name, shapes, settings):
    """Also to the bit in training, where XLA on a CPU then copies no gradient."""
    rows = {row.name: row for row in TABLE[name]}
    arrays = [jnp.asarray(array) for array in draw(*shapes)]
    assert rows["flat_rows"].fits(*arrays, **settings)

    def run(row):
        y, vjp = jax.vjp(lambda *a: row.run(*a, **settings), *arrays)
        return y, vjp(jax.tree.map(jnp.cos, y))

    assert_near(run(rows["flat_rows"]), run(rows["xla"]), 1e-6)
