"""One way to load a model, wherever it lies."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dsv3_jax.hf.open_model import open_model
from dsv3_jax.model.transformer import Transformer


def load_model(
    folder: str | Path, mesh: Mesh | None = None, *, step: int | None = None, dtype: Any = None
) -> Transformer:
    """Load a model from a run or a released folder, without optimizer state.

    Args:
        folder: a folder that `dsv3 train` made, one with config.json and safetensors, or a hub id in the local cache.
        mesh: shards the model. None means a single device.
        step: of a run's checkpoint. None means the last.
        dtype: of a released model's parameters, float32 or bfloat16. None means float32 on a CPU, else bfloat16. A
            run's are float32.
    Raises: ValueError if the folder holds neither, or as `load_run` and `hf.load`.
    """
    return open_model(folder, mesh, step=step, dtype=dtype).model
