"""Rows of Hugging Face datasets: `hf:NAME` of the hub, streamed, or `hf:FOLDER`, a saved one.

    hf:ORGANISATION/NAME            the split train
    hf:ORGANISATION/NAME:CONFIG     a configuration of it
    hf:ORGANISATION/NAME@SPLIT      another split, as in hf:allenai/c4:en@validation
    hf:FOLDER                       what `save_to_disk` wrote, or a folder that `load_dataset` knows

Rows come one by one, so memory does not depend on their number. The package `datasets` is the extra
of that name.
"""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

PREFIX = "hf:"
SPLIT = "train"
SAVED = ("state.json", "dataset_dict.json")  # files that `save_to_disk` writes


def is_dataset(path: str) -> bool:
    """Whether a path of `DataConfig.paths` names a dataset.

    Example:
        >>> is_dataset("hf:allenai/c4:en"), is_dataset("books")
        (True, False)
    """
    return path.startswith(PREFIX)


def parts_of(path: str) -> tuple[str, str | None, str]:
    """Split `hf:NAME[:CONFIG][@SPLIT]`.

    Raises: ValueError when a part is empty.

    Example:
        >>> parts_of("hf:allenai/c4:en@validation"), parts_of("hf:saved")
        (('allenai/c4', 'en', 'validation'), ('saved', None, 'train'))
    """
    rest, at, split = path.removeprefix(PREFIX).partition("@")
    name, colon, config = rest.partition(":")
    if not name or (at and not split) or (colon and not config):
        raise ValueError(
            f"path={path!r} has an empty part; write hf:NAME, hf:NAME:CONFIG or "
            "hf:NAME:CONFIG@SPLIT"
        )
    return name, config or None, split or SPLIT


def dataset_rows(
    path: str, needed: Sequence[str], kept: Collection[str] | None
) -> Iterator[dict[str, Any]]:
    """Read a dataset row by row.

    Args: needed: columns of which one must be there; kept: those to keep. None means all.
    Raises: ValueError for a dataset that has none of the columns or no such split, or without
        `datasets`; and errors of many kinds for one that cannot be found or read.
    """
    name, config, split = parts_of(path)
    try:
        import datasets
    except ImportError as error:
        raise ValueError("it needs datasets: pip install datasets") from error

    # A folder that `save_to_disk` wrote has all splits, or one; anything else is loaded by name.
    if any((Path(name) / file).is_file() for file in SAVED):
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise ValueError(f"there is no split {split!r} among {sorted(found)}")
            found = found[split]
    else:
        found = datasets.load_dataset(name, config, split=split, streaming=True)

    # Some streams know their columns only from their first row: they are not narrowed.
    columns = found.column_names
    if columns is not None:
        if not set(columns) & set(needed):
            raise ValueError(f"there is no column {needed[0]!r} among {sorted(columns)}")
        if kept is not None:
            found = found.select_columns([column for column in columns if column in kept])
    yield from found


def numbered(
    path: str, rows: Iterable[dict[str, Any]], limit: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows that a library reads, each with its location for errors.

    Args: limit: characters of a row as JSON, at most.
    Raises: ValueError with path and row when the library fails, or when JSON cannot hold a value: a
        time, bytes.
    """
    number = 0
    try:
        for row in rows:
            if (size := len(json.dumps(row, ensure_ascii=False))) > limit:
                raise ValueError(f"the next row has {size:,} characters, more than {limit:,}")
            number += 1
            yield f"{path}, row {number}", row
    except Exception as error:  # the libraries' have many kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path} cannot be read after row {number}: {reason}") from error


def absolute(path: str) -> str:
    """A path of files or a dataset that does not depend on the current directory.

    Example:
        >>> absolute("books") == os.path.join(os.getcwd(), "books"), absolute("hf:owner/name")
        (True, 'hf:owner/name')
    """
    if not is_dataset(path):
        return os.path.abspath(path)
    name = parts_of(path)[0]  # a folder, or a name of the hub
    place = os.path.abspath(name) if os.path.exists(name) else name
    return PREFIX + place + path.removeprefix(PREFIX + name)
