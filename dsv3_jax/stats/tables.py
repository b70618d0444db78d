"""Arrays as plain JSON, and how much of a large table is written."""

import math
from typing import Any

import numpy as np


def as_lists(values: Any) -> Any:
    """Convert to nested lists of numbers with six significant digits; NaN and infinity become None.

    Example:
        >>> as_lists([[1 / 3, float("nan")]])
        [[0.333333, None]]
    """
    values = np.asarray(values, np.float64)
    if values.ndim > 1:
        return [as_lists(part) for part in values]
    listed = [rounded(x) for x in values.ravel().tolist()]
    return listed if values.ndim else listed[0]


def rounded(x: float) -> float | None:
    """Round to six significant digits; NaN and infinity become None."""
    return float(f"{x:.6g}") if math.isfinite(x) else None


def budget(most: int, of_all: int, each: int) -> int:
    """How many of `each` entries fit if there are `of_all` lists; at least 1."""
    return max(1, min(each, most // max(of_all, 1)))


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of `count` indices, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, max(2, most)).round().astype(int))
