"""RoPE and YaRN: the released models' constants, and scores that do not depend on the layout of the pairs."""

import math

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from models import small

from dsv3_jax import reference
from dsv3_jax.config import Yarn
from dsv3_jax.ops import rope

V3 = Yarn(factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0)
V2_LITE = Yarn(factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.707)
LN_40 = math.log(40)


@pytest.mark.parametrize(
    "rope_dim, theta, yarn",
    [
        (64, 1e4, Yarn()),
        (64, 1e4, V3),
        (32, 5e5, Yarn(factor=4.0, original_max_positions=8192)),
        (8, 1e4, Yarn(factor=8.0, original_max_positions=64)),  # low is clamped to 0
        (16, 10.0, Yarn(factor=3.0, original_max_positions=1000)),  # high is clamped to R-1
    ],
)
def test_frequencies_follow_yarn(rope_dim, theta, yarn):
    cfg = small(rope_head_dim=rope_dim, rope_theta=theta, yarn=yarn, max_positions=64)
    expected = reference.rope_frequencies(cfg)
    freqs = rope.frequencies(rope_dim, theta, yarn)
    assert freqs.dtype == jnp.float32
    np.testing.assert_allclose(freqs, expected, rtol=1e-6)  # a few float32 roundings


def test_yarn_blends_between_pairs_10_and_23_in_v3():
    ratio = np.asarray(rope.frequencies(64, 1e4, V3)) / np.asarray(rope.frequencies(64, 1e4, Yarn()))
    np.testing.assert_allclose(ratio[:11], 1.0, rtol=1e-6)  # the ramp is 0 up to pair 10 ...
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-6)  # ... and 1 from pair 23
    assert (np.diff(ratio[10:24]) < 0).all()


@pytest.mark.parametrize(
    "yarn, m_squared, scale", [(V3, 1.87385, 0.135234), (V2_LITE, 1.58963, 0.114721), (Yarn(), 1.0, 192**-0.5)]
)
def test_softmax_scale_of_released_models(yarn, m_squared, scale):
    assert rope.softmax_scale(192, yarn) == pytest.approx(scale, abs=5e-7)  # the published digits
    assert rope.softmax_scale(192, yarn) == pytest.approx(192**-0.5 * m_squared, rel=1e-5)


@pytest.mark.parametrize(
    "yarn, ratio",
    [
        (Yarn(), 1.0),
        (V3, 1.0),
        (V2_LITE, 1.0),
        (Yarn(factor=40.0, mscale=1.0, mscale_all_dim=0.707), (0.1 * LN_40 + 1) / (0.0707 * LN_40 + 1)),
        (Yarn(factor=40.0, mscale=1.0, mscale_all_dim=0.0), 0.1 * LN_40 + 1),
    ],
)
def test_cos_sin_are_multiplied_by_the_mscale_ratio(yarn, ratio):
    freqs = rope.frequencies(8, 1e4, yarn)
    positions = jnp.array([[0, 1, 2], [7, 100, 3000]], jnp.int32)
    cos, sin = rope.cos_sin(positions, freqs, yarn)
    assert cos.shape == sin.shape == (2, 3, 4)
    assert cos.dtype == sin.dtype == jnp.float32
    angles = np.asarray(positions)[..., None].astype(np.float64) * np.asarray(freqs, np.float64)
    # The angle is rounded to float32, which is an error of up to 3000 * 2^-24 rad.
    np.testing.assert_allclose(cos, ratio * np.cos(angles), atol=3e-4)
    np.testing.assert_allclose(sin, ratio * np.sin(angles), atol=3e-4)
    # At position 0 the cosine is the ratio itself.
    np.testing.assert_allclose(cos[0, 0], ratio, rtol=1e-6)


def rotated_score(q, k, q_position, k_position, freqs, *, interleaved):
    """Return q . k after each was rotated by its position."""
    rotated = []
    for x, position in ((q, q_position), (k, k_position)):
        cos, sin = rope.cos_sin(jnp.array([position], jnp.int32), freqs, Yarn())
        rotated.append(rope.rotate(jnp.asarray(x)[None], cos, sin, interleaved=interleaved)[0])
    return float(rotated[0] @ rotated[1])


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_follow_complex_rotation(rng, interleaved):
    freqs = rope.frequencies(8, 1e4, Yarn())
    q, k = rng.standard_normal((2, 8)).astype(np.float32)
    for q_position, k_position in [(0, 0), (5, 0), (9, 4), (40, 7)]:
        expected = oracles.rope_score(
            q, k, q_position, k_position, np.asarray(freqs, np.float64), interleaved=interleaved
        )
        score = rotated_score(q, k, q_position, k_position, freqs, interleaved=interleaved)
        assert score == pytest.approx(expected, abs=1e-4)  # angles up to 40 rad in float32, |q||k| about 8


def test_layouts_give_equal_scores_after_a_permutation(rng):
    freqs = rope.frequencies(8, 1e4, Yarn())
    q, k = rng.standard_normal((2, 8)).astype(np.float32)
    to_halves = [0, 2, 4, 6, 1, 3, 5, 7]  # pair (2i, 2i+1) moves to (i, i+R/2)
    pairs = rotated_score(q, k, 11, 3, freqs, interleaved=True)
    halves = rotated_score(q[to_halves], k[to_halves], 11, 3, freqs, interleaved=False)
    assert halves == pytest.approx(pairs, abs=1e-6)
    assert abs(rotated_score(q, k, 11, 3, freqs, interleaved=False) - pairs) > 1e-2  # the layouts differ


def test_rotation_keeps_dtype_and_broadcasts_over_heads(rng):
    freqs = rope.frequencies(8, 1e4, Yarn())
    cos, sin = rope.cos_sin(jnp.arange(6, dtype=jnp.int32).reshape(2, 3), freqs, Yarn())
    x = jnp.asarray(rng.standard_normal((2, 3, 5, 8)), jnp.bfloat16)
    rotated = rope.rotate(x, cos[..., None, :], sin[..., None, :], interleaved=True)
    assert rotated.shape == x.shape
    assert rotated.dtype == x.dtype
    alone = rope.rotate(x[1, 2, 4], cos[1, 2], sin[1, 2], interleaved=True)
    np.testing.assert_array_equal(rotated[1, 2, 4].astype(jnp.float32), alone.astype(jnp.float32))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_in_bfloat16_rounds_once(rng, interleaved):
    """Each number is the float32 result, rounded: it changes by at most 2^-8 of itself. Norms are kept."""
    freqs = rope.frequencies(64, 1e4, Yarn())
    cos, sin = rope.cos_sin(jnp.arange(512, dtype=jnp.int32), freqs, Yarn())
    x = jnp.asarray(rng.standard_normal((512, 64)), jnp.bfloat16)
    rotated = np.asarray(rope.rotate(x, cos, sin, interleaved=interleaved).astype(jnp.float32), np.float64)
    exact = np.asarray(rope.rotate(x.astype(jnp.float32), cos, sin, interleaved=interleaved), np.float64)
    np.testing.assert_allclose(rotated, exact, rtol=1.001 * 2**-8)
    norms = np.linalg.norm(rotated, axis=-1) / np.linalg.norm(np.asarray(x.astype(jnp.float32), np.float64), axis=-1)
    # 64 roundings of both signs: the norm's relative error is about 2^-9/sqrt(3)/8, and the mean's far less.
    assert np.abs(norms - 1).max() < 2**-9 and abs(norms.mean() - 1) < 3e-5
