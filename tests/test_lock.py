"""A run folder has one writer: a second one is refused, a dead one's lock is taken over, a moved folder is noticed."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

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
        ({"host": "elsewhere"}, True),  # it may live
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
        with acquire(moved):
            pass


def test_a_link_of_that_name_is_refused(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), acquire(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
