"""One way to open a model with its settings, wherever it lies: a run, a released folder, or a hub id in the cache.

A released model is read as it is: nothing is converted or written, and there is no optimizer state.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import DataConfig, ModelConfig, RunConfig
from dsv3_jax.data import tokenizer
from dsv3_jax.data.text_settings import read_released
from dsv3_jax.data.tokenizer import SPECIALS, TIKTOKEN_FILE
from dsv3_jax.hf import files, reading
from dsv3_jax.hf.places import find
from dsv3_jax.kernels.choose import platform_of
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training.checkpoint import Loaded, load_run
from dsv3_jax.training.run_folder import RUN_FILE, TOKENIZER_FILE

SEQ_LEN = 256  # tokens of a row of text that a released model is measured on, at most


def open_model(
    place: str | Path,
    mesh: Mesh | None = None,
    *,
    step: int | None = None,
    kernels: str | None = None,
    dtype: Any = None,
) -> Loaded:
    """Load a model and the settings to read its text with.

    Args:
        place: a run's folder, or what `hf.load` takes.
        mesh: shards the model. None means a single device.
        step: of a run's checkpoint. None means the last.
        kernels: as `Execution.kernels`. None means a run's own, and "auto" for a released model.
        dtype: of a released model's parameters. None means float32 on a CPU, whose kernels serve it, else bfloat16.
    Returns: (model, run, step); a released model's step is 0, its text that of the default corpus.
    Raises: ValueError if there is neither, or as `load_run` and `hf.load`.
    """
    if (Path(place) / RUN_FILE).is_file():
        return load_run(place, mesh, step=step, kernels=kernels)
    if step is not None:
        raise ValueError(f"step={step} is for runs, and folder={str(place)!r} is a released one")
    model = load_released(place, mesh, dtype=dtype, kernels=kernels)
    return Loaded(model, released_run(find_released(place), model.cfg), 0)


def load_released(
    place: str | Path, mesh: Mesh | None = None, *, dtype: Any = None, kernels: str | None = None
) -> Transformer:
    """Load a released model. Arguments and errors as `open_model`, but no tokenizer is needed."""
    folder = find_released(place)
    if dtype is None:
        dtype = jnp.float32 if platform_of(mesh) == "cpu" else jnp.bfloat16
    return reading.load(folder, dtype, mesh, kernels=kernels or "auto")


def find_released(place: str | Path) -> Path:
    """The folder of a released model.

    Raises: ValueError when it is none, or as `places.find`.
    """
    folder = find(place)
    if not (folder / files.CONFIG).exists():
        raise ValueError(f"folder={str(folder)!r} is neither a run (no {RUN_FILE}) nor released (no {files.CONFIG})")
    return folder


def released_run(folder: Path, cfg: ModelConfig) -> RunConfig:
    """The settings of a released model: its tokenizer, and the default corpus.

    Raises: ValueError when the folder has no tokenizer that can be read, and is no model of bytes; or when its
        tokenizer has more ids than the model.
    """
    file = files.file_inside(folder, tokenizer.file_of(str(folder)).name)
    if file.is_file():
        name = str(file)
        check_text(folder, cfg)
    elif cfg.vocab_size == 256 + len(SPECIALS):
        name = "bytes"
    else:
        raise ValueError(
            f"{folder} has no tokenizer, neither {TOKENIZER_FILE} nor {TIKTOKEN_FILE}, and vocab_size={cfg.vocab_size} "
            "is not that of bytes"
        )
    return RunConfig(model=cfg, data=DataConfig(tokenizer=name, seq_len=min(SEQ_LEN, cfg.max_positions)))


def check_text(folder: Path, cfg: ModelConfig) -> None:
    """Check the files that say how a released folder's text is read and ended, against each other and the model.

    Raises: ValueError as `read_released`, and when the tokenizer has more ids than the model.
    """
    text = read_released(folder)
    if (size := text.tokenizer.vocab_size) > cfg.vocab_size:
        raise ValueError(
            f"{files.file_inside(folder, tokenizer.file_of(str(folder)).name)} has vocab_size={size}, more than the "
            f"model's vocab_size={cfg.vocab_size}"
        )


def open_draft(
    place: str | Path, run: RunConfig, mesh: Mesh | None = None, *, kernels: str | None = None
) -> Transformer:
    """Load a model to draft for a model of `run`, on the same mesh.

    Raises: ValueError as `open_model`, and if its tokenizer gives ids another meaning.
    """
    model, other, _ = open_model(place, mesh, kernels=kernels)
    if not tokenizer.load(run.data.tokenizer).same_ids(tokenizer.load(other.data.tokenizer)):
        raise ValueError(f"draft={str(place)!r} has another tokenizer: its ids mean other text")
    return model
