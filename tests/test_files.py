"""Files and folders appear complete or not at all, whether writing fails or the process is killed."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from runs import HERE

from dsv3_jax.files import PART, atomic_folder, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_holds_its_data(tmp_path):
    """In place of an older one; a link of the temporary file's name is not followed."""
    path = tmp_path / "new" / "folder" / "file"
    for data in ("é\r\n", b"\xff\0"):
        write_atomic(path, data)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    (tmp_path / "other").write_text("old")
    (path.parent / f".file.{os.getpid()}{PART}").symlink_to(tmp_path / "other")
    write_atomic(path, "text")
    assert (path.read_text(), (tmp_path / "other").read_text()) == ("text", "old") and names(path.parent) == ["file"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    write_bytes = Path.write_bytes

    def fill_the_disk(self, data):
        write_bytes(self, data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new content")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_link_stays_a_link_and_a_pipe_is_written_directly(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomic(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomic(tmp_path / "pipe", "text")
        assert os.read(reader, 100) == b"text" and (tmp_path / "pipe").is_fifo()
    finally:
        os.close(reader)


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folder"
    with atomic_folder(path) as part:
        (part / "a").write_text("a")
        assert not path.exists()
    assert names(path) == ["a"] and names(path.parent) == ["folder"]
    (tmp_path / "plain").mkdir()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_only_overwrite_replaces_a_folder_and_a_failure_does_not(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    for overwrite in (False, True):
        with pytest.raises(RuntimeError, match="broken"), atomic_folder(path, overwrite=overwrite):
            raise RuntimeError("broken")
    with pytest.raises(OSError), atomic_folder(path):
        pass
    assert names(path) == ["old"] and names(tmp_path) == ["folder"]
    with atomic_folder(path, overwrite=True) as part:
        (part / "new").write_text("new")
    assert names(path) == ["new"] and names(tmp_path) == ["folder"]


def test_a_killed_process_leaves_the_old_file_and_folder(tmp_path):
    """Killed when half of the file is in its temporary one; a later write is not disturbed by what is left."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    code = """
        import os, signal, sys
        from pathlib import Path
        from dsv3_jax.files import atomic_folder, write_atomic
        write_bytes = Path.write_bytes
        def half(self, data):
            write_bytes(self, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        Path.write_bytes = half
        with atomic_folder(Path(sys.argv[1]) / "folder", overwrite=True) as part:
            write_atomic(Path(sys.argv[1]) / "folder" / "old", "new content")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (path / "old").read_text() == "old"
    left = [name for folder in (tmp_path, path) for name in names(folder) if name not in ("folder", "old")]
    assert len(left) == 2 and all(name.startswith(".") and name.endswith(PART) for name in left)
    write_atomic(path / "old", "new content")
    assert (path / "old").read_text() == "new content"
