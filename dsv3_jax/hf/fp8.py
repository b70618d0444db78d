"""FP8 weights: e4m3 numbers, a float32 scale for each 128 × 128 block; value = number · scale."""

import ml_dtypes
import numpy as np

from dsv3_jax.hf.tensor_names import BLOCK

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0  # of e4m3
_SMALLEST_SCALE = np.float32(2.0**-100)  # no product with an e4m3 number is then subnormal
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
_ULPS = (0, 1, -1, 2, -2)


def dequantize(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Multiply FP8 numbers by the scales of their blocks.

    Args:
        numbers: float8_e4m3fn [out, in].
        scales: float32 [⌈out/128⌉, ⌈in/128⌉]; the last blocks may be partial.
    Returns: float32 [out, in].

    Example:
        >>> numbers, scales = quantize(np.full((2, 3), 0.5, np.float32))
        >>> dequantize(numbers, scales)[0].tolist()
        [0.5, 0.5, 0.5]
    """
    out = _VALUES[numbers.view(np.uint8)]
    # one row of blocks at a time saves a second array of the weight's size
    for row in range(scales.shape[0]):
        strip = out[row * BLOCK : (row + 1) * BLOCK]
        strip *= np.repeat(scales[row], BLOCK)[None, : out.shape[1]]
    return out


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a weight to FP8 numbers and scales.

    A scale is the block's largest magnitude over 448, rounded up to 20 significant bits. Then
    number · scale is exact in float32, and quantizing a dequantized weight returns the same bytes.
    Released files have scales of 24 bits. Such a scale is used where it represents every value of a
    block exactly.

    Args: values: float32 [out, in], finite.
    Returns: numbers and scales as `dequantize` takes them.

    Example:
        >>> numbers, scales = quantize(np.array([[896.0, -2.0]], np.float32))  # 896 is 2 · 448
        >>> numbers.astype(np.float32).tolist(), scales.tolist()
        ([[448.0, -1.0]], [[2.0]])
    """
    rows, columns = values.shape
    numbers = np.empty(values.shape, E4M3)
    scales = np.empty((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    for row in range(scales.shape[0]):
        # A row of blocks, filled up with zeros, which change no largest magnitude.
        strip = np.zeros((BLOCK, scales.shape[1] * BLOCK), np.float32)
        part = values[row * BLOCK : (row + 1) * BLOCK]
        strip[: part.shape[0], :columns] = part

        # [128, n · 128] → n blocks of 128 · 128 values, and back after rounding.
        blocks = strip.reshape(BLOCK, -1, BLOCK).swapaxes(0, 1).reshape(-1, BLOCK * BLOCK)
        scales[row] = _scales(blocks)
        rounded = _round(blocks, scales[row]).reshape(-1, BLOCK, BLOCK)
        rounded = rounded.swapaxes(0, 1).reshape(BLOCK, -1)
        numbers[row * BLOCK : (row + 1) * BLOCK] = rounded[: part.shape[0], :columns]
    return numbers, scales


def _scales(blocks: np.ndarray) -> np.ndarray:
    """Choose the scale of each of n blocks: float32 [n]."""
    largest = np.abs(blocks).max(axis=1)
    quotient = largest / np.float32(LARGEST)
    bits = quotient.view(np.uint32)

    # Round up to 20 significant bits: the lowest 4 of the 24 become 0.
    scales = ((bits + np.uint32(15)) & ~np.uint32(15)).view(np.float32)
    scales = np.where(largest > 0, np.maximum(scales, _SMALLEST_SCALE), np.float32(1))

    # A block that was dequantized has a scale near the quotient that makes all its values exact.
    undecided = np.flatnonzero(quotient > _SMALLEST_SCALE)
    for ulps in _ULPS:
        if undecided.size == 0:
            break
        candidates = (bits[undecided].astype(np.int64) + ulps).astype(np.uint32).view(np.float32)
        # Its first row rules out most blocks; only the likely ones are compared in full.
        likely = _is_exact(blocks[undecided, :BLOCK], candidates)
        undecided_likely = undecided[likely]
        exact = _is_exact(blocks[undecided_likely], candidates[likely])
        scales[undecided_likely[exact]] = candidates[likely][exact]
        undecided = np.setdiff1d(undecided, undecided_likely[exact])
    return scales


def _is_exact(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Say for each block whether all its values are e4m3 numbers times its scale: bool [n]."""
    return (_VALUES[_round(blocks, scales).view(np.uint8)] * scales[:, None] == blocks).all(axis=1)


def _round(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    # Clipped, because a value that rounds beyond 448 becomes NaN.
    return np.clip(blocks / scales[:, None], -LARGEST, LARGEST).astype(E4M3)
