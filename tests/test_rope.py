"""RoPE and YaRN: the released models' constants, and the reference page's scores, both layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import small

from dsv3_jax import reference
from dsv3_jax.config import Yarn
from dsv3_jax.ops import rope

V3 = Yarn(factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0)
V2_LITE = Yarn(factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.707)


@pytest.mark.parametrize(
    "rope_dim, theta, yarn",
    [
        (64, 1e4, V3),
        (32, 5e5, Yarn(factor=4.0, original_max_positions=8192)),
        (8, 1e4, Yarn(factor=8.0, original_max_positions=64)),  # low is clamped to 0
        (16, 10.0, Yarn(factor=3.0, original_max_positions=1000)),  # high is clamped to R-1
    ],
)
def test_frequencies_follow_yarn(rope_dim, theta, yarn):
    cfg = small(rope_head_dim=rope_dim, rope_theta=theta, yarn=yarn, max_positions=64)
    freqs = np.asarray(rope.frequencies(rope_dim, theta, yarn))
    assert freqs.dtype == np.float32
    # a few float32 roundings
    np.testing.assert_allclose(freqs, reference.rope_frequencies(cfg), rtol=1e-6)
    if yarn is V3:  # the ramp is 0 up to pair 10, and 1 from pair 23
        ratio = freqs * theta ** (np.arange(32) / 32)
        np.testing.assert_allclose(ratio[[0, 10, 23, 31]], [1, 1, 1 / 40, 1 / 40], rtol=1e-5)


@pytest.mark.parametrize(
    "yarn, m_squared, scale",
    [(V3, 1.87385, 0.135234), (V2_LITE, 1.58963, 0.114721), (Yarn(), 1.0, 192**-0.5)],
)
def test_softmax_scale_of_released_models(yarn, m_squared, scale):
    assert rope.softmax_scale(192, yarn) == pytest.approx(scale, abs=5e-7)  # the published digits
    assert rope.softmax_scale(192, yarn) == pytest.approx(192**-0.5 * m_squared, rel=1e-5)


@pytest.mark.parametrize(
    "interleaved, yarn", [(True, V2_LITE), (False, Yarn(40.0, mscale=1.0, mscale_all_dim=0.707))]
)
def test_scores_are_the_pages(rng, yarn, interleaved):
    """With mscale's ratio, 1 in the first. A score depends on distance and on the pairs' layout."""
    cfg = small(rope_head_dim=8, nope_head_dim=1, rope_interleaved=interleaved, yarn=yarn)
    q, k = rng.standard_normal((2, 2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 5, 9, 40, 100], [7, 1, 0, 3, 2]], np.int32)

    @jax.jit
    def rotated(*arrays):
        cos, sin = rope.cos_sin(
            jnp.asarray(positions), rope.frequencies(8, cfg.rope_theta, yarn), yarn
        )
        assert cos.shape == sin.shape == (2, 5, 4) and cos.dtype == sin.dtype == jnp.float32
        return [
            rope.rotate(x, cos[:, :, None], sin[:, :, None], interleaved=interleaved)
            for x in arrays
        ]

    ours = rotated(q, k)
    ctx = reference.Context(cfg, positions, np.ones_like(positions))
    none = np.zeros((2, 5, 3, 1))
    theirs = [
        reference.rotate(ctx, np.concatenate([none, x], axis=-1))
        for x in (q.astype(float), k.astype(float))
    ]
    got, want = (np.einsum("bthx,bshx->bhts", *pair) for pair in (ours, theirs))
    # angles up to 100 rad in float32, |q||k| about 8
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert np.abs(got - np.einsum("bthx,bshx->bhts", q, k)).max() > 1
