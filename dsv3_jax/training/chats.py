"""Fine-tuning on chats: which template reads the examples, and the files that a run keeps to answer with it later."""

import math
from pathlib import Path

from dsv3_jax.config import ConfigError, DataConfig, RunConfig, replace
from dsv3_jax.data import tokenizer
from dsv3_jax.data.examples import load_examples
from dsv3_jax.data.shards import MANIFEST
from dsv3_jax.data.source import Source, open_source
from dsv3_jax.data.text_settings import TEMPLATE_FILE, TextSettings, copy_to_run, with_template
from dsv3_jax.hf import files
from dsv3_jax.hf.conversion import keep_origin
from dsv3_jax.hf.open_model import load_text
from dsv3_jax.hf.places import find
from dsv3_jax.training.run_folder import RUN_FILE

EPOCHS = 2.0  # passes over the examples. Source: DeepSeek-V3 report, section 5.1


def text_of(run: RunConfig, out: str | Path) -> TextSettings | None:
    """Read how a run reads chats: by its own files once it has begun, else by those of the model that it starts with.

    Returns: None for a run that is not on chats.
    Raises: ConfigError without a start; ValueError when there is no template, or a file is damaged.
    """
    if run.data.format != "chat":
        return None
    if (Path(out) / RUN_FILE).exists() and (Path(out) / TEMPLATE_FILE).exists():
        return with_template(load_text(out), None)
    if run.start is None:
        raise ConfigError("data.format='chat' fine-tunes a model: name it with start, as in --start MODEL")
    return with_template(load_text(run.start), run.data.chat_template)


def keep(run: RunConfig, out: str | Path, text: TextSettings) -> None:
    """Write the files with which `dsv3 chat` and `dsv3 convert` read text as the run does, if they are not there.

    Raises: ValueError when a file of the model that the run starts with is damaged; OSError.
    """
    if not (Path(out) / TEMPLATE_FILE).exists():
        assert run.start is not None
        start = find(run.start)
        if (start / files.CONFIG).is_file():
            keep_origin(start, out)
        copy_to_run(start, out, text)


def steps_of(run: RunConfig, out: str | Path, epochs: float = EPOCHS) -> int:
    """Return the number of steps that pass so often over a run's examples.

    Raises: ValueError as `load_examples`; ConfigError for epochs that are not positive.
    """
    if not (math.isfinite(epochs) and epochs > 0):
        raise ConfigError(f"epochs={epochs} is not positive")
    text = text_of(run, out)
    assert text is not None
    examples = load_examples(run.data, text)
    return max(1, math.ceil(epochs * examples.rows_per_epoch() / run.data.batch_size))


def measured_on(cfg: DataConfig, folder: str | Path, paths: tuple[str, ...] = ()) -> Source:
    """Open the data that a model in a folder is measured on.

    Args:
        cfg: of the model's run.
        paths: other data. Files of chat examples are read as such if the run was trained on chats.
    Raises: ValueError as `open_source`.
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
    text = load_text(folder) if cfg.format == "chat" else None
    return open_source(cfg, tokenizer.load(cfg.tokenizer), text)
