"""One writer for a run folder: a lock file that names the process, its host and when it started.

The holder keeps the file open under `flock`, which the system releases when the process ends, however it ends. The
file's content decides where `flock` does not reach: between hosts that share the folder. The holder also notices by the
file that its folder was moved.

A holder renews the file's time every RENEW_S seconds. Another host watches the file before it takes the lock over: if
the time changes, the holder lives, and the folder is refused. If it does not change for WATCH_S seconds, and is at
least STALE_S seconds old, the holder is dead. Clocks of the hosts are not compared, and a wrong clock can at most
shorten the wait to WATCH_S. The file is replaced then. A holder that was only stopped finds another file in its place,
and ends before it writes. A lock without renewals, of an older version, is never taken over from another host.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from dsv3_jax.files import PART

LOCK_FILE = "run.lock"
RENEW_S, WATCH_S, STALE_S = 15.0, 60.0, 300.0


class FolderInUse(ValueError):
    """Another process writes to the run folder."""


class FolderGone(OSError):
    """The run folder was moved or deleted, or another process has taken it over, while this process writes to it."""


class RunLock:
    """The right to write to a run folder. Make it with `acquire`.

    Without arguments it is that of a process which does not write: `check` checks nothing.
    """

    def __init__(self, path: Path | None = None, descriptor: int = -1, sentence: str = ""):
        self._path, self._descriptor = path, descriptor
        self.sentence = sentence  # to print: whose lock was taken over, or empty

    def is_in_place(self) -> bool:
        """Whether the lock file is still this process's, at its place."""
        return self._path is None or _is_open_file(self._path, self._descriptor)

    def check(self) -> None:
        """Check that the folder is still at its place, and this process still its writer.

        Raises: FolderGone.
        """
        if not self.is_in_place():
            assert self._path is not None
            raise FolderGone(
                f"out={str(self._path.parent)!r} was moved or deleted, or its {LOCK_FILE} was, while this process "
                "trained in it, or another process has taken it over; the same command resumes where the folder is now"
            )

    def release(self) -> None:
        """Delete the lock file, if it is still this process's, and close it."""
        if self._path is None:
            return
        if _is_open_file(self._path, self._descriptor):
            self._path.unlink()
        os.close(self._descriptor)


@contextlib.contextmanager
def acquire(folder: str | Path, say: Callable[[str], None] = lambda sentence: None) -> Iterator[RunLock]:
    """Become the only writer of an existing folder, for the length of a `with` block.

    The lock of a process that has ended is taken over; `RunLock.sentence` then names it. To find out whether one of
    another host has ended takes WATCH_S to STALE_S seconds.

    Args: say: gets a sentence before such a wait.
    Raises: FolderInUse, which names the process that holds the lock.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, acquire(folder):
        ...     with acquire(folder):  # doctest: +ELLIPSIS
        ...         pass
        Traceback (most recent call last):
            ...
        dsv3_jax.training.lock.FolderInUse: out='...' is in use by process ... on ..., which started at ...
    """
    path = Path(folder) / LOCK_FILE
    sentence = _remove_stale(path, say)
    descriptor, locked = _open_locked(path)
    try:
        before = _read(path)
        if _is_alive(before, locked):
            raise _in_use(path, before)
        if before:
            sentence = f"the lock of {_describe(before)} is taken over: it has ended"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_own_record()).encode(), 0)
        os.fsync(descriptor)
        lock = RunLock(path, descriptor, sentence)
    except BaseException:
        os.close(descriptor)
        raise
    released = threading.Event()
    renewing = threading.Thread(target=_renew, args=(descriptor, released), daemon=True)
    renewing.start()
    try:
        yield lock
    finally:
        released.set()
        renewing.join()
        lock.release()


def _renew(descriptor: int, released: threading.Event) -> None:
    """Set the open file's time to now, again and again."""
    while not released.wait(RENEW_S):
        with contextlib.suppress(OSError):  # the folder is gone, or a disk's fault passes: `RunLock.check` decides
            os.utime(descriptor)


def _remove_stale(path: Path, say: Callable[[str], None]) -> str:
    """Watch a lock of another host, and remove it if its holder does not renew it.

    Returns: a sentence to print, or "" if nothing was removed.
    Raises: FolderInUse if the holder lives, or if it does not renew its lock.
    """
    record, seen = _read(path), _signature(path)
    if not record or record.get("host") == socket.gethostname() or seen is None:
        return ""
    if type(record.get("renewed_every")) not in (int, float):
        raise _in_use(path, record)
    wait = max(WATCH_S, STALE_S - _age(path))
    say(f"{LOCK_FILE} names {_describe(record)}: it is watched for {wait:.0f} s, to see whether that process lives")
    until = time.monotonic() + wait
    while time.monotonic() < until:
        time.sleep(min(1.0, wait / 10))
        now = _signature(path)
        if now is None:  # its holder has released it
            return ""
        if now != seen:
            raise _in_use(path, _read(path))
    # Two hosts may come here at the same time. One gets the file by its rename; the other gets none, or a new lock.
    aside = path.with_name(f".{LOCK_FILE}.{socket.gethostname()}.{os.getpid()}{PART}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        taken = _signature(aside)
        if taken != seen:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()
        if taken != seen:
            raise _in_use(path, _read(path))
    return f"the lock of {_describe(record)} is taken over: it was not renewed for {wait:.0f} s"


def _signature(path: Path) -> tuple[int, ...] | None:
    """Return numbers that change when a lock is renewed or replaced. None means that there is no lock."""
    try:
        with path.open("rb") as file:  # opening it makes a network file system ask its server
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _age(path: Path) -> float:
    """Seconds since a lock was renewed, by the clock of its file system."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{LOCK_FILE}.", suffix=PART) as now:
        return max(os.fstat(now.fileno()).st_mtime - path.stat().st_mtime, 0.0)


def holder(folder: str | Path) -> str:
    """Name the process that writes to a folder; empty if none does. Nothing is locked.

    Example:
        >>> holder("runs")
        ''
    """
    path = Path(folder) / LOCK_FILE
    record = _read(path)
    if type(record.get("renewed_every")) in (int, float) and record.get("host") != socket.gethostname():
        with contextlib.suppress(OSError):
            return _describe(record) if time.time() - path.stat().st_mtime < STALE_S else ""
    return _describe(record) if _is_alive(record, locked=False) else ""


def _open_locked(path: Path) -> tuple[int, bool]:
    """Open the lock file, make it if absent, and lock it.

    Returns: (its descriptor, whether it is locked: some file systems have no flock).
    Raises: FolderInUse if another process has it locked.
    """
    while True:
        # O_NOFOLLOW and O_NONBLOCK: a link or a pipe of that name is refused, and nothing waits.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o644)
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise _in_use(path, _read(path)) from None
            locked = False
        if _is_open_file(path, descriptor):
            return descriptor, locked
        os.close(descriptor)  # its holder deleted it between the two calls


def _is_open_file(path: Path, descriptor: int) -> bool:
    """Whether the file of that name is the open one."""
    try:
        found, held = path.lstat(), os.fstat(descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _own_record() -> dict[str, Any]:
    pid = os.getpid()
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    host, started = socket.gethostname(), _start_of(pid)
    return {"pid": pid, "host": host, "since": now, "started": started, "renewed_every": RENEW_S}


def _read(path: Path) -> dict[str, Any]:
    """Return the values of a lock file; empty if it was not written to the end."""
    try:
        values = json.loads(path.read_bytes()[:4096])
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(values, dict) and type(values.get("pid")) is int and values["pid"] > 0
    return values if whole else {}


def _is_alive(record: dict[str, Any], locked: bool) -> bool:
    """Whether the process of a lock may still run. One on this host has ended if this process could lock the file."""
    if not record:
        return False
    if record.get("host") != socket.gethostname():
        return True
    if locked:
        return False
    try:
        os.kill(record["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return record.get("started") in (None, _start_of(record["pid"]))


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks after a boot; None where the system does not say.

    A process id is used again after a while, but not with the same start.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if fields[0] in "ZX" else f"{boot}:{fields[19]}"
    except (OSError, IndexError):
        return None


def _in_use(path: Path, record: dict[str, Any]) -> FolderInUse:
    other = record.get("host") not in (None, socket.gethostname())
    remedy = f"wait for it, or stop it{f'; if it has ended, delete {path}' if other else ''}"
    return FolderInUse(f"out={str(path.parent)!r} is in use by {_describe(record)}; {remedy}")


def _describe(record: dict[str, Any]) -> str:
    if not record:
        return "another process"
    host, since = str(record.get("host"))[:80], str(record.get("since"))[:40]
    return f"process {record['pid']} on {host}, which started at {since}"
