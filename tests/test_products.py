"""Products with a weight, by XLA and by the C++ kernels for few rows, equal NumPy's in float64."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.cpu import calls, library
from dsv3_jax.kernels.cpu import products as cpu_products
from dsv3_jax.ops import products

ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 17, 64)
# Widths around multiples of 16 and 256 test full and partial registers and strips.
SHAPES = ((5, 1), (64, 160), (7, 19), (33, 256), (16, 523), (300, 1024))


@pytest.fixture(params=["xla", "cpu"])
def path(request):
    """The module under test: plain XLA, or the C++ kernels."""
    if request.param == "cpu" and (why := library.why_not()):
        pytest.skip(why)
    return cpu_products if request.param == "cpu" else products


@pytest.fixture
def kernels():
    """Skip the test if the C++ kernels cannot be compiled."""
    if why := library.why_not():
        pytest.skip(why)


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def close(ours, theirs) -> None:
    """Assert equality up to float32 rounding of sums of up to 1,024 products."""
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_product_of_few_rows(path, shape):
    for rows in ROWS:
        x, w = draw((rows, shape[0]), shape)
        close(path.product(jnp.asarray(x), jnp.asarray(w)), x.astype(np.float64) @ w)


def test_product_over_head_axes(path):
    x, to_heads, out, from_heads = draw((2, 3, 24), (24, 4, 8), (2, 3, 4, 8), (4, 8, 24))
    q = np.einsum("btd,dhk->bthk", x, to_heads, dtype=np.float64)
    y = np.einsum("bthk,hkd->btd", out, from_heads, dtype=np.float64)
    close(path.product(jnp.asarray(x), jnp.asarray(to_heads)), q)
    close(path.product(jnp.asarray(out), jnp.asarray(from_heads), 2), y)


@pytest.mark.parametrize("hidden", [1, 40, 256, 700])
def test_swiglu_of_few_rows(path, hidden):
    for rows in ROWS:
        x, w_gate, w_up, w_down = draw((rows, 48), (48, hidden), (48, hidden), (hidden, 48))
        a = x.astype(np.float64) @ w_gate
        theirs = (a / (1 + np.exp(-a)) * (x.astype(np.float64) @ w_up)) @ w_down
        weights = [jnp.asarray(w) for w in (w_gate, w_up, w_down)]
        close(path.swiglu(jnp.asarray(x), *weights), theirs)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 19), (4, 64, 128), (8, 16, 48)])
def test_each_head_has_its_own_matrix(path, shape, transposed):
    heads, depth, width = shape
    for rows in ROWS:
        x, w = draw((rows, heads, depth), (heads, width, depth) if transposed else shape)
        theirs = np.einsum("nhk,hmk->nhm" if transposed else "nhk,hkm->nhm", x, w, dtype=np.float64)
        ours = path.product_by_head(jnp.asarray(x[:, None]), jnp.asarray(w), transposed=transposed)
        close(ours[:, 0], theirs)
        if path is cpu_products:  # a row does not depend on the other rows
            alone = path.product_by_head(jnp.asarray(x[-1:]), jnp.asarray(w), transposed=transposed)
            np.testing.assert_array_equal(np.asarray(alone[0]), np.asarray(ours[-1, 0]))


def test_swiglu_is_finite_for_large_gates(kernels):
    """silu of ±10⁴, for which e^−x overflows float32."""
    x, one = jnp.asarray([[1e4], [-1e4]], jnp.float32), jnp.ones((1, 1), jnp.float32)
    np.testing.assert_allclose(np.asarray(calls.small_batch_swiglu(x, one, one, one)), [[1e8], [0.0]], atol=1e-20)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_other_rows(kernels, shape):
    x, w = map(jnp.asarray, draw((17, shape[0]), shape))
    together = np.asarray(calls.small_batch_matmul(x, w))
    for rows in ROWS:
        for first in range(0, 17, rows):
            alone = calls.small_batch_matmul(x[first : first + rows], w)
            np.testing.assert_array_equal(np.asarray(alone), together[first : first + rows])


def test_concurrent_calls_share_the_helper_threads(kernels):
    """Every call returns its own product, whichever call the helpers work on."""
    x, w = map(jnp.asarray, draw((6, 300), (300, 2048)))
    run = jax.jit(calls.small_batch_matmul)
    alone = [np.asarray(run(x[i : i + 1], w)) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for i, found in enumerate(pool.map(lambda i: np.asarray(run(x[i % 6 : i % 6 + 1], w)), range(600))):
            np.testing.assert_array_equal(found, alone[i % 6])


def test_gradients_of_the_kernels_equal_those_of_the_ops(kernels):
    """A training step with few rows differentiates these products."""
    x, w, to_heads, by_head, w_gate, w_up, w_down = map(
        jnp.asarray, draw((3, 16), (16, 24), (16, 4, 6), (4, 6, 5), (16, 40), (16, 40), (40, 16))
    )
    q = products.product(x, to_heads)
    cases = {
        "product": (x, w),
        "swiglu": (x, w_gate, w_up, w_down),
        "product_by_head": (q, by_head),
    }
    weights = {name: jnp.asarray(draw(getattr(products, name)(*a).shape)[0]) for name, a in cases.items()}
    for name, arrays in cases.items():

        def gradients(module, name=name, arrays=arrays):
            # Linear in the output: both then differentiate from the same cotangent.
            loss = lambda *a: (getattr(module, name)(*a) * weights[name]).sum()  # noqa: E731
            return jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays)))))(*arrays)

        for ours, theirs in zip(gradients(cpu_products), gradients(products), strict=True):
            close(ours, np.asarray(theirs))
    two_axes = jax.grad(lambda a, b: cpu_products.product(a, b, 2).sum(), argnums=(0, 1))
    a, b = map(jnp.asarray, draw((2, 3, 4), (3, 4, 5)))
    for ours, theirs in zip(two_axes(a, b), (jnp.broadcast_to(b.sum(-1), (2, 3, 4)), a.sum(0)[..., None]), strict=True):
        close(ours, np.broadcast_to(theirs, ours.shape))
