"""Loads and biases that training wrote to a run's folder."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from dsv3_jax.report.metrics import LOAD_FILE, read_rows


class LoadLog(NamedTuple):
    """Loads of training batches, and the routers' biases after these steps."""

    steps: Int64[np.ndarray, " S"]  # ascending
    load: Int64[np.ndarray, "S L E"]  # assignments
    bias_steps: Int64[np.ndarray, " P"]  # the steps that have a bias: none in older runs
    bias: Float64[np.ndarray, "P L E"] | None


def read_load(run: str | Path) -> LoadLog | None:
    """Read the loads and biases that training wrote; None for a run without them, such as a converted one.

    Example:
        >>> read_load("no/such/run") is None
        True
    """
    rows = [row for row in read_rows(Path(run) / LOAD_FILE) if row.get("load")]
    if not rows:
        return None
    load = np.array([row["load"] for row in rows])
    biased = [row for row in rows if "bias" in row and np.shape(row["bias"]) == load.shape[1:]]
    return LoadLog(
        np.array([row["step"] for row in rows]),
        load,
        np.array([row["step"] for row in biased], np.int64),
        np.array([row["bias"] for row in biased], np.float64) if biased else None,
    )
