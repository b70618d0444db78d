"""Dtypes of intermediate numbers."""

from typing import Any

import numpy as np


def sum_dtype(dtype: Any) -> np.dtype:
    """The dtype in which numbers are added up: float32, or their own if it is wider.

    Example:
        >>> sum_dtype("bfloat16"), sum_dtype("float64")
        (dtype('float32'), dtype('float64'))
    """
    return np.promote_types(dtype, np.float32)
