"""The compiled CPU kernels: kept in a private folder."""

import ctypes
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv3_jax.kernels.cpu import library

COMPILER = """#!/bin/sh
sleep 0.02
echo "$@" >> "$0.log"
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


class Cache:
    """A cache folder, and a compiler of two words that writes a one-line file and keeps a log."""

    def __init__(self, root: Path):
        self.folder, self.loaded, self.script = root / "dsv3_jax", [], root / "compiler"
        self.script.write_text(COMPILER)

    def load(self, *more: str) -> Path:
        library.load(["sh", str(self.script), *more])
        return self.loaded[-1]

    def compiled(self) -> float:
        """How often all was compiled: each source, and the library."""
        return len(Path(f"{self.script}.log").read_text().splitlines()) / (len(library.SOURCES) + 1)


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Cache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache, process = Cache(tmp_path), ctypes.CDLL(None)

    def load(path):
        assert Path(path).read_text() == "library\n"
        cache.loaded.append(Path(path))
        return process

    monkeypatch.setattr(ctypes, "CDLL", load)
    return cache


def test_what_is_compiled_is_kept_in_a_private_folder(cache, monkeypatch, capfd):
    path = cache.load()
    assert {file.name for file in cache.folder.iterdir()} == {path.name, "build.lock"}
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    said = capfd.readouterr().err
    assert said.startswith(f"compiling the CPU kernels with sh {cache.script}, once")
    assert cache.load() == path and cache.compiled() == 1 and capfd.readouterr().err == ""
    assert cache.load("-g") != path
    monkeypatch.setattr(library, "_processor", lambda: "another")
    assert cache.load() != path


def test_of_several_first_runs_at_once_one_compiles(cache):
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: cache.load(), range(4)))) == 1
    assert cache.compiled() == 1


def test_a_folder_that_is_not_private_is_refused(cache, monkeypatch):
    cache.load()
    cache.folder.chmod(0o777)
    with pytest.raises(OSError, match="is not private; set XDG_CACHE_HOME"):
        cache.load()
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")  # would be another one in each current folder
    with pytest.raises(OSError, match="folder=caches/dsv3_jax is relative"):
        cache.load()


def test_why_there_are_no_kernels(monkeypatch, tmp_path):
    why_not = library.why_not.__wrapped__
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert why_not() == "false does not compile the kernels: exit code 1"
    assert [path.name for path in tmp_path.glob("*/*")] == ["build.lock"]  # nothing half-written
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not().startswith("there is no C++ compiler (c++, g++, clang++): install one, as by ")
