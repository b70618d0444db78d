"""One writer for a folder: a lock file under `flock`, with a record of the process that holds it.

The system releases `flock` when the process ends, however it ends. A second writer is refused, and
the sentence names the first. A lock that a dead process left is deleted, and a new one takes its
place. So a holder that finds no lock, or another one, in its folder was moved or replaced, and must
not write any more.

On most shared file systems `flock` reaches all hosts. Without locks, each record is taken for a
living process's.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from dsv3_jax.host.files import NOT_SUPPORTED, check_regular, open_file, parse_json

LOCK_FILE = "run.lock"


class FolderInUse(ValueError):
    """Another process writes to the folder."""


class FolderLock:
    """The right to write to a folder, from `acquire`.

    Without a path it is a reader's, and `check` passes.
    """

    def __init__(self, path: Path | None = None, descriptor: int = -1, sentence: str = ""):
        self._path = path
        self._descriptor = descriptor
        self.sentence = sentence  # to print: whose lock was taken over, or empty

    def check(self) -> None:
        """Check before a write that this process still is the folder's writer.

        Raises: OSError when the folder was moved or deleted, or another process has taken it over.
        """
        if self._path is not None and not _is_open_file(self._path, self._descriptor):
            raise OSError(
                f"out={str(self._path.parent)!r} was moved or deleted, or taken over by another "
                "process, while this process wrote to it; the same command resumes where it is now"
            )


@contextmanager
def acquire(
    folder: str | Path, name: str = LOCK_FILE, out: str | Path | None = None
) -> Iterator[FolderLock]:
    """Become the only writer of an existing folder, for the length of a `with` block.

    Args: name: of the lock file in the folder; out: the file of the folder that it is for. None
        means the folder.
    Raises: FolderInUse, which names the process that holds the lock. ValueError or OSError if
        something else, such as a pipe, has the file's name, or it cannot be locked.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, acquire(folder):
        ...     with acquire(folder):  # doctest: +ELLIPSIS
        ...         pass
        Traceback (most recent call last):
            ...
        dsv3_jax.host.lock.FolderInUse: out='...' is in use by process ... on ..., which started ...
    """
    path = Path(folder) / name
    sentence = ""

    # A locked file counts once it still has the name and no record: another process may have
    # deleted it since it was opened, or died and left its own.
    while True:
        descriptor = _open_locked(path, str(out or path.parent))
        before = _holder_of(descriptor)
        in_place = _is_open_file(path, descriptor)
        if in_place and not before:
            break
        if in_place:  # of a dead process
            path.unlink()
            sentence = f"the lock of {before} is taken over: it has ended"
        os.close(descriptor)

    # Others read in the file whom they wait for.
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(record()).encode(), 0)
        yield FolderLock(path, descriptor, sentence)
    finally:
        if _is_open_file(path, descriptor):
            path.unlink()
        os.close(descriptor)


def holder(folder: str | Path, name: str = LOCK_FILE) -> str:
    """Name the process that writes to a folder; "" if none does.

    Example:
        >>> holder("runs")
        ''
    """
    path = Path(folder) / name
    try:
        file = open_file(path)
    except (OSError, ValueError):
        return ""
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return _holder_of(file.fileno()) or "another process"
    return ""


def _open_locked(path: Path, out: str) -> int:
    """Open the lock file of `out`, made if absent, under `flock` where the file system has it.

    Raises: FolderInUse if another process holds it, or may do so; OSError if it cannot be locked.
    """
    if path.exists():
        check_regular(path)
    # O_NOFOLLOW and O_NONBLOCK: a link is refused, and a pipe that takes the name meanwhile does
    # not block.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)

    # Some network file systems have no locks. There a record alone says that a process writes.
    for last in (False, False, True):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # a writer; or for a moment a reader, in `holder`
            if last:
                other = _holder_of(descriptor) or "another process"
                os.close(descriptor)
                raise FolderInUse(
                    f"out={out!r} is in use by {other}; wait for it, or stop it"
                ) from None
            time.sleep(0.05)
        except OSError as error:
            # a file system without locks, where the record names no writer; or a real fault
            other = _holder_of(descriptor)
            if error.errno in NOT_SUPPORTED and not other:
                break
            os.close(descriptor)
            if error.errno in NOT_SUPPORTED:
                raise FolderInUse(
                    f"{path} is of {other}; there are no locks here: delete it if that ended"
                ) from None
            raise OSError(error.errno, error.strerror, str(path)) from error
    return descriptor


def _is_open_file(path: Path, descriptor: int) -> bool:
    """Whether the file of that name is the open one."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False


def _holder_of(descriptor: int) -> str:
    """As `describe`, of an open lock."""
    try:
        return describe(os.pread(descriptor, 4096, 0))
    except OSError:
        return ""


def record() -> dict[str, Any]:
    """What a lock says of the process that holds it, as JSON.

    Example:
        >>> list(record())
        ['host', 'pid', 'since']
    """
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def describe(data: bytes) -> str:
    """Name the process of a lock's record; "" if it was not written to its end.

    Example:
        >>> describe(b'{"host": "a", "pid": 7, "since": "today"}'), describe(b'{"ho')
        ('process 7 on a, which started at today', '')
    """
    try:
        record = parse_json(data)
        host = str(record["host"])[:80]
        since = str(record["since"])[:40]
        return f"process {int(record['pid'])} on {host}, which started at {since}"
    except (ValueError, KeyError, TypeError):
        return ""
