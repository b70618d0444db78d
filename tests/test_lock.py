"""A run folder has one writer: a second one is refused, a dead one's lock is taken over, a moved folder is noticed."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from runs import HERE

from dsv3_jax.training import lock as locks
from dsv3_jax.training.lock import LOCK_FILE, FolderGone, FolderInUse, acquire

HOLD = """
import sys
from dsv3_jax.training.lock import acquire
with acquire(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(HERE)}, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def record_of(folder) -> dict:
    return json.loads((folder / LOCK_FILE).read_text())


def write_record(folder, **changes) -> None:
    with acquire(folder):
        record = record_of(folder)
    (folder / LOCK_FILE).write_text(json.dumps(record | changes))


def test_the_second_writer_is_refused_and_takes_over_when_the_first_is_dead(holder, tmp_path):
    sentence = rf"^out='{tmp_path}' is in use by process {holder.pid} on {socket.gethostname()}, which started at 2"
    with pytest.raises(FolderInUse, match=sentence), acquire(tmp_path):
        pass
    assert record_of(tmp_path)["pid"] == holder.pid
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with acquire(tmp_path) as lock:
        assert lock.sentence.startswith(f"the lock of process {holder.pid} on ") and "has ended" in lock.sentence
        assert record_of(tmp_path)["pid"] == os.getpid()
        lock.check()


def test_a_lock_that_is_released_leaves_nothing(tmp_path):
    with acquire(tmp_path) as lock:
        assert lock.sentence == ""
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"), acquire(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"pid": 2**22 + 9}, False),  # no such process
        ({"pid": os.getppid(), "started": "another boot:7"}, False),  # the process id is used again
        ({"pid": os.getppid(), "started": locks._start_of(os.getppid())}, True),
        ({"host": "elsewhere", "renewed_every": None}, True),  # it may live
        ({"pid": "7"}, False),
        ({"pid": 10**30}, False),
    ],
)
def test_the_content_decides_where_flock_is_not_supported(tmp_path, monkeypatch, changes, refused):
    write_record(tmp_path, **changes)

    def not_supported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", not_supported)
    if refused:
        with pytest.raises(FolderInUse, match="which started at"), acquire(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()
    else:
        with acquire(tmp_path) as lock:
            assert lock.sentence or not isinstance(changes["pid"], int)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7"])
def test_a_lock_that_was_not_written_to_its_end_is_taken_over(tmp_path, text):
    (tmp_path / LOCK_FILE).write_text(text)
    with acquire(tmp_path):
        assert record_of(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("change", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("moved"))])
def test_a_folder_that_is_moved_or_deleted_is_noticed(tmp_path, change):
    folder = tmp_path / "run"
    folder.mkdir()
    with acquire(folder) as lock:
        lock.check()
        change(folder)
        with pytest.raises(FolderGone, match=rf"^out='{folder}' was moved or deleted"):
            lock.check()
    assert not folder.exists()
    for moved in tmp_path.iterdir():  # the lock there is a dead one's
        with acquire(moved) as taken:
            taken.check()


def test_a_link_of_that_name_is_refused(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), acquire(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.fixture
def quick(monkeypatch):
    """Seconds of milliseconds."""
    for name, seconds in (("RENEW_S", 0.05), ("WATCH_S", 0.4), ("STALE_S", 0.8)):
        monkeypatch.setattr(locks, name, seconds)


def on_host(monkeypatch, name: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)


def test_another_host_takes_over_a_lock_that_nobody_renews(tmp_path, monkeypatch, quick):
    on_host(monkeypatch, "host0")
    write_record(tmp_path)
    on_host(monkeypatch, "host1")
    said, begin = [], time.monotonic()
    with acquire(tmp_path, said.append) as lock:
        assert time.monotonic() - begin >= 0.7  # the lock is new: it may have missed a renewal
        assert (
            lock.sentence.startswith(f"the lock of process {os.getpid()} on host0") and "not renewed" in lock.sentence
        )
        assert record_of(tmp_path)["host"] == "host1" and "is watched for 1 s" in said[0]
    assert list(tmp_path.iterdir()) == []
    write_record(tmp_path, host="host0")
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    begin = time.monotonic()
    with acquire(tmp_path):  # an old one is watched, too: a clock may be wrong
        assert 0.4 <= time.monotonic() - begin < 0.8


def test_another_host_is_refused_while_the_lock_is_renewed(tmp_path, monkeypatch, quick):
    on_host(monkeypatch, "host0")
    with acquire(tmp_path) as lock:
        os.utime(tmp_path / LOCK_FILE, (0, 0))  # whatever the clocks say
        on_host(monkeypatch, "host1")
        with pytest.raises(FolderInUse, match="on host0"), acquire(tmp_path):
            pass
        lock.check()


def test_a_holder_that_was_stopped_notices_that_its_lock_is_taken_over(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(locks, "_renew", lambda *_: None)
    on_host(monkeypatch, "host0")
    with acquire(tmp_path) as lock:
        on_host(monkeypatch, "host1")
        with acquire(tmp_path) as taken:
            with pytest.raises(FolderGone, match="another process has taken it over"):
                lock.check()
            taken.check()


def test_of_two_hosts_that_watch_one_takes_the_lock_over(tmp_path, monkeypatch, quick):
    write_record(tmp_path, host="host0")
    locked, refused = [], []

    def take():
        try:
            with acquire(tmp_path) as lock:
                lock.check()
                locked.append(lock)
                time.sleep(1.5)  # longer than the other one watches
                lock.check()
        except FolderInUse as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(locked), len(refused)) == (1, 1)


def test_a_lock_of_an_older_version_is_not_taken_over(tmp_path, quick):
    write_record(tmp_path, host="host0", renewed_every=None)
    with pytest.raises(FolderInUse, match="if it has ended, delete"), acquire(tmp_path):
        pass
