"""Files and folders appear complete or not at all: writing fails, a process or the power ends."""

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from runs import fresh_state, make_run

from dsv3_jax.cli import sample
from dsv3_jax.cli.tokenize import Tokenize, tokenize
from dsv3_jax.hf.tensor_files import write_shards
from dsv3_jax.host.files import PART, atomic_folder, sync, write_atomic
from dsv3_jax.report import metrics_files
from dsv3_jax.runs.checkpoint import Checkpoints
from dsv3_jax.runs.checksums import LATE


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_holds_its_data(tmp_path):
    """In place of an older one; a link with the temporary file's name, a dead process's, goes."""
    path = tmp_path / "new" / "folder" / "file"
    for data in ("é\r\n", b"\xff\0"):
        write_atomic(path, data)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    (tmp_path / "other").write_text("old")
    (path.parent / f".file.{os.getpid()}{PART}").symlink_to(tmp_path / "other")
    write_atomic(path, "text")
    assert (path.read_text(), (tmp_path / "other").read_text()) == ("text", "old")
    assert names(path.parent) == ["file"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    write_bytes = Path.write_bytes

    def fill_the_disk(self, data):
        write_bytes(self, data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_atomic(path, "new content")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]
    folder = tmp_path / "folder"
    named = pytest.raises(OSError, match=f"No space left on device: '{folder}'")
    with named, atomic_folder(folder) as part:
        (part / "content").write_bytes(b"new content")
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_named_where_a_file_grows(tmp_path, monkeypatch):
    """A file's own error names no file, when it is flushed or closed; /dev/full is a full disk."""
    path = tmp_path / "rows"
    named = f"No space left on device: '{path}'"
    with pytest.raises(OSError, match=named), sample.resumed(path, {}, 1):
        raise OSError(28, "No space left on device")

    path.unlink()
    rows = metrics_files.JsonLines(path, after=0)
    full = partial(os.open, "/dev/full", os.O_WRONLY)
    monkeypatch.setattr(metrics_files, "never_through_a_link", lambda *_: full())
    with pytest.raises(OSError, match=named):
        rows.write({"step": 1})


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


def test_only_overwrite_replaces_a_folder_and_a_failure_does_not(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(RuntimeError, match="broken"), atomic_folder(path, overwrite=True):
        raise RuntimeError("broken")
    with pytest.raises(OSError), atomic_folder(path):
        pass
    rename = Path.rename

    def fail_at_the_second(self, target):
        if self.suffix == PART:
            raise OSError("broken")
        rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="broken"):
        patch.setattr(Path, "rename", fail_at_the_second)
        with atomic_folder(path, overwrite=True):
            pass
    assert names(path) == ["old"] and names(tmp_path) == ["folder"]
    mode = path.stat().st_mode
    with atomic_folder(path, overwrite=True) as part:
        (part / "new").write_text("new")
    assert names(path) == ["new"] and names(tmp_path) == ["folder"]
    assert path.stat().st_mode == mode


# Loss of power


class Disk:
    """What a loss of power leaves: content as of its last fsync, names as of their folder's."""

    def __init__(self, root: Path, patch):
        self.root, self.content, self.names = root, {}, {}
        looks = {"fsync": self.keep, "rename": self.appear, "replace": self.appear}
        looks |= {"unlink": self.go, "rmtree": self.go}
        for name, look in looks.items():
            module = shutil if name == "rmtree" else os
            patch.setattr(module, name, partial(self.call, look, getattr(module, name)))

    @staticmethod
    def call(look, real, *args, **options):
        if "dir_fd" not in options:  # which `rmtree` gives; it was looked at
            look(*args)
        return real(*args, **options)

    def keep(self, descriptor):
        status = os.fstat(descriptor)
        if os.path.isdir(descriptor):
            entries = os.scandir(descriptor)
            self.names[status.st_ino] = {entry.name: entry.inode() for entry in entries}
        else:
            self.content[status.st_ino] = status.st_mtime_ns

    def appear(self, path, target):
        if not self.passes(target := Path(target)):
            assert not self.lost(Path(path)), "a name is given to what is not synced"

    def go(self, path, *_):
        if os.path.lexists(path) and Path(path).is_relative_to(self.root):
            assert not self.lost(self.root), f"{path} is deleted before that is synced"

    def passes(self, path: Path) -> bool:
        """Whether the path is one that a process uses while it writes, and nobody reads."""
        parts = path.relative_to(self.root).parts
        ends = (PART, ".lock", ".deleted")
        return any(part[0] == "." or part.endswith(ends) or "tmp" in part for part in parts)

    def lost(self, top: Path) -> list[Path]:
        found = []
        for path in [top, *top.rglob("*")]:
            inner, own = path != top, path.stat()
            if inner and ((self.passes(path) and not self.passes(top)) or path.name in LATE[1:]):
                continue
            named = self.names.get(path.parent.stat().st_ino, {}).get(path.name) == own.st_ino
            whole = path.is_dir() or self.content.get(own.st_ino) == own.st_mtime_ns
            found += [] if whole and (named or not inner) else [path]
        return found


def write_file(folder, number):
    write_atomic(folder / "file", str(number))


def write_released(folder, number):
    with atomic_folder(folder / "released", overwrite=True) as part:
        write_shards(part, {"a": ((1,), "float32")}, 1000, [np.full(1, number, "float32")])


def write_checkpoint(folder, number):
    run = make_run("some text", keep=1)
    with Checkpoints(folder, run) as checkpoints:
        for step in (2 * number, 2 * number + 1):
            checkpoints.save(fresh_state(run, step), {})


def write_tokens(folder, number):
    source = folder.with_name("text.jsonl")
    source.write_text("\n".join(f'{{"text": "{number} and {i}"}}' for i in range(20)))
    tokenize(Tokenize((str(source),), folder / "shards", val_fraction=0.3, row_tokens=16))


@pytest.mark.parametrize("write", [write_file, write_released, write_checkpoint, write_tokens])
def test_what_was_written_outlives_a_loss_of_power(tmp_path, monkeypatch, write):
    """Nothing is replaced or deleted before its replacement is synced, and in the end all is."""
    for name in ("checkpoints", "shards"):
        (tmp_path / "disk" / name).mkdir(parents=True)
    disk = Disk(tmp_path / "disk", monkeypatch)
    sync(disk.root)
    for number in range(2):
        write(disk.root, number)
        assert len(list(disk.root.rglob("*"))) > 2 and not disk.lost(disk.root)
