"""Products of few rows with a weight, by the C++ kernels, equal NumPy's in float64; and their gradients the ops'."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.cpu import calls, library, products
from dsv3_jax.ops import products as ops

ROWS = (1, 2, 3, 5, 8, 17, 64)
# Widths around multiples of 16 and 256 test full and partial registers and strips.
SHAPES = ((5, 1), (7, 19), (33, 256), (16, 523), (300, 1024))


@pytest.fixture(autouse=True)
def _kernels():
    if why := library.why_not():
        pytest.skip(why)


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def close(ours, theirs) -> None:
    """Assert equality up to float32 rounding of sums of up to 1,024 products."""
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_of_few_rows_whatever_the_other_rows_are(shape):
    drawn = draw((64, shape[0]), shape)
    x, w = map(jnp.asarray, drawn)
    together = np.asarray(calls.small_batch_matmul(x, w))
    close(together, drawn[0].astype(np.float64) @ drawn[1])
    for rows in ROWS:
        alone = products.product(x[-rows:], w)
        np.testing.assert_array_equal(np.asarray(alone), together[-rows:])


def test_a_product_over_head_axes():
    x, to_heads, out, from_heads = draw((2, 3, 24), (24, 4, 8), (2, 3, 4, 8), (4, 8, 24))
    q = np.einsum("btd,dhk->bthk", x, to_heads, dtype=np.float64)
    y = np.einsum("bthk,hkd->btd", out, from_heads, dtype=np.float64)
    close(products.product(jnp.asarray(x), jnp.asarray(to_heads)), q)
    close(products.product(jnp.asarray(out), jnp.asarray(from_heads), axes=2), y)


@pytest.mark.parametrize("hidden", [1, 40, 700])
def test_swiglu_of_few_rows(hidden):
    for rows in ROWS:
        x, w_gate, w_up, w_down = draw((rows, 48), (48, hidden), (48, hidden), (hidden, 48))
        a = x.astype(np.float64) @ w_gate
        theirs = (a / (1 + np.exp(-a)) * (x.astype(np.float64) @ w_up)) @ w_down
        close(products.swiglu(jnp.asarray(x), *(jnp.asarray(w) for w in (w_gate, w_up, w_down))), theirs)


def test_swiglu_is_finite_for_large_gates():
    """silu of ±10⁴, for which e^−x overflows float32."""
    x, one = jnp.asarray([[1e4], [-1e4]], jnp.float32), jnp.ones((1, 1), jnp.float32)
    np.testing.assert_allclose(np.asarray(calls.small_batch_swiglu(x, one, one, one)), [[1e8], [0.0]], atol=1e-20)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 19), (4, 64, 128)])
def test_each_head_has_its_own_matrix(shape, transposed):
    heads, depth, width = shape
    for rows in ROWS:
        x, w = draw((rows, heads, depth), (heads, width, depth) if transposed else shape)
        theirs = np.einsum("nhk,hmk->nhm" if transposed else "nhk,hkm->nhm", x, w, dtype=np.float64)
        ours, alone = (
            products.product_by_head(jnp.asarray(some[:, None]), jnp.asarray(w), transposed=transposed)[:, 0]
            for some in (x, x[-1:])
        )
        close(ours, theirs)
        np.testing.assert_array_equal(np.asarray(alone[0]), np.asarray(ours[-1]))


def test_concurrent_calls_share_the_helper_threads():
    """Every call returns its own product, whichever call the helpers work on."""
    x, w = map(jnp.asarray, draw((6, 300), (300, 2048)))
    run = jax.jit(calls.small_batch_matmul)
    alone = [np.asarray(run(x[i : i + 1], w)) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for i, found in enumerate(pool.map(lambda i: np.asarray(run(x[i % 6 : i % 6 + 1], w)), range(600))):
            np.testing.assert_array_equal(found, alone[i % 6])


@pytest.mark.parametrize(
    "name, shapes, settings",
    [
        ("product", ((3, 16), (16, 24)), {}),
        ("product", ((3, 4, 6), (4, 6, 7)), {"axes": 2}),
        ("swiglu", ((3, 16), (16, 40), (16, 40), (40, 16)), {}),
        ("product_by_head", ((3, 4, 6), (4, 6, 5)), {}),
    ],
)
def test_gradients_of_the_kernels_equal_those_of_the_ops(name, shapes, settings):
    """A training step with few rows differentiates these products."""
    arrays = [jnp.asarray(a) for a in draw(*shapes)]
    (weight,) = draw(getattr(ops, name)(*arrays, **settings).shape)

    def gradients(module):  # linear in the output: both differentiate from the same cotangent
        loss = lambda *a: (getattr(module, name)(*a, **settings) * weight).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays)))))(*arrays)

    for ours, theirs in zip(gradients(products), gradients(ops), strict=True):
        close(ours, np.asarray(theirs))
