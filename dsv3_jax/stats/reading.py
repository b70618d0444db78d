"""What a report reads: held-out text, all of the user's, one of their own; training's loads."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from dsv3_jax.config import DataConfig, replace
from dsv3_jax.data.batches import Batch, alternate
from dsv3_jax.data.byte_tokenizer import Tokenizer
from dsv3_jax.data.corpus import Corpus, read_documents
from dsv3_jax.data.packing import PackedRows, Piece
from dsv3_jax.data.source import from_corpus
from dsv3_jax.host.files import read_bytes
from dsv3_jax.report.metrics_files import LOAD_FILE, read_rows
from dsv3_jax.runs.open_model import measured_on, with_paths

BATCHES = 16  # of a run's own held-out text; text that the user names is read to its end
ALL = 2**31  # batches: to the end
OWN = "your text"  # the name of the domain of --text
_MAX_TEXT = 2**24  # bytes of the user's own text


@dataclass(frozen=True)
class Reading:
    """Batches to read, and what they are."""

    batches: list[Batch]
    domains: tuple[str, ...]
    data: str  # a name for titles
    # bytes of the training text by domain, where this is the run's own held-out text
    mix: dict[str, float] | None
    own: list[Batch]  # the user's own text, which is shown and not counted


def open_text(
    cfg: DataConfig,
    folder: str | Path,
    tokenizer: Tokenizer,
    *,
    paths: tuple[str, ...] = (),
    text: str | None = None,
    batches: int | None = None,
) -> Reading:
    """Open what a report reads.

    Args:
        cfg: of the model's run.
        paths: other text, read to its end; of shards and of files of chat examples, the held-out
            part. Empty means the run's held-out text.
        text: a sentence, or the path of a file, that is shown token by token.
        batches: the most to read. None means 16 of the run's own text, and all of `paths`.
    Raises: ValueError if a text cannot be read, is empty or in no known encoding.
    """
    own = [] if text is None else own_batches(read_own(text), tokenizer, cfg)
    cfg = with_paths(cfg, paths) if paths else cfg

    # Documents of the user's are read whole: nothing was trained on, so nothing is held out.
    if paths and cfg.format == "text":
        documents = tuple(read_documents(paths, cfg.text_column))
        if not documents:
            raise ValueError(f"paths={' '.join(paths)!r} hold no text")
        corpus = Corpus((), documents, tuple(dict.fromkeys(d.domain for d in documents)), "")
        source = from_corpus(corpus, tokenizer, replace(cfg, fim_rate=0.0))
        read = source.val_batches(ALL if batches is None else batches)
        return Reading(read, corpus.domains, ", ".join(paths), None, own)

    # Shards, chats and the run's own text are split as for training: read the held-out part.
    source = measured_on(cfg, folder)
    named = ", ".join(map(str, cfg.paths)) or "the text that comes with Python"
    if batches is None:
        batches = ALL if paths else BATCHES
    return Reading(
        source.val_batches(batches),
        source.domains,
        data=f"held-out part of {named}",
        mix=None if paths else source.training_bytes,
        own=own,
    )


def read_own(text: str) -> str:
    """Return the text of a file if `text` is the path of one, else `text` itself.

    Raises: ValueError for an empty text, and one that is not UTF-8 or in a file of more than 16
        MiB.

    Example:
        >>> read_own("a sentence")
        'a sentence'
        >>> read_own("caf\\udce9")
        Traceback (most recent call last):
            ...
        ValueError: text='caf\\udce9' is not UTF-8 at position 3
    """
    name = text if len(text) <= 80 else text[:77] + "…"
    try:
        if os.path.isfile(text):
            text = read_bytes(text, _MAX_TEXT).decode("utf-8-sig")
        text.encode()  # words of a command line may be any bytes
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"text={name!r} is not UTF-8 at position {error.start}") from error
    if not text.strip():
        raise ValueError(f"text={name!r} is empty")
    return text


def own_batches(text: str, tokenizer: Tokenizer, cfg: DataConfig) -> list[Batch]:
    """Cut a text into batches of rows from its beginning; the last rows are padding.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> batches = own_batches("abc", ByteTokenizer(), DataConfig(seq_len=2, batch_size=3))
        >>> batches[0]["tokens"].tolist()
        [[97, 98], [99, 0], [0, 0]]
    """
    tokens = tokenizer.encode_array(text)
    rows = PackedRows([Piece(tokens, 0, 0)], cfg.seq_len, separate=cfg.separate_documents)
    return alternate([rows], cfg.batch_size, ALL)


def first_batches(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first batches with at most so many tokens together, and at least one batch.

    Example:
        >>> from dsv3_jax.data.batches import one_row
        >>> len(first_batches([one_row(b"abc")] * 4, tokens=6))
        2
    """
    read = np.cumsum([(batch["segment_ids"] != 0).sum() for batch in batches])
    return list(batches[: max(1, int(np.searchsorted(read, tokens, side="right")))])


def folder_name(step: int, paths: tuple[str, ...], text: str | None) -> str:
    """Name the folder of a report by the step and by what is read, so that other reports stay.

    Example:
        >>> folder_name(400, (), None)
        'step-400'
        >>> folder_name(400, ("notes/",), None)
        'step-400-notes-5790af'
    """
    name = f"step-{step}"
    if not paths and text is None:
        return name
    word = Path(paths[0]).name if paths else "text"
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", word).strip("-.")[:24]

    # Different texts may have one name. A path means the same file from any folder.
    where = [str(Path(path).absolute()) if Path(path).exists() else path for path in paths]
    digest = hashlib.blake2b(
        repr((where, text)).encode("utf-8", "backslashreplace"), digest_size=3
    ).hexdigest()
    return "-".join(part for part in (name, word, digest) if part)


class LoadLog(NamedTuple):
    """Loads of training batches, and the routers' biases after these steps."""

    steps: Int64[np.ndarray, " S"]  # ascending
    load: Int64[np.ndarray, "S L E"]  # assignments
    bias: Float64[np.ndarray, "S L E"] | None  # None without a rule that moves it


def read_load(run: str | Path) -> LoadLog | None:
    """Read the loads and biases that training wrote; None for a run without, as a converted one.

    Example:
        >>> read_load("no/such/run") is None
        True
    """
    rows = [row for row in read_rows(Path(run) / LOAD_FILE) if row.get("load")]
    if not rows:
        return None
    steps = np.array([row["step"] for row in rows])
    load = np.array([row["load"] for row in rows])

    # Without a rule that moves it, no bias is written.
    bias = None
    if all(np.shape(row.get("bias", 0)) == load.shape[1:] for row in rows):
        bias = np.array([row["bias"] for row in rows], np.float64)
    return LoadLog(steps, load, bias)
