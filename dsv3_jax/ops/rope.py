"""Rotary position embedding, with YaRN's extension of its reach.

A pair of features is a point in a plane, and a token at position p rotates pair i by p·f_i. A dot
product of two rotated vectors then depends on their distance alone. YaRN slows the slow pairs by
`factor`, keeps the fast ones, and blends between, so that a model trained to L0 positions reads
`factor` times as many.
Source: arXiv 2104.09864 (RoPE), arXiv 2309.00071 (YaRN), the released DeepSeek-V3 inference code.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Yarn
from dsv3_jax.ops.dtypes import sum_dtype


def frequencies(rope_dim: int, theta: float, yarn: Yarn) -> np.ndarray:
    """Compute each pair's frequency, f_i = theta^(−2i/R), with YaRN's change if factor is not 1.

    Args:
        rope_dim: R, even.
        theta: the base.
        yarn: factor and range of YaRN; factor 1 means plain RoPE.
    Returns: float32 [R/2], radians for each position.

    Example:
        >>> frequencies(4, 100.0, Yarn()).round(1)
        array([1. , 0.1], dtype=float32)

    Source: arXiv 2104.09864; arXiv 2309.00071.
    """
    pairs = np.arange(0, rope_dim, 2, dtype=np.float64)
    freqs = theta ** (-pairs / rope_dim)
    if yarn.factor == 1.0:
        return freqs.astype(np.float32)

    # f_i ← (r_i / factor + 1 − r_i) f_i: the ramp r is 0 for fast pairs and 1 for slow ones.
    low, high = yarn_range(rope_dim, theta, yarn)
    ramp = np.clip((np.arange(rope_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return (freqs / yarn.factor * ramp + freqs * (1 - ramp)).astype(np.float32)


def yarn_range(rope_dim: int, theta: float, yarn: Yarn) -> tuple[int, int]:
    """The pairs between which YaRN blends: below `low` none is slowed, above `high` all are.

    Example:
        >>> yarn_range(64, 1e4, Yarn(factor=40.0))  # of V3's 32 pairs
        (10, 23)
    """

    def pair_that_turns(times: float) -> float:
        # Pair i turns L0 theta^(−2i/R) / 2π times in L0 positions. Solved for i:
        positions_a_radian = yarn.original_max_positions / (times * 2 * math.pi)
        return rope_dim * math.log(positions_a_radian) / (2 * math.log(theta))

    low = math.floor(pair_that_turns(yarn.beta_fast))
    high = math.ceil(pair_that_turns(yarn.beta_slow))
    return min(max(low, 0), rope_dim - 1), min(max(high, 0), rope_dim - 1)


def mscale(factor: float, weight: float) -> float:
    """YaRN's attention temperature: 0.1·weight·ln(factor) + 1.

    Example:
        >>> mscale(1.0, weight=1.0), round(mscale(40.0, weight=1.0), 2)
        (1.0, 1.37)
    """
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(qk_dim: int, yarn: Yarn) -> float:
    """The factor of attention scores: (N+R)^-1/2 · m², m = 1 without YaRN.

    Example:
        >>> softmax_scale(16, Yarn())
        0.25
    """
    m = mscale(yarn.factor, yarn.mscale_all_dim)
    return qk_dim**-0.5 * m * m


def cos_sin(
    positions: Int[Array, "*n"], freqs: Float[np.ndarray, " half"], yarn: Yarn
) -> tuple[Float[Array, "*n half"], Float[Array, "*n half"]]:
    """Cosine and sine of each position's angles, float32.

    YaRN multiplies both by m(yarn.mscale) / m(yarn.mscale_all_dim), where m is the function
    `mscale`. This is 1 in the released configs.

    Example:
        >>> freqs = np.array([np.pi / 2], np.float32)  # a quarter turn a position
        >>> cos, sin = cos_sin(jnp.array([0, 1]), freqs, Yarn())
        >>> sin
        Array([[0.],
               [1.]], dtype=float32)
    """
    of_pairs = jnp.asarray(freqs).reshape((1,) * positions.ndim + (-1,))
    angles = positions[..., None].astype(jnp.float32) * of_pairs
    ratio = mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    return jnp.cos(angles) * ratio, jnp.sin(angles) * ratio


def rotate(
    x: Float[Array, "*n R"],
    cos: Float[Array, "..."],
    sin: Float[Array, "..."],
    *,
    interleaved: bool,
) -> Array:
    """Rotate each pair of x's last axis by its angle, in float32 or wider, and round once.

    Args:
        x: [..., R].
        cos, sin: float32, of x's rank with R/2 last and axes of size 1 to broadcast over (heads).
        interleaved: pairs are (2i, 2i+1), as in the released weights; otherwise (i, i + R/2).
    Returns: [..., R] in x's dtype and layout. Scores agree between layouts when queries and keys
        share one.

    Example:
        >>> x = jnp.array([1.0, 2.0, 3.0, 4.0])
        >>> cos, sin = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> rotate(x, cos, sin, interleaved=True)  # (1, 2) stays, and (3, 4) makes a quarter turn
        Array([ 1.,  2., -4.,  3.], dtype=float32)
        >>> rotate(x, cos, sin, interleaved=False)  # (1, 3) stays, and (2, 4) makes a quarter turn
        Array([ 1., -4.,  3.,  2.], dtype=float32)
    """
    wide = sum_dtype(x.dtype)
    cos, sin = (factor.astype(wide) for factor in (cos, sin))

    # Each pair is a + i b, multiplied by cos + i sin.
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], -1, 2).astype(wide)
        a = pairs[..., 0]
        b = pairs[..., 1]
        rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(x.astype(wide), 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.astype(x.dtype)


def rotate_last(
    x: Float[Array, "*n X"],
    cos: Float[Array, "..."],
    sin: Float[Array, "..."],
    *,
    interleaved: bool,
) -> Array:
    """Rotate the last R numbers of each row, twice as many as cos has.

    Args: as `rotate`.

    Example:
        >>> cos, sin = jnp.array([0.0]), jnp.array([1.0])
        >>> rotate_last(jnp.array([7.0, 1.0, 2.0]), cos, sin, interleaved=True)
        Array([ 7., -2.,  1.], dtype=float32)
    """
    rest, last = jnp.split(x, [x.shape[-1] - 2 * cos.shape[-1]], axis=-1)
    return jnp.concatenate([rest, rotate(last, cos, sin, interleaved=interleaved)], axis=-1)
