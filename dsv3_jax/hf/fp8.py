"""FP8 weights: e4m3 numbers with one float32 scale for each 128 × 128 block; value = number · scale."""

import ml_dtypes
import numpy as np

from dsv3_jax.hf.table import BLOCK

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
_TINY = np.float32(2.0**-100)  # a scale is never below, so that no product is subnormal
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
_ULPS = (0, 1, -1, 2, -2)


def dequantize(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 values of an FP8 weight.

    Args: numbers: float8_e4m3fn [out, in]; scales: float32 [⌈out/128⌉, ⌈in/128⌉], the last blocks may be partial.
    """
    out = _VALUES[numbers.view(np.uint8)]
    for row in range(scales.shape[0]):  # a strip of blocks at a time: no second array of the weight's size
        strip = out[row * BLOCK : (row + 1) * BLOCK]
        strip *= np.repeat(scales[row], BLOCK)[None, : out.shape[1]]
    return out


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FP8 numbers and scales of a finite float32 weight [out, in]; see `dequantize`.

    A scale is the block's largest magnitude over 448, rounded up to 20 significant bits: number · scale is then exact
    in float32, and quantizing what `dequantize` gave returns the same bytes. Where a block is some other FP8 block's
    exact value (a scale of 24 bits, as in the released files), the scale that makes it exact is found again.
    """
    rows, columns = values.shape
    numbers = np.empty(values.shape, E4M3)
    scales = np.empty((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    for row in range(scales.shape[0]):
        strip = np.zeros((BLOCK, scales.shape[1] * BLOCK), np.float32)
        part = values[row * BLOCK : (row + 1) * BLOCK]
        strip[: part.shape[0], :columns] = part
        blocks = strip.reshape(BLOCK, -1, BLOCK).swapaxes(0, 1).reshape(-1, BLOCK * BLOCK)
        scales[row] = _scales(blocks)
        found = _round(blocks, scales[row]).reshape(-1, BLOCK, BLOCK).swapaxes(0, 1).reshape(BLOCK, -1)
        numbers[row * BLOCK : (row + 1) * BLOCK] = found[: part.shape[0], :columns]
    return numbers, scales


def _scales(blocks: np.ndarray) -> np.ndarray:
    """float32 [n]: the scale of each of n blocks."""
    largest = np.abs(blocks).max(axis=1)
    exact = largest / np.float32(LARGEST)
    bits = exact.view(np.uint32)
    # Up to 20 significant bits: the lowest 4 of the 24 become 0.
    made = ((bits + np.uint32(15)) & ~np.uint32(15)).view(np.float32)
    made = np.where(largest > 0, np.maximum(made, _TINY), np.float32(1))
    undecided = np.flatnonzero(exact > _TINY)
    for ulps in _ULPS:
        if undecided.size == 0:
            break
        scale = (bits[undecided].astype(np.int64) + ulps).astype(np.uint32).view(np.float32)
        first = _is_exact(blocks[undecided, :BLOCK], scale)  # a row tells most blocks that are not
        likely = undecided[first]
        whole = _is_exact(blocks[likely], scale[first])
        made[likely[whole]] = scale[first][whole]
        undecided = np.setdiff1d(undecided, likely[whole])
    return made


def _is_exact(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bool [n]: whether every value of a block is an e4m3 number times the block's scale."""
    return (_VALUES[_round(blocks, scales).view(np.uint8)] * scales[:, None] == blocks).all(axis=1)


def _round(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    # Clipped, for what is rounded up beyond 448 becomes NaN.
    return np.clip(blocks / scales[:, None], -LARGEST, LARGEST).astype(E4M3)
