"""What is logged of a step: metrics of layers and of the experts' load, as a row of plain numbers.

A block returns its metrics by name. One rule holds for each name: a name that begins with "max_" is
a maximum over layers, parts of a batch and devices, any other a mean. A new metric is one entry
where its block makes it, in `model/moe.py` for a sparse one. A block sees one part of a batch:
a measure of the whole step's load, which is neither a mean nor a maximum, belongs in `of_load`.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsv3_jax.config import RunConfig
from dsv3_jax.mesh.rounds import wire_bytes
from dsv3_jax.ops import balance

# arrays by the block's path and by name, as `ForwardOut.metrics`
Metrics = dict[str, dict[str, Any]]


def _rule(name: str) -> Callable[..., Array]:
    return jnp.max if name.startswith("max_") else jnp.mean


def over_parts(metrics: Metrics) -> Metrics:
    """Metrics of a batch, from its stacked parts.

    Example:
        >>> over_parts({"": {"dropped": jnp.array([0.5, 1.0]), "max_logit": jnp.array([3.0, 2.0])}})
        {'': {'dropped': Array(0.75, dtype=float32), 'max_logit': Array(3., dtype=float32)}}
    """
    return {
        path: {name: _rule(name)(x, axis=0) for name, x in of.items()}
        for path, of in metrics.items()
    }


def over_layers(metrics: Metrics) -> dict[str, Array]:
    """One number for each name, over all blocks.

    Example:
        >>> trunk, head = {"dropped": jnp.array([0.0, 0.5])}, {"dropped": jnp.ones(())}
        >>> found = over_layers({"sparse": trunk, "mtp.0.block": head})
        >>> float(found["dropped"])
        0.5
    """
    by_name = defaultdict(list)
    for of in metrics.values():
        for name, x in of.items():
            by_name[name].append(x.reshape(-1))
    return {name: _rule(name)(jnp.concatenate(xs)) for name, xs in by_name.items()}


def of_load(load: Float[Array, "L E"]) -> dict[str, Array]:
    """Measures of a step's load: means over layers, and the extremes. Empty without layers.

    Example:
        >>> float(of_load(jnp.array([[6.0, 2.0, 2.0, 2.0]]))["max_vio"])
        1.0
    """
    if not load.shape[0]:
        return {}
    low, high = balance.min_max(load)
    return {
        "max_vio": balance.max_vio(load).mean(),
        "load_entropy": balance.entropy(load).mean(),
        "load_gini": balance.gini(load).mean(),
        "load_min": low.min(),
        "load_max": high.max(),
    }


def as_row(step: int, found: dict[str, Any], run: RunConfig) -> dict[str, Any]:
    """A row of metrics.jsonl: the numbers among a step's metrics.

    Example:
        >>> import dsv3_jax as ds
        >>> found = {"loss": np.float32(5.5), "mtp_loss": np.zeros(0), "tokens_sent": np.float32(0)}
        >>> as_row(10, found, ds.recipe("tiny"))
        {'step': 10, 'loss': 5.5}
    """
    row: dict[str, Any] = {"step": step, "loss": float(found["loss"])}
    if found["mtp_loss"].size:
        row["mtp_loss"] = [float(x) for x in found["mtp_loss"]]

    # Scalars alone; `finite` is what the loop stops by.
    row |= {key: float(x) for key, x in found.items() if np.ndim(x) == 0 and key != "finite"}

    # Tokens that went to other devices are bytes, too.
    if sent := row.pop("tokens_sent", 0.0):
        itemsize = jnp.dtype(run.execution.compute_dtype).itemsize
        row |= {"tokens_sent": sent, "wire_bytes": wire_bytes(sent, run.model, itemsize)}
    return row
