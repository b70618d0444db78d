"""Metrics of layers: how layers, parts of a batch and devices become one logged number.

A block returns its metrics by name. One rule holds for each name: a name that begins with "max_" is a maximum over
all of them, any other a mean. A new metric is one entry where its block makes it, in `model/moe.py` for a sparse one.
"""

from collections import defaultdict
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

Metrics = dict[str, dict[str, Any]]  # arrays by the block's path and by name, as `ForwardOut.metrics`


def is_max(name: str) -> bool:
    """Whether a metric's rule is the maximum.

    Example:
        >>> is_max("max_logit"), is_max("dropped")
        (True, False)
    """
    return name.startswith("max_")


def weighted(metrics: Metrics, share: float) -> Metrics:
    """The metrics of a part that is such a share of its batch, to be added by `add`.

    Example:
        >>> weighted({"sparse": {"dropped": 0.5, "max_logit": 3.0}}, share=0.5)
        {'sparse': {'dropped': 0.25, 'max_logit': 3.0}}
    """
    return {path: {name: x if is_max(name) else x * share for name, x in of.items()} for path, of in metrics.items()}


def add(a: Metrics, b: Metrics) -> Metrics:
    """Add two parts of a batch.

    Example:
        >>> both = add({"": {"dropped": 0.25, "max_logit": 3.0}}, {"": {"dropped": 0.5, "max_logit": 2.0}})
        >>> float(both[""]["dropped"]), float(both[""]["max_logit"])
        (0.75, 3.0)
    """
    return {
        path: {name: (jnp.maximum if is_max(name) else jnp.add)(x, b[path][name]) for name, x in of.items()}
        for path, of in a.items()
    }


def empty(metrics: Metrics) -> Metrics:
    """What `add` starts from, in the shapes of these.

    Example:
        >>> empty({"": {"dropped": jnp.ones(1), "max_logit": jnp.ones(1)}})
        {'': {'dropped': Array([0.], dtype=float32), 'max_logit': Array([-inf], dtype=float32)}}
    """
    return {
        path: {name: jnp.full_like(x, -jnp.inf if is_max(name) else 0) for name, x in of.items()}
        for path, of in metrics.items()
    }


def logged(metrics: Metrics) -> dict[str, Array]:
    """One number for each name, over all blocks.

    Example:
        >>> found = logged({"sparse": {"dropped": jnp.array([0.0, 0.5])}, "mtp.0.block": {"dropped": jnp.array(1.0)}})
        >>> float(found["dropped"])
        0.5
    """
    by_name = defaultdict(list)
    for of in metrics.values():
        for name, x in of.items():
            by_name[name].append(x.reshape(-1))
    return {name: (jnp.max if is_max(name) else jnp.mean)(jnp.concatenate(xs)) for name, xs in by_name.items()}
