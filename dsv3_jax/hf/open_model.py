"""One way to open a model with its settings, wherever it lies: a run, a released folder, or a hub id in the cache.

A released model is read as it is: nothing is converted or written, and there is no optimizer state.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.chat import text_settings
from dsv3_jax.chat.examples import load_examples
from dsv3_jax.chat.text_settings import TEMPLATES_FOLDER, TEXT_FILES, TextSettings
from dsv3_jax.config import DataConfig, ModelConfig, RunConfig, replace
from dsv3_jax.data import tokenizer
from dsv3_jax.data.batches import Source
from dsv3_jax.data.shards import MANIFEST
from dsv3_jax.data.source import open_source
from dsv3_jax.data.special_tokens import read_object
from dsv3_jax.data.tokenizer import SPECIALS, TIKTOKEN_FILE, ByteTokenizer
from dsv3_jax.files import MAX_JSON, check_regular
from dsv3_jax.hf import files, reading
from dsv3_jax.hf.places import find
from dsv3_jax.kernels.choose import platform_of
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training.checkpoint import Loaded, load_run
from dsv3_jax.training.run_folder import RUN_FILE, TOKENIZER_FILE, read_run

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
    place: str | Path, mesh: Mesh | None = None, *, dtype: Any = None, kernels: str | None = None, mtp: bool = True
) -> Transformer:
    """Load a released model. Arguments and errors as `open_model` and `hf.load`, but no tokenizer is needed."""
    folder = find_released(place)
    if dtype is None:
        dtype = jnp.float32 if platform_of(mesh) == "cpu" else jnp.bfloat16
    return reading.load(folder, dtype, mesh, mtp=mtp, kernels=kernels or "auto")


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

    Raises: ValueError as `check_tokenizer` and `check_text`.
    """
    check_tokenizer(folder)
    file = tokenizer.file_of(str(folder))
    name = str(file) if file.is_file() else "bytes"
    if name != "bytes":
        check_text(folder, cfg)
    return RunConfig(model=cfg, data=DataConfig(tokenizer=name, seq_len=min(SEQ_LEN, cfg.max_positions)))


def check_tokenizer(folder: Path) -> None:
    """Check that a released folder has a tokenizer, or that its tokens are known to be bytes.

    Raises: ValueError when neither holds, or the tokenizer is a link out of the folder.
    """
    if text_files(folder).keys() & {TOKENIZER_FILE, TIKTOKEN_FILE} or is_byte_export(folder):
        return
    also = next((f.name for f in sorted(folder.glob("*.model"))), None)
    other = f"; the format of {also} is not supported" if also else ""
    size, eos = 256 + len(SPECIALS), ByteTokenizer().eos_id
    if read_object(folder / files.CONFIG).get("vocab_size") == size:
        other += f'; if its tokens are bytes, write "eos_token_id": {eos} into its {files.CONFIG}'
    raise ValueError(f"{folder} has no tokenizer: neither {TOKENIZER_FILE} nor {TIKTOKEN_FILE} is in it{other}")


def is_byte_export(folder: Path) -> bool:
    """Whether a released folder without a tokenizer is a run of bytes as earlier versions of `dsv3 convert` wrote it.

    Both numbers together tell: the smallest vocabulary of a trained BPE has as many ids, but its end of document is 0.
    """
    config = read_object(files.file_inside(folder, files.CONFIG))
    ours = config.get("vocab_size") == 256 + len(SPECIALS) and config.get("eos_token_id") == ByteTokenizer().eos_id
    return ours and not any(folder.glob("*.model"))


def text_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that say how text is read and ended, by name: tokenizer, chat templates, sampling.

    Raises: ValueError when one of them is a link out of the folder, no file, or too large.
    """
    found = {name: files.file_inside(folder, name) for name in TEXT_FILES}
    for path in text_settings.template_files(folder):
        found[f"{TEMPLATES_FOLDER}/{path.name}"] = files.file_inside(folder, path.name, under=TEMPLATES_FOLDER)
    found = {name: path for name, path in found.items() if path.is_file()}
    for path in found.values():
        check_regular(path, MAX_JSON)
    return found


def check_text(folder: Path, cfg: ModelConfig) -> None:
    """Check the files that say how a released folder's text is read and ended, against each other and the model.

    Raises: ValueError as `read_released`, and when the tokenizer has more ids than the model.
    """
    text = text_settings.read_released(folder)
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


def measured_on(cfg: DataConfig, folder: str | Path, paths: tuple[str, ...] = ()) -> Source:
    """Open the data that a model in a folder is measured on.

    Args:
        cfg: of the model's run.
        paths: other data. Files of chat examples are read as such if the run was trained on chats.
    Raises: ValueError as `open_source` and `load_examples`.
    """
    if paths:
        is_shards = len(paths) == 1 and (Path(paths[0]) / MANIFEST).is_file()
        if not is_shards and cfg.format == "shards":
            cfg = replace(cfg, format="text", mixture=(), temperature=1.0)
        cfg = replace(cfg, paths=paths)
        if is_shards:
            cfg = replace(cfg, format="shards", chat_template=None, mixture=(), max_documents=None, fim_rate=0.0)
        elif not any(Path(path).suffix.lower() in (".jsonl", ".parquet") for path in paths):
            cfg = replace(cfg, format="text", chat_template=None)
    if cfg.format == "chat":
        return load_examples(cfg, load_text(folder))
    return open_source(cfg, tokenizer.load(cfg.tokenizer))
