"""Products of few rows with a weight, by C++, and their gradients equal the ops' in float64."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import needs_cpp

from dsv3_jax.kernels.cpu import calls, products
from dsv3_jax.ops import products as ops

pytestmark = needs_cpp

ROWS = (1, 3, 8, 17)
# Widths around multiples of 16 and 256 test full and partial registers and strips.
SHAPES = ((5, 1), (7, 19), (33, 256), (300, 523))


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def close(ours, theirs) -> None:
    """Assert equality up to float32 rounding of sums of up to 700 products."""
    atol = 2e-5 * np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_of_few_rows_whatever_the_other_rows_are(shape):
    drawn = draw((17, shape[0]), shape)
    x, w = map(jnp.asarray, drawn)
    together = np.asarray(calls.small_batch_matmul(x, w))
    close(together, drawn[0].astype(np.float64) @ drawn[1])
    for rows in ROWS:
        alone = products.product(x[-rows:], w)
        np.testing.assert_array_equal(np.asarray(alone), together[-rows:])


def test_swiglu_is_finite_for_large_gates():
    """silu of ±10⁴, for which e^−x overflows float32."""
    x, one = jnp.asarray([[1e4], [-1e4]], jnp.float32), jnp.ones((1, 1), jnp.float32)
    y = calls.small_batch_swiglu(x, one, one, one)
    np.testing.assert_allclose(np.asarray(y), [[1e8], [0.0]], atol=1e-20)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_head_does_not_depend_on_other_rows(transposed):
    x, w = map(jnp.asarray, draw((17, 1, 3, 5), (3, 19, 5) if transposed else (3, 5, 19)))
    run = partial(products.product_by_head, transposed=transposed)
    together, alone = run(x, w), run(x[-1:], w)
    np.testing.assert_array_equal(np.asarray(together[-1]), np.asarray(alone[0]))


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
        ("product", ((2, 3, 24), (24, 4, 8)), {}),
        ("product", ((2, 3, 4, 6), (4, 6, 7)), {"axes": 2}),
        ("swiglu", ((1, 48), (48, 700), (48, 700), (700, 48)), {}),
        ("swiglu", ((17, 48), (48, 1), (48, 1), (1, 48)), {}),
        ("product_by_head", ((2, 1, 4, 64), (4, 64, 128)), {}),
        ("product_by_head", ((17, 1, 3, 5), (3, 19, 5)), {"transposed": True}),
    ],
)
def test_values_and_gradients_are_those_of_the_ops_in_float64(name, shapes, settings):
    """A training step with few rows differentiates these products."""
    arrays = draw(*shapes)

    def found(module, dtype):
        def loss(*arrays):
            y = getattr(module, name)(*arrays, **settings)
            return (y * jnp.cos(jnp.arange(y.size, dtype=dtype)).reshape(y.shape)).sum(), y

        grad = jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)
        (_, y), grads = jax.jit(grad)(*(jnp.asarray(a, dtype) for a in arrays))
        return y, *grads

    with jax.enable_x64(True):
        want = found(ops, jnp.float64)
    for ours, theirs in zip(found(products, jnp.float32), want, strict=True):
        close(ours, np.asarray(theirs))
