"""The loop's record of a step: a row of metrics as plain numbers, measures of the load, and the router's bias."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import RunConfig
from dsv3_jax.mesh.token_exchange import wire_bytes
from dsv3_jax.ops import balance

LOAD_ROWS = 1000  # about so many steps of a run log their load: a large model's is tens of kilobytes
NOT_NUMBERS = ("mtp_loss", "load", "bias", "finite")  # of a step's metrics
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


def biases(run: RunConfig, bias: nnx.State) -> dict[str, Array]:
    """The routers' biases after a step, in the rows of its load, [L, E], on its devices; empty if nothing moves them.

    They are a copy that is queued behind the step, because the next step takes the state.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.training.step import Job, abstract_state
        >>> run = ds.recipe("tiny")
        >>> state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_state(Job(run)).bias)
        >>> biases(run, state)["bias"].shape  # three sparse layers and one head
        (4, 16)
    """
    if balance.rule_of(run.model) is None or not run.model.balance.bias_rate:
        return {}
    if not (flat := nnx.to_flat_state(bias)):  # all layers are dense
        return {}
    heads = [(int(str(path[1])), value[...]) for path, value in flat if path[0] == "mtp"]
    trunk = [value[...] for path, value in flat if path[0] != "mtp"]
    return {"bias": _stacked(trunk, [value for _, value in sorted(heads, key=lambda pair: pair[0])])}


@jax.jit
def _stacked(trunk: list[Array], heads: list[Array]) -> Array:
    return jnp.concatenate([*trunk, *(head[None] for head in heads)])


@jax.jit
def _of_load(load: Array) -> tuple[Array, ...]:
    means = (f(load).mean() for f in (balance.max_vio, balance.entropy, balance.gini))
    low, high = balance.min_max(load)
    return (*means, low.min(), high.max())


def load_row(step: int, found: dict[str, Any]) -> dict[str, Any]:
    """A row of load.jsonl: the load, and the bias after the step where a rule moves it.

    Example:
        >>> import numpy as np
        >>> load_row(10, {"load": np.array([[3.0, 1.0]]), "bias": np.array([[-0.001, 0.001]], np.float32)})
        {'step': 10, 'load': [[3, 1]], 'bias': [[-0.001, 0.001]]}
    """
    row: dict[str, Any] = {"step": step, "load": np.asarray(found["load"]).astype(int).tolist()}
    if "bias" in found:
        row["bias"] = [[float(f"{x:.6g}") for x in layer] for layer in np.asarray(found["bias"]).tolist()]
    return row


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
    row |= {key: float(x) for key, x in found.items() if key not in (*row, *NOT_NUMBERS)}
    if not row.get("tokens_sent"):
        row.pop("tokens_sent", None)
    else:
        itemsize = jnp.dtype(run.execution.compute_dtype).itemsize
        row["wire_bytes"] = wire_bytes(row["tokens_sent"], run.model, itemsize)
    return row
