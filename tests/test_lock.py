"""A folder has one writer: others are refused, a dead one's lock is taken, a move is noticed."""

import errno
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

from dsv3_jax.host.lock import LOCK_FILE, FolderInUse, acquire, holder

HOLD = """
import sys
from dsv3_jax.host.lock import acquire
with acquire(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(HERE)}, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def record_of(folder) -> dict:
    return json.loads((folder / LOCK_FILE).read_text())


def test_the_second_writer_is_refused_and_takes_over_when_the_first_is_dead(other, tmp_path):
    other.send_signal(signal.SIGSTOP)
    name = f"process {other.pid} on {socket.gethostname()}, which started at 2"
    for out in (None, tmp_path / "a.jsonl"):
        sentence = f"^out='{out or tmp_path}' is in use by {name}"
        with pytest.raises(FolderInUse, match=sentence), acquire(tmp_path, out=out):
            pass
    assert holder(tmp_path).startswith(name) and record_of(tmp_path)["pid"] == other.pid
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert holder(tmp_path) == ""
    with acquire(tmp_path) as lock:
        assert f"{other.pid} on" in lock.sentence and "has ended" in lock.sentence
        assert record_of(tmp_path)["pid"] == os.getpid()
        lock.check()


@pytest.mark.parametrize("name", ["EOPNOTSUPP", "ENOSYS"])
def test_where_locks_fail_a_living_writer_is_not_robbed(tmp_path, monkeypatch, name):
    """Nobody knows if it lives. Without locks the first is admitted."""

    def fail(*_):
        raise OSError(getattr(errno, name), "it fails")

    monkeypatch.setattr(fcntl, "flock", fail)
    with acquire(tmp_path) as lock:
        sentence = f"is of process {os.getpid()} .* delete it"
        with pytest.raises(FolderInUse, match=sentence), acquire(tmp_path):
            pass
        lock.check()
    assert list(tmp_path.iterdir()) == []


def take_over(folder):
    """As another host does where `flock` does not reach, after the user has deleted the lock."""
    (folder / LOCK_FILE).unlink()
    (folder / LOCK_FILE).write_text("{}")


@pytest.mark.parametrize("change", [shutil.rmtree, take_over])
def test_a_folder_that_is_moved_deleted_or_taken_over_is_noticed(tmp_path, change):
    folder = tmp_path / "run"
    folder.mkdir()
    with acquire(folder) as lock:
        lock.check()
        change(folder)
        with pytest.raises(OSError, match=rf"^out='{folder}' was moved or deleted"):
            lock.check()
    assert [path.name for path in folder.glob("*")] == ([LOCK_FILE] if change is take_over else [])


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.parent / "mine")])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    (tmp_path / "mine").write_text("precious")
    make(tmp_path / LOCK_FILE)
    sentence = f"{LOCK_FILE} is not a file|symbolic links"
    with pytest.raises((OSError, ValueError), match=sentence), acquire(tmp_path):
        pass
    assert holder(tmp_path) == "" and (tmp_path / "mine").read_text() == "precious"
