"""One way to load a model, and how it reads text, whatever folder it is in."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dsv3_jax.data import text_settings, tokenizer
from dsv3_jax.data.text_settings import TextSettings
from dsv3_jax.hf import files
from dsv3_jax.hf.open_model import check_tokenizer, find_released, load_released, text_files
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training.checkpoint import load_run
from dsv3_jax.training.run_folder import RUN_FILE, read_run


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


def load_text(folder: str | Path) -> TextSettings:
    """Read how a run's or a released folder's model reads and ends text: tokenizer, BOS, chat template, stop tokens.

    Raises: ValueError if the folder holds neither, its tokenizer is absent or cannot be read, or one of the files is
        damaged or a link out of the folder.
    """
    place = Path(folder)
    is_run = (place / RUN_FILE).is_file()
    place = place if is_run else find_released(folder)
    files.file_inside(place, files.CONFIG)  # an absent file passes
    text_files(place)
    if is_run:
        return text_settings.read_run_folder(place, read_run(place).data.tokenizer)
    check_tokenizer(place)
    if not tokenizer.file_of(str(place)).is_file():
        return text_settings.read_run_folder(place, "bytes")
    return text_settings.read_released(place)
