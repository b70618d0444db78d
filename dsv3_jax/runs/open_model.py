"""One way to open a model with its settings: a run, a released folder, or a hub id in the cache.

A released model is read as it is: nothing is converted or written, and there is no optimizer state.
"""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.chat import text_settings
from dsv3_jax.chat.examples import load_examples
from dsv3_jax.chat.text_settings import TEMPLATES_FOLDER, TEXT_FILES, TextSettings
from dsv3_jax.config import ONLY_FOR, DataConfig, ModelConfig, RunConfig, check_kind, replace
from dsv3_jax.data import tokenizer
from dsv3_jax.data.batches import Source
from dsv3_jax.data.manifest import MANIFEST
from dsv3_jax.data.source import open_source
from dsv3_jax.data.text_files import PACKED, files_below
from dsv3_jax.data.tokenizer import TIKTOKEN_FILE, Tokenizer
from dsv3_jax.hf import loading, tensor_files
from dsv3_jax.hf.places import find
from dsv3_jax.host.files import MAX_JSON, check_regular
from dsv3_jax.host.mirror import fetched
from dsv3_jax.kernels.choose import platform_of
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.runs.checkpoint import Loaded, load_run
from dsv3_jax.runs.folder import ORIGIN, RUN_FILE, TOKENIZER_FILE, read_run

RECORDS = (".json", ".jsonl", ".parquet")  # ends of names of files of chats
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
        dtype: of a released model's parameters. None means float32 on a CPU, whose kernels serve
            it, else bfloat16.
    Returns: (model, run, step); a released model's step is 0, its text that of the default corpus.
    Raises: ValueError if there is neither, or as `load_run` and `hf.load`.
    """
    place = fetched(place)
    if (place / RUN_FILE).is_file():
        return load_run(place, mesh, step=step, kernels=kernels)

    # A released model has no run: its settings are made of its config and its tokenizer.
    model = load_model(place, mesh, step=step, dtype=dtype, kernels=kernels)
    folder = find_released(place)
    return Loaded(model, released_run(folder, model.cfg, load_text(folder)), 0)


def load_model(
    folder: str | Path,
    mesh: Mesh | None = None,
    *,
    step: int | None = None,
    dtype: Any = None,
    kernels: str | None = None,
    mtp: bool = True,
) -> Transformer:
    """Load a model from a run or a released folder, without optimizer state. It needs no tokenizer.

    Args:
        folder: a folder that `dsv3 train` made, one with config.json and safetensors, or a hub id
            in the local cache.
        mesh: shards the model. None means a single device.
        step: of a run's checkpoint. None means the last.
        dtype: of a released model's parameters, float32 or bfloat16. None means float32 on a CPU,
            else bfloat16. A run's are as `load_run` says.
        kernels: as `Execution.kernels`. None means the run's own, and "auto" for a released folder.
        mtp: False leaves the MTP layers of a released model out, and so their memory. A run's are
            always loaded.
    Raises: ValueError if the folder holds neither, or as `load_run` and `hf.load`.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> import dsv3_jax as ds
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = ds.Transformer(cfg, rngs=nnx.Rngs(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ds.hf.save(model, folder, quiet=True)
        ...     ds.load_model(folder).cfg.num_layers
        1
    """
    check_kind("folder", folder, str | os.PathLike)
    folder = fetched(folder)
    if (folder / RUN_FILE).is_file():
        return load_run(folder, mesh, step=step, kernels=kernels).model
    if step is not None:
        raise ValueError(f"step={step} is for runs, and folder={str(folder)!r} is a released one")
    if dtype is None:
        dtype = jnp.float32 if platform_of(mesh) == "cpu" else jnp.bfloat16
    return loading.load(find_released(folder), dtype, mesh, mtp=mtp, kernels=kernels or "auto")


def find_released(place: str | Path) -> Path:
    """The folder of a released model.

    Raises: ValueError when it is none, or as `places.find`.
    """
    folder = find(place)
    if not (folder / tensor_files.CONFIG).exists():
        there = "is" if folder.is_dir() else "is no folder here, and"
        raise ValueError(
            f"folder={str(folder)!r} {there} neither a run (no {RUN_FILE}) nor released (no "
            f"{tensor_files.CONFIG})"
        )
    return folder


def released_run(folder: Path, cfg: ModelConfig, text: TextSettings) -> RunConfig:
    """The settings of a released model: its tokenizer, and the default corpus.

    Args: text: the folder's, from `load_text`.
    Raises: ValueError as `check_text`.
    """
    check_text(folder, cfg, text)
    name = str(tokenizer.file_of(str(folder)))
    return RunConfig(
        model=cfg, data=DataConfig(tokenizer=name, seq_len=min(SEQ_LEN, cfg.max_positions))
    )


def text_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that say how text is read and ended, by name.

    Raises: ValueError when one of them is a link out of the folder, no file, or too large.
    """
    found = {name: tensor_files.file_inside(folder, name) for name in TEXT_FILES}
    for path in text_settings.template_files(folder):
        found[f"{TEMPLATES_FOLDER}/{path.name}"] = tensor_files.file_inside(
            folder, path.name, under=TEMPLATES_FOLDER
        )

    # A folder has only some of them. A link that leads nowhere is kept here, and refused below.
    found = {name: path for name, path in found.items() if os.path.lexists(path)}
    for path in found.values():
        check_regular(path, MAX_JSON)
    return found


def check_text(folder: Path, cfg: ModelConfig, text: TextSettings) -> None:
    """Check that a model has every id of its folder's tokenizer.

    Raises: ValueError when it does not.
    """
    if (size := text.tokenizer.vocab_size) > cfg.vocab_size:
        file = tokenizer.file_of(str(folder))
        raise ValueError(
            f"{file} has vocab_size={size}, more than the model's vocab_size={cfg.vocab_size}"
        )


def open_draft(
    place: str | Path,
    own: Tokenizer,
    mesh: Mesh | None = None,
    *,
    kernels: str | None = None,
    dtype: Any = None,
) -> Transformer:
    """Load a model to draft for a model with tokenizer `own`, on the same mesh.

    Raises: ValueError as `load_model` and `load_text`, and if its tokenizer gives ids another
        meaning.
    """
    if not own.same_ids(load_text(place).tokenizer):
        raise ValueError(f"draft={str(place)!r} has another tokenizer: its ids mean other text")
    return load_model(place, mesh, dtype=dtype, kernels=kernels, mtp=False)


def load_text(folder: str | Path) -> TextSettings:
    """Read how the model of a run or of a released folder reads and ends text.

    Raises: ValueError if the folder holds neither, its tokenizer is absent or cannot be read, or
        one of the files is damaged or a link out of the folder.
    """
    place = folder = fetched(folder)
    is_run = (place / RUN_FILE).is_file()
    place = place if is_run else find_released(folder)

    # No file of text is read before all are known to be inside the folder.
    tensor_files.file_inside(place, tensor_files.CONFIG)  # an absent file passes
    names = text_files(place)

    # A run names its tokenizer in run.json, and the template's variables that it trained with.
    if is_run:
        run = read_run(place)
        data = run.data
        made_here = run.start or run.trunk or not (place / ORIGIN).exists()
        documents = data.format != "chat" and bool(made_here)
        return text_settings.read_settings(
            place, data.tokenizer, data.template, documents=documents
        )
    if not names.keys() & {TOKENIZER_FILE, TIKTOKEN_FILE}:
        raise ValueError(
            f"{place} has no tokenizer: neither {TOKENIZER_FILE} nor {TIKTOKEN_FILE} is in it"
        )
    return text_settings.read_settings(place)


def with_paths(cfg: DataConfig, paths: tuple[str, ...]) -> DataConfig:
    """A run's settings for other data: shards, files of chats if it was trained on them, or text.

    Example:
        >>> with_paths(DataConfig(format="chat", paths=("a.jsonl",)), ("a.txt",)).format
        'text'
    """
    # A folder of shards says so; records are chats if the run was trained on chats.
    if len(paths) == 1 and (Path(paths[0]) / MANIFEST).is_file():
        format = "shards"
    elif cfg.format == "chat" and any(map(_holds_records, paths)):
        format = "chat"
    else:
        format = "text"

    # Settings of other formats would be refused.
    defaults = vars(DataConfig())
    others = {name: defaults[name] for name, formats in ONLY_FOR.items() if format not in formats}
    return replace(cfg, paths=paths, format=format, **others)


def _holds_records(path: str) -> bool:
    """Whether a file may hold chats by its name, or each file of a folder may."""
    files = list(files_below(Path(path))) if Path(path).is_dir() else [Path(path)]
    names = [file.name.lower().removesuffix(PACKED) for file in files]
    return bool(names) and all(name.endswith(RECORDS) for name in names)


def measured_on(cfg: DataConfig, folder: str | Path) -> Source:
    """Open the data that a model in a folder is measured on.

    Args: cfg: of the model's run.
    Raises: ValueError as `open_source` and `load_examples`.
    """
    if cfg.format == "chat":
        return load_examples(cfg, load_text(folder))
    return open_source(cfg, tokenizer.load(cfg.tokenizer))
