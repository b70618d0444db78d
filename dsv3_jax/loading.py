"""One way to load a model, whatever folder it is in."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dsv3_jax.hf.open_model import load_released
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training.checkpoint import load_run
from dsv3_jax.training.run_folder import RUN_FILE


def load_model(
    folder: str | Path,
    mesh: Mesh | None = None,
    *,
    step: int | None = None,
    dtype: Any = None,
    kernels: str | None = None,
    mtp: bool = True,
) -> Transformer:
    """Load a model from a run or a released folder, without optimizer state.

    Args:
        folder: a folder that `dsv3 train` made, one with config.json and safetensors, or a hub id in the local cache.
        mesh: shards the model. None means a single device.
        step: of a run's checkpoint. None means the last.
        dtype: of a released model's parameters, float32 or bfloat16. None means float32 on a CPU, else bfloat16. A
            run's are float32.
        kernels: as `Execution.kernels`. None means the run's own, and "auto" for a released folder.
        mtp: False leaves the MTP layers of a released model out, and so their memory. A run's are always loaded.
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
    if (Path(folder) / RUN_FILE).is_file():
        return load_run(folder, mesh, step=step, kernels=kernels).model
    if step is not None:
        raise ValueError(f"step={step} is for runs, and folder={str(folder)!r} is a released one")
    return load_released(folder, mesh, dtype=dtype, kernels=kernels, mtp=mtp)
