"""Rows of the user's files: JSON, Parquet, a dataset, or files that are one text each.

JSON, JSONL and texts may end in .gz: they are unpacked while they are read.
"""

import gzip
import os
import reprlib
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_jax.data.hub import dataset_rows, is_dataset, numbered, parts_of
from dsv3_jax.host.files import check_regular, open_file, parse_json

PACKED = ".gz"

_BINARY = (b"%PDF-", b"\x28\xb5\x2f\xfd")  # PDF and .zst begin so, and may have no zero byte soon

_MAX_TEXT_BYTES = 2**31  # of a file that is one text

_MAX_LIST_BYTES = 2**30  # of a file that is one JSON list

_MAX_LINE_BYTES = 2**26  # of a line of JSONL, or a row of a library

_MAX_CHAT_BYTES = 2**23  # of a line of chats: the places of its tokens take a hundred times as much

_PARQUET_ROWS = 16  # that are decoded at once: a file of kilobytes may hold many rows of megabytes

MAX_DOMAIN = 200  # characters of a domain's name


def rows_of_path(
    path: str, needed: Sequence[str], chats: bool = False, whole: bool = False
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Read the rows of one of `DataConfig.paths`: JSONL, Parquet, a dataset, or files of one text.

    Args:
        needed: keys; Parquet and datasets must have one of them. The first one is that of a file's
            text.
        chats: read what else a chat may have, too, and .json files that are a list; pass over files
            other than JSON and Parquet.
        whole: read all columns of Parquet and datasets, as of JSON.
    Returns: triples of where the row is, for errors, the row, and its domain. That is the one that
        it states, else the first folder below the path or the file's suffix, for chats the file's
        name.
    Raises: ValueError that names the path, file or row.
    """
    # Rows of any source come with where they are, and the domain of those that state none.
    also = ("domain", "tools", "functions", "system", "answer") if chats else ("domain",)
    columns = None if whole else {*needed, *also}
    limit = _MAX_CHAT_BYTES if chats else _MAX_LINE_BYTES
    if is_dataset(path):
        name = Path(parts_of(path)[0]).name
        rows = dataset_rows(path, needed, columns)
        found = ((*located, name) for located in numbered(path, rows, limit))
    else:
        found = _rows_of_files(Path(path), needed, columns, chats, limit)

    for location, row, domain in found:
        if not isinstance(row, dict):
            raise ValueError(f"{location}, is not an object")
        own = row.get("domain")
        if own is not None and (not isinstance(own, str) or len(own) > MAX_DOMAIN):
            raise ValueError(
                f'{location}: "domain" is {reprlib.repr(own)}, not a string of {MAX_DOMAIN} or less'
            )

        yield location, row, visible(own or domain, MAX_DOMAIN)


def visible(text: str, limit: int) -> str:
    """Return the first characters of a text for terminals, pictures and JSON.

    Names and sentences may hold control codes and broken UTF-8.

    Example:
        >>> visible("a\x1b[31m", 2)
        'a\ufffd'
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:limit])


def _rows_of_files(
    root: Path, needed: Sequence[str], columns: Collection[str] | None, chats: bool, limit: int
) -> Iterator[tuple[str, Any, str]]:
    if not root.exists():
        raise ValueError(f"path={str(root)!r} does not exist")
    binary: list[Path] = []
    linked: list[Path] = []
    for file in files_below(root, linked=linked) if root.is_dir() else (root,):
        if file.is_symlink() and not file.exists():
            print(f"passed over {str(file)!r}: a link that leads nowhere", file=sys.stderr)
            continue

        name = Path(file.stem) if file.suffix.lower() == PACKED else file
        suffix = name.suffix.lower()
        domain = name.stem if chats else _domain_of(name, file.relative_to(root).parts[:-1])

        # A binary file that the user names is refused; one of a folder is passed over.
        rows: Iterable[tuple[str, Any]] = ()
        try:
            check_regular(file)
            if chats and suffix == ".json" and _head(file).lstrip().startswith(b"["):
                rows = numbered(str(file), _values_of(file), limit)
            elif suffix == ".jsonl" or (chats and suffix == ".json" and file == root):
                rows = json_lines(file, limit)
            elif suffix == ".parquet" and name is file:
                rows = numbered(str(file), parquet_rows(file, needed, columns), limit)
            elif not chats and root.is_dir() and _is_binary(_head(file)):
                binary.append(file)
            elif not chats:
                rows = [(str(file), {needed[0]: _text_of(file)})]
            for location, row in rows:
                yield location, row, domain
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error

    _say_passed_over(root, binary, linked)


def _say_passed_over(root: Path, binary: Sequence[Path], linked: Sequence[Path]) -> None:
    # A text in UTF-16 has zero bytes, too: its reader would miss it.
    if binary:
        print(
            f"passed over {len(binary):,} binary files (or UTF-16) of {str(root)!r}, the first: "
            f"{str(binary[0])!r}",
            file=sys.stderr,
        )
    for link in linked:
        print(f"passed over {str(link)!r}: a link to a folder; name it to read it", file=sys.stderr)


def _domain_of(name: Path, folders: Sequence[str]) -> str:
    """Return the domain of rows that state none: the first folder, else the file's suffix."""
    return folders[0] if folders else name.suffix.lower()[1:] or "text"


def files_below(
    root: Path, skip: tuple[str, ...] = (), linked: list[Path] | None = None
) -> Iterator[Path]:
    """Yield files below `root` by name, but no hidden ones, caches and folders of `skip`.

    Args:
        linked: a list that gets the links to folders. They may lead in circles: none is entered.
    """

    def fail(error: OSError) -> None:
        if error.filename != str(root) or root.exists():
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    try:
        for folder, folders, files in os.walk(root, onerror=fail):
            # `os.walk` enters the folders that remain in this list, in its order.
            folders[:] = sorted(
                f for f in folders if not f.startswith(".") and f != "__pycache__" and f not in skip
            )
            if linked is not None:
                paths = (Path(folder, name) for name in folders)
                linked.extend(path for path in paths if path.is_symlink())
            yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))
    except RecursionError:  # of `os.walk` before Python 3.12
        raise ValueError(f"path={str(root)!r} has too many folders within each other") from None


def _head(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read(8192)


def _is_binary(head: bytes) -> bool:
    """Say whether a file is no text, by its first bytes: git's rule, and two formats."""
    return b"\0" in head or head.startswith(_BINARY)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file to read its bytes, unpacked. Raises: ValueError for a damaged .gz."""
    with open_file(path) as file:
        try:
            yield gzip.GzipFile(fileobj=file) if path.suffix.lower() == PACKED else file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}") from error


def _read(path: Path, limit: int) -> bytes:
    """Read a whole file, of at most `limit` bytes: a small .gz may hold far more."""
    with _opened(path) as file:
        found = file.read(limit + 1)
    if len(found) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes")
    return found


def _text_of(path: Path) -> str:
    """Read a file that is one text. Raises: ValueError when it is too large or no UTF-8."""
    found = _read(path, _MAX_TEXT_BYTES)
    if found.startswith(_BINARY):
        raise ValueError(f"{path} is a PDF or packed by zstd; convert it to text")
    try:
        return found.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: {error}; convert it, as by iconv, or keep it elsewhere"
        ) from error


def json_lines(path: Path, limit: int) -> Iterator[tuple[str, Any]]:
    """Read a JSONL file; empty lines are passed over.

    Args: limit: bytes of a line, at most; a longer one is not read to its end.
    Returns: pairs of a value and where it is, for errors: (`FILE, line N`, value).
    Raises: ValueError for a line that is not UTF-8 or not JSON.
    """
    with _opened(path) as file:
        # One byte more than allowed is enough to see that a line is too long.
        for number, line in enumerate(iter(lambda: file.readline(limit + 1), b""), 1):
            if len(line) > limit:
                raise ValueError(f"{path}, line {number}, is longer than {limit:,} bytes")
            try:
                if line.strip():
                    yield f"{path}, line {number}", parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error


def _values_of(path: Path) -> Iterator[Any]:
    """Yield the values of a JSON list; the whole file is in memory."""
    yield from parse_json(_read(path, _MAX_LIST_BYTES))


def parquet_rows(
    path: Path, needed: Sequence[str], columns: Collection[str] | None
) -> Iterator[dict[str, Any]]:
    """Read a Parquet file row by row.

    Args: needed: columns of which one must be there; columns: what to read. None means all.
    Raises: ValueError without the columns or pyarrow; errors of many kinds for a file that is
        damaged or not Parquet.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("it needs pyarrow: pip install pyarrow") from error
    with pyarrow.parquet.ParquetFile(path) as file:
        names = set(file.schema_arrow.names)
        if not names & set(needed):
            raise ValueError(f"there is no column {needed[0]!r} among {sorted(names)}")

        # A damaged file may end early and in silence: its own count of rows tells.
        num_rows = 0
        read = None if columns is None else sorted(names & {*columns})
        for batch in file.iter_batches(_PARQUET_ROWS, columns=read):
            num_rows += batch.num_rows
            for i in range(batch.num_rows):  # one by one: each may hold megabytes
                yield from batch.slice(i, 1).to_pylist()
        if num_rows != file.metadata.num_rows:
            raise ValueError(f"the file says that it has {file.metadata.num_rows:,} rows")
