"""Arrays of numbers as short text for the page: base64 of small integers, which the page's script reads again."""

import base64
from typing import Any

import numpy as np

WIDTHS = {8: np.uint8, 16: np.uint16, 32: np.uint32}


def pack(values: Any, bits: int = 16) -> dict[str, Any]:
    """Round real numbers to 2^bits − 1 equal steps between the least and the greatest; the last code is "missing".

    x ≈ low + code · (high − low) / (2^bits − 2)

    Args: values: nested lists or an array, of any shape; None and NaN are missing.
    Returns: shape, bits, low, high, and the codes in base64, little-endian.

    Example:
        >>> packed = pack([[0.0, 1.0], [0.25, None]])
        >>> packed["shape"], packed["low"], packed["high"]
        ([2, 2], 0.0, 1.0)
        >>> unpack(packed).round(4).tolist()
        [[0.0, 1.0], [0.25, nan]]
    """
    array = np.asarray(values, np.float64)
    known = np.isfinite(array)
    low, high = (float(array[known].min()), float(array[known].max())) if known.any() else (0.0, 0.0)
    last = 2**bits - 1
    codes = np.full(array.shape, last, np.float64)
    codes[known] = np.rint((array[known] - low) / ((high - low) or 1.0) * (last - 1))
    return {"shape": list(array.shape), "bits": bits, "low": low, "high": high, "codes": _text(codes, bits)}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """Read what `pack` wrote: float64, NaN where a value was missing."""
    codes = np.frombuffer(base64.b64decode(packed["codes"]), np.dtype(WIDTHS[packed["bits"]]).newbyteorder("<"))
    last = 2 ** packed["bits"] - 1
    values = packed["low"] + codes * ((packed["high"] - packed["low"]) / (last - 1))
    return np.where(codes == last, np.nan, values).reshape(packed["shape"])


def pack_ids(ids: Any) -> dict[str, Any]:
    """Write whole numbers from 0 exactly, in as few bytes as the largest needs.

    Example:
        >>> packed = pack_ids([[3, 0], [1, 300]])
        >>> packed["bits"], unpack_ids(packed).tolist()
        (16, [[3, 0], [1, 300]])
    """
    array = np.asarray(ids, np.int64)
    largest = int(array.max()) if array.size else 0
    bits = next(bits for bits in WIDTHS if largest < 2**bits)
    return {"shape": list(array.shape), "bits": bits, "codes": _text(array, bits)}


def unpack_ids(packed: dict[str, Any]) -> np.ndarray:
    """Read what `pack_ids` wrote."""
    codes = np.frombuffer(base64.b64decode(packed["codes"]), np.dtype(WIDTHS[packed["bits"]]).newbyteorder("<"))
    return codes.reshape(packed["shape"])


def _text(codes: np.ndarray, bits: int) -> str:
    return base64.b64encode(codes.astype(np.dtype(WIDTHS[bits]).newbyteorder("<")).tobytes()).decode("ascii")
