"""The one door for files: others' are read with limits, and what is written appears in one step.

Content goes to a temporary name in the same folder, `.NAME.….part`, is synced, and then renamed. A
killed process or a loss of power leaves the old file or folder, or the new one. A temporary one may
remain, and can be deleted.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from dsv3_jax.host.bucket import url_of

PART = ".part"  # end of every temporary name
MAX_JSON = 100_000_000  # bytes of a JSON file; the index of the largest released models has 25 MB
_MAX_DEPTH = 64  # of lists and objects: Python's recursion ends at some hundreds
_MAX_DIGITS = 100  # transformers writes 10^30 for "no limit"
# a disk, a quota or the largest size of a file is used up
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# a file system has no locks, or does not sync folders
NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def check_regular(path: str | os.PathLike, limit: int | None = None) -> None:
    """Check that a path leads to a regular file before it is opened: opening a pipe waits.

    Args: limit: largest size in bytes.
    Raises: ValueError for a folder, pipe, socket or device, and for a larger file; OSError when
        there is none.

    Example:
        >>> check_regular(os.devnull)
        Traceback (most recent call last):
            ...
        ValueError: /dev/null is not a file but a folder, pipe, socket or device
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fspath(path)} is not a file but a folder, pipe, socket or device")
    if limit is not None and status.st_size > limit:
        raise ValueError(
            f"{os.fspath(path)} has {status.st_size:,} bytes, more than the {limit:,} that are "
            "supported"
        )


def open_file(path: str | os.PathLike, limit: int | None = None) -> BufferedReader:
    """Open a regular file to read its bytes. Arguments and errors as `check_regular`."""
    check_regular(path, limit)
    return open(path, "rb", opener=at_once)


def at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def never_through_a_link(path: str, flags: int) -> int:
    """Open a file, and refuse a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def file_hash(path: str | os.PathLike) -> str:
    """Return the BLAKE2b hash of a file's bytes."""
    with open_file(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read_bytes(path: str | os.PathLike, limit: int | None = MAX_JSON) -> bytes:
    """Read a regular file. Arguments and errors as `check_regular`.

    Example:
        >>> b"def read_bytes" in read_bytes(__file__)
        True
    """
    with open_file(path, limit) as file:
        return file.read()


def read_text(path: str | os.PathLike, limit: int | None = MAX_JSON) -> str:
    """Read a regular file of UTF-8 with its line ends unchanged.

    Raises: ValueError that names the file when it is not UTF-8, or as `check_regular`; OSError when
        it cannot be read.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not UTF-8: {error}") from error


def read_json(path: str | os.PathLike, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON file that holds an object, and that another program may have written.

    Raises: ValueError that names the file, as `check_regular` and `parse_json`, or when it holds
        something else; OSError when it cannot be read.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "config.json").write_text('{"hidden_size": 7168}')
        ...     read_json(Path(folder, "config.json"))
        {'hidden_size': 7168}
    """
    data = read_bytes(path, limit)
    try:
        values = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{os.fspath(path)} holds a {type(values).__name__}, not an object")
    return values


def parse_json(data: str | bytes) -> Any:
    """Parse JSON in linear time; refuse values that later code cannot print, store or convert.

    Bytes may begin with a byte order mark, as some editors of Windows write it.

    Raises: ValueError when it is not UTF-8 or not JSON, has a key twice, is nested more than 64
        deep, or holds NaN, half a surrogate pair, an integer of more than 100 digits, or a number
        above float64's range.

    Example:
        >>> parse_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
            ...
        ValueError: key 'a' occurs twice
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    try:
        values = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse,
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} deep") from None

    # Go down one level at a time: a recursion of ours could overflow, as could one of later code.
    level = [[values]]
    for _ in range(_MAX_DEPTH + 1):
        branches = (value.values() if isinstance(value, dict) else value for value in level)
        level = [item for branch in branches for item in branch if isinstance(item, list | dict)]
        if not level:
            break
    else:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")

    # Half a pair is text in Python, and no UTF-8.
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a surrogate pair, which is no character") from None
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {key!r} occurs twice")
    return values


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits):,} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant:.20} is no number of JSON or float64")


def sync(*paths: str | os.PathLike) -> None:
    """Wait until files' content, and the names in folders, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
        finally:
            os.close(descriptor)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Name what was being written in a full disk's error, which names no file by itself.

    Example:
        >>> with naming("runs/out.jsonl"):  # doctest: +ELLIPSIS
        ...     raise OSError(errno.ENOSPC, "No space left on device")
        Traceback (most recent call last):
            ...
        OSError: [Errno 28] No space left on device: 'runs/out.jsonl'
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_atomic(path: str | os.PathLike, data: str | bytes) -> None:
    """Write a file in one step: a reader sees the old content or the new one, never a part.

    A device or pipe such as /dev/stdout cannot be renamed over; it is written directly. A pipe must
    have a reader.

    Args:
        path: the file. Parent folders are created, and a link to a file stays a link.
        data: text is written as UTF-8 with its line ends unchanged.
    Raises: OSError when the file cannot be written; the old one is kept.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomic(Path(folder) / "runs" / "note.txt", "complete")
        ...     print((Path(folder) / "runs" / "note.txt").read_text())
        complete
    """
    path = Path(path).resolve()
    content = data.encode() if isinstance(data, str) else data

    # A device or a pipe.
    if path.exists() and not path.is_file():
        with open(path, "wb", opener=at_once) as file:
            os.set_blocking(file.fileno(), True)
            file.write(content)
        return

    # A file: its content is on the disk before it gets the name, and then the name.
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    part.unlink(missing_ok=True)  # of a killed process, or a link that somebody put there
    try:
        part.touch(exist_ok=False)  # never through a link
        with naming(path):
            part.write_bytes(content)
            sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def check_name(path: str | os.PathLike) -> None:
    """Raise ValueError if a path is not UTF-8: TensorStore and ArrayRecord cannot open it."""
    if re.search("[\ud800-\udfff]", os.fspath(path)):
        raise ValueError(f"path={os.fspath(path)!r} is not UTF-8; choose another name")


def check_writable(*paths: str | os.PathLike | None, folders: bool = False) -> None:
    """Check that files, or `folders`, can be written before the work that makes their content.

    None is passed over.

    Raises: ValueError for a URL, a name that is not UTF-8, or that a folder has; OSError when the
        folder of that name, or the first above it that exists, is read-only or its disk is full.

    Example:
        >>> check_writable(Path(__file__) / "run")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        NotADirectoryError: [Errno 20] Not a directory: '...files.py/run'
    """
    for path in (Path(path) for path in paths if path is not None):
        if url := url_of(path):
            raise ValueError(f"out={url!r}: only `dsv3 train` writes into a bucket; name a folder")
        path = path.absolute()
        check_name(path)
        if path.is_dir() and not folders:
            raise ValueError(f"out={str(path)!r} is a folder; name a file")
        if path.exists() and not path.is_dir() and not path.is_file():
            continue  # a device or a pipe

        # Only a try tells: a disk may be full, or a file system read-only.
        places = path.parents if path.is_file() else (path, *path.parents)
        folder = next(place for place in places if place.exists())
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(1 << 16))
        except OSError as error:  # of the temporary file's name
            raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary folder that becomes `path` when the block ends.

    An exception deletes the temporary folder and leaves `path` as it was.

    Args:
        path: the folder to create. It must be absent or empty unless `overwrite` is set. Parent
            folders are created.
        overwrite: replace an existing folder. It is renamed away first: a process killed between
            the two renames leaves it as `.NAME.….part.old`.
    Raises: OSError when `path` cannot be created, or holds files and `overwrite` is not set.

    Example:
        >>> with tempfile.TemporaryDirectory() as root:
        ...     with atomic_folder(Path(root) / "run") as folder:
        ...         _ = (folder / "a.txt").write_text("complete")
        ...         print((Path(root) / "run").exists())
        ...     print((Path(root) / "run" / "a.txt").read_text())
        False
        complete
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
    old = part.with_name(part.name + ".old")
    try:
        # mkdtemp gives access to the owner only; mkdir follows the umask
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o777 & ~mask)
        with naming(path):
            yield part

        # All content is on the disk before the folder gets its name.
        sync(*part.rglob("*"), part)
        if overwrite and path.exists():
            path.rename(old)
        part.rename(path)
        sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
