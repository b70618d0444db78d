"""One way to load a model, and how it reads text, whatever folder it is in."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.data import text_settings
from dsv3_jax.data.text_settings import TextSettings
from dsv3_jax.hf import files, reading
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training.checkpoint import load_run
from dsv3_jax.training.run_folder import RUN_FILE, read_run


def load_model(
    folder: str | Path,
    mesh: Mesh | None = None,
    *,
    step: int | None = None,
    dtype: Any = jnp.float32,
    kernels: str | None = None,
) -> Transformer:
    """Load a model from a run or a released folder, without optimizer state.

    Args:
        folder: a folder that `dsv3 train` made, or one with config.json and safetensors.
        mesh: shards the model. None means a single device.
        step: of a run's checkpoint. None means the last.
        dtype: of a released folder's parameters, float32 or bfloat16; a run's are float32.
        kernels: as `Execution.kernels`. None means the run's own, and "auto" for a released folder.
    Raises: ValueError if the folder holds neither, or as `load_run` and `hf.load`.
    """
    folder = Path(folder)
    if _is_run(folder):
        return load_run(folder, mesh, step=step, kernels=kernels).model
    if step is not None:
        raise ValueError(f"step={step} is for runs, and folder={str(folder)!r} is a released one")
    return reading.load(folder, dtype, mesh, kernels=kernels or "auto")


def load_text(folder: str | Path) -> TextSettings:
    """Read how a run's or a released folder's model reads and ends text: tokenizer, BOS, chat template, stop tokens.

    Raises: ValueError if the folder holds neither, its tokenizer is absent or cannot be read, or one of the files is
        damaged or a link out of the folder.
    """
    folder = Path(folder)
    is_run = _is_run(folder)
    for name in (files.CONFIG, *text_settings.TEXT_FILES):
        files.file_inside(folder, name)  # an absent file passes
    if is_run:
        return text_settings.read_run_folder(folder, read_run(folder).data.tokenizer)
    return text_settings.read_released(folder)


def _is_run(folder: Path) -> bool:
    if (folder / RUN_FILE).is_file():
        return True
    if not (folder / files.CONFIG).exists():
        raise ValueError(f"folder={str(folder)!r} is neither a run (no {RUN_FILE}) nor released (no {files.CONFIG})")
    return False
