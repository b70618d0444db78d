"""The compiled CPU kernels: kept in a private folder."""

import ctypes
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from dsv3_jax.kernels.cpu import library

COMPILER = """#!/bin/sh
sleep 0.02
echo "$@" >> "$0.log"
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def compiler(monkeypatch, tmp_path) -> list[str]:
    """A command that writes a one-line file, which is not loaded, and keeps a log."""
    script = tmp_path / "compiler"
    script.write_text(COMPILER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ctypes, "CDLL", Mock(return_value=ctypes.CDLL(None)))
    return ["sh", str(script)]


def load(compiler: list[str]) -> Path:
    library.load(compiler)
    return Path(ctypes.CDLL.call_args.args[0])


def compiled(compiler: list[str]) -> float:
    """How often all was compiled: each source, and the library."""
    return Path(f"{compiler[1]}.log").read_text().count("\n") / (len(library.SOURCES) + 1)


def test_what_is_compiled_is_kept_in_a_private_folder(compiler, monkeypatch, capfd):
    path = load(compiler)
    assert path.read_text() == "library\n"
    assert {file.name for file in path.parent.iterdir()} == {path.name, "build.lock"}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    said = capfd.readouterr().err
    assert said.startswith(f"compiling the CPU kernels with sh {compiler[1]}, once")
    assert load(compiler) == path and compiled(compiler) == 1
    assert capfd.readouterr().err == ""
    assert load([*compiler, "-g"]) != path
    monkeypatch.setattr(library, "_processor", lambda: "another")
    assert load(compiler) != path


def test_of_several_first_runs_at_once_one_compiles(compiler):
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: load(compiler), range(4)))) == 1
    assert compiled(compiler) == 1


def test_a_folder_that_is_not_private_is_refused(compiler, monkeypatch):
    load(compiler).parent.chmod(0o777)
    with pytest.raises(OSError, match="is not private; set XDG_CACHE_HOME"):
        load(compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")  # would be another one in each current folder
    with pytest.raises(OSError, match="folder=caches/dsv3_jax is relative"):
        load(compiler)


def test_why_there_are_no_kernels(monkeypatch, tmp_path):
    why_not = library.why_not.__wrapped__
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert why_not() == "false does not compile the kernels: exit code 1"
    assert [path.name for path in tmp_path.glob("*/*")] == ["build.lock"]  # nothing half-written
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not().startswith("there is no C++ compiler (c++, g++, clang++): install one, as by ")
