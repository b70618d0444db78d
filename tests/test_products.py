"""Products with a weight: training's, and the kernels of decoding's few rows, against NumPy in float64."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.cpu import calls
from dsv3_jax.ops import products

ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 17, 64)
# The strips, the registers and the rest of a row: widths around multiples of 16 and of 256.
SHAPES = ((5, 1), (64, 160), (7, 19), (33, 256), (16, 523), (300, 1024))


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """The kernels are asked for, however small a weight is."""
    monkeypatch.setattr(products, "LARGE", 0)


@pytest.fixture
def kernels():
    if why := calls.why_not():
        pytest.skip(why)


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def close(ours, theirs) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_few_rows_are_the_product(shape):
    for rows in ROWS:
        x, w = draw((rows, shape[0]), shape)
        close(products.few_rows_product(jnp.asarray(x), jnp.asarray(w)), x.astype(np.float64) @ w)


def test_axes_are_those_of_heads():
    x, to_heads, out, from_heads = draw((2, 3, 24), (24, 4, 8), (2, 3, 4, 8), (4, 8, 24))
    q = np.einsum("btd,dhk->bthk", x, to_heads, dtype=np.float64)
    y = np.einsum("bthk,hkd->btd", out, from_heads, dtype=np.float64)
    for product in (products.product, products.few_rows_product):
        close(product(jnp.asarray(x), jnp.asarray(to_heads)), q)
        close(product(jnp.asarray(out), jnp.asarray(from_heads), 2), y)


@pytest.mark.parametrize("hidden", [1, 40, 256, 700])
def test_few_rows_swiglu(hidden):
    for rows in ROWS:
        x, w_gate, w_up, w_down = draw((rows, 48), (48, hidden), (48, hidden), (hidden, 48))
        a = x.astype(np.float64) @ w_gate
        theirs = (a / (1 + np.exp(-a)) * (x.astype(np.float64) @ w_up)) @ w_down
        weights = [jnp.asarray(w) for w in (w_gate, w_up, w_down)]
        close(products.swiglu(jnp.asarray(x), *weights), theirs)
        close(products.few_rows_swiglu(jnp.asarray(x), *weights), theirs)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 19), (4, 64, 128), (8, 16, 48)])
def test_each_head_has_its_own_matrix(shape, turned):
    heads, depth, width = shape
    for rows in ROWS:
        x, w = draw((rows, heads, depth), (heads, width, depth) if turned else shape)
        theirs = np.einsum("nhk,hmk->nhm" if turned else "nhk,hkm->nhm", x, w, dtype=np.float64)
        ours = products.few_rows_by_heads(jnp.asarray(x[:, None]), jnp.asarray(w), turned=turned)
        close(ours[:, 0], theirs)
        if not calls.why_not():  # a row does not hang on its neighbours
            alone = products.few_rows_by_heads(jnp.asarray(x[-1:]), jnp.asarray(w), turned=turned)
            np.testing.assert_array_equal(np.asarray(alone[0]), np.asarray(ours[-1, 0]))


def test_gates_far_from_zero_stay_finite(kernels):
    """silu of ±10⁴, where e^−x is no float32."""
    x, one = jnp.asarray([[1e4], [-1e4]], jnp.float32), jnp.ones((1, 1), jnp.float32)
    np.testing.assert_allclose(np.asarray(calls.few_rows_swiglu(x, one, one, one)), [[1e8], [0.0]], atol=1e-20)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_hang_on_its_neighbours(kernels, shape):
    x, w = map(jnp.asarray, draw((17, shape[0]), shape))
    together = np.asarray(calls.few_rows_product(x, w))
    for rows in ROWS:
        for first in range(0, 17, rows):
            alone = calls.few_rows_product(x[first : first + rows], w)
            np.testing.assert_array_equal(np.asarray(alone), together[first : first + rows])


def test_callers_at_the_same_time_share_the_helpers(kernels):
    """Each gets its own product, whoever the helpers work for."""
    x, w = map(jnp.asarray, draw((6, 300), (300, 2048)))
    run = jax.jit(calls.few_rows_product)
    alone = [np.asarray(run(x[i : i + 1], w)) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for i, found in enumerate(pool.map(lambda i: np.asarray(run(x[i % 6 : i % 6 + 1], w)), range(600))):
            np.testing.assert_array_equal(found, alone[i % 6])


def test_who_multiplies(monkeypatch):
    """The kernels for few rows of float32, or one with a large weight, XLA for all else."""
    monkeypatch.setattr(calls, "why_not", lambda: "")

    def by_kernel(rows: int, w: jax.Array) -> bool:
        # A function of its own each time, to be traced anew.
        made = jax.make_jaxpr(lambda x, w: products.few_rows_product(x, w))(jnp.ones((rows, 4), w.dtype), w)
        return "dsv3_few_rows" in str(made)

    w = jnp.ones((4, 4))
    assert by_kernel(1, w) and by_kernel(products.FEW_ROWS, w)
    assert not by_kernel(products.FEW_ROWS + 1, w)
    assert not by_kernel(1, w.astype(jnp.bfloat16))
    monkeypatch.setattr(products, "LARGE", w.nbytes + 1)
    assert not by_kernel(1, w) and by_kernel(2, w)
