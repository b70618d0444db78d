"""One way to load a model, whatever folder it is in."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.hf import files, reading
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training.checkpoint import load_run
from dsv3_jax.training.run_folder import RUN_FILE


def load_model(
    folder: str | Path, mesh: Mesh | None = None, *, step: int | None = None, dtype: Any = jnp.float32
) -> Transformer:
    """Load a model from a run or a released folder, without optimizer state.

    Args:
        folder: a folder that `dsv3 train` made, or one with config.json and safetensors.
        mesh: shards the model. None means a single device.
        step: of a run's checkpoint. None means the last.
        dtype: of a released folder's parameters, float32 or bfloat16; a run's are float32.
    Raises: ValueError if the folder holds neither, or as `load_run` and `hf.load`.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> import dsv3_jax as ds
        >>> model = ds.Transformer(ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0), rngs=nnx.Rngs(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ds.hf.save(model, folder, quiet=True)
        ...     ds.load_model(folder).cfg.num_layers
        1
    """
    folder = Path(folder)
    if (folder / RUN_FILE).is_file():
        return load_run(folder, mesh, step=step).model
    if not (folder / files.CONFIG).exists():
        raise ValueError(f"folder={str(folder)!r} is neither a run (no {RUN_FILE}) nor released (no {files.CONFIG})")
    if step is not None:
        raise ValueError(f"step={step} is for runs, and folder={str(folder)!r} is a released one")
    return reading.load(folder, dtype, mesh)
