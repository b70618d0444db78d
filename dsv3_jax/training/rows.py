"""What the loop notes of a step: a row of metrics as plain numbers, and measures of the load."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.config import RunConfig
from dsv3_jax.mesh.token_exchange import wire_bytes
from dsv3_jax.ops import balance

LOAD_ROWS = 1000  # about so many steps of a run log their load: a large model's is tens of kilobytes
OF_LOAD = ("max_vio", "load_entropy", "load_gini", "load_min", "load_max")


def load_every(run: RunConfig) -> int:
    """Steps between two rows of load.jsonl: a multiple of `log_every`.

    Example:
        >>> import dsv3_jax as ds
        >>> load_every(ds.replace(ds.recipe("tiny"), steps=50_000, log_every=20))
        40
    """
    return run.log_every * max(1, run.steps // (LOAD_ROWS * run.log_every))


def measure(load: Float[Array, "L E"]) -> dict[str, Array]:
    """Measure a step's load, on its devices: means over layers, and the extremes. Empty without layers.

    The measures are queued behind the step, so the host may read them later without waiting for the steps after it.

    Example:
        >>> float(measure(jnp.array([[6.0, 2.0, 2.0, 2.0]]))["max_vio"])
        1.0
    """
    return dict(zip(OF_LOAD, _of_load(load), strict=True)) if load.shape[0] else {}


@jax.jit
def _of_load(load: Array) -> tuple[Array, ...]:
    means = (f(load).mean() for f in (balance.max_vio, balance.entropy, balance.gini))
    low, high = balance.min_max(load)
    return (*means, low.min(), high.max())


def as_row(step: int, found: dict[str, Any], run: RunConfig) -> dict[str, Any]:
    """A step's fetched metrics, and measures of its load, as plain numbers.

    Example:
        >>> import numpy as np
        >>> import dsv3_jax as ds
        >>> found = {"loss": np.float32(5.5), "mtp_loss": np.zeros(0), "tokens_sent": 0.0, "lr": np.float32(0.5)}
        >>> as_row(10, found, ds.recipe("tiny"))
        {'step': 10, 'loss': 5.5, 'lr': 0.5}
    """
    row: dict[str, Any] = {"step": step, "loss": float(found["loss"])}
    if found["mtp_loss"].size:
        row["mtp_loss"] = [float(x) for x in found["mtp_loss"]]
    for key in ("feature_loss", "balance_loss", "accuracy", "grad_norm", "lr", "dropped", "max_logit"):
        if key in found:
            row[key] = float(found[key])
    if found["tokens_sent"]:
        row["tokens_sent"] = float(found["tokens_sent"])
        itemsize = jnp.dtype(run.execution.compute_dtype).itemsize
        row["wire_bytes"] = wire_bytes(row["tokens_sent"], run.model, itemsize)
    return row | {key: float(found[key]) for key in OF_LOAD if key in found}
