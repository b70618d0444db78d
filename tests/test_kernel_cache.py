"""The compiled CPU kernels: kept in a private folder, and loaded only if they are whole and this user's."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from runs import HERE

from dsv3_jax.kernels.cpu import library, private_cache

COMPILER = """#!/bin/sh
echo "$@" >> "$0.log"
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def compiler(tmp_path) -> list[str]:
    """A compiler that writes a file of one line, called by two words, and keeps a log of its calls."""
    path = tmp_path / "compiler"
    path.write_text(COMPILER)
    path.chmod(0o700)
    return ["sh", str(path)]


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """The cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return private_cache.cache_folder()


def calls(compiler: list[str]) -> int:
    """How often all was compiled: each source, then the library."""
    outputs = Counter(Path(line.split()[-1]).name for line in Path(compiler[1] + ".log").read_text().splitlines())
    objects = [outputs.pop(source.stem + ".o") for source in library.SOURCES]
    (of_library,) = outputs.values()
    assert set(objects) == {of_library}
    return of_library


def compiled(compiler, folder) -> Path:
    return library._compiled(compiler, folder, "for this test")


def test_what_is_compiled_is_kept_in_a_private_folder(compiler, folder, capfd):
    path = compiled(compiler, folder)
    assert path.read_text() == "library\n"
    assert {file.name for file in folder.iterdir()} == {path.name, path.name + ".json", "build.lock"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o600
    said = capfd.readouterr().err
    assert said.startswith(f"compiling the CPU kernels with sh {compiler[1]} (for this test)") and "compiled in" in said
    assert compiled(compiler, folder) == path and calls(compiler) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", [
    lambda path: path.write_text("lib"),
    lambda path: path.write_bytes(bytes(8)),
    lambda path: path.write_text(""),
    lambda path: path.unlink(),
    lambda path: path.with_name(path.name + ".json").unlink(),
    lambda path: path.with_name(path.name + ".json").write_text('{"sha'),
    lambda path: path.with_name(path.name + ".json").write_text("[]"),
    lambda path: path.chmod(0o666),
    lambda path: (path.rename(path.with_name("moved")), path.symlink_to(path.with_name("moved"))),
])  # fmt: skip
def test_what_is_not_whole_or_not_ours_is_compiled_again(compiler, folder, damage):
    damage(compiled(compiler, folder))
    path = compiled(compiler, folder)
    assert calls(compiler) == 2
    assert path.read_text() == "library\n" and private_cache.find_whole(folder, path.name) == path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_another_users_files_are_not_loaded(compiler, folder):
    path = compiled(compiler, folder)
    os.chown(path, 12345, 12345)
    assert private_cache.find_whole(folder, path.name) is None
    os.chown(folder, 12345, 12345)
    with pytest.raises(private_cache.NotPrivate, match="belongs to another user"):
        private_cache.cache_folder()


def test_a_folder_that_others_can_write_to_is_refused(folder):
    folder.chmod(0o777)
    with pytest.raises(private_cache.NotPrivate, match="can be written by others"):
        private_cache.cache_folder()
    folder.chmod(0o755)
    assert private_cache.cache_folder() == folder and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_another_processor_or_compiler_has_another_library(compiler, folder, monkeypatch):
    path = compiled(compiler, folder)
    assert compiled([*compiler, "-g"], folder) != path
    monkeypatch.setattr(library, "_processor", lambda: "another")
    assert compiled(compiler, folder) != path


def test_folders_of_killed_builds_are_deleted(compiler, folder):
    (folder / "build-dead").mkdir()
    compiled(compiler, folder)
    assert not (folder / "build-dead").exists()


@pytest.mark.parametrize("home", ["a file", "no user"])
def test_without_a_cache_the_library_is_compiled_for_the_process(compiler, monkeypatch, tmp_path, capfd, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "below"))
    if home == "no user":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    loaded, process = [], ctypes.CDLL(None)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded.append(Path(path).read_text()) or process)
    assert library._load(compiler) is process and loaded == ["library\n"]
    assert "for this process alone, because there is no cache folder: " in capfd.readouterr().err
    assert not list(Path(tmp_path).glob("*/kernels*"))


def test_a_library_without_the_symbols_is_said(compiler, folder, monkeypatch):
    monkeypatch.setenv("CXX", " ".join(compiler))
    process = ctypes.CDLL(None)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: process)
    assert "undefined symbol: Dsv3" in library.why_not.__wrapped__()
    monkeypatch.setenv("CXX", "g++ 'unclosed")
    assert library.why_not.__wrapped__() == "the kernels cannot be compiled or loaded: No closing quotation"


@pytest.mark.long
def test_four_first_runs_at_once_compile_once(tmp_path):
    if not any(map(shutil.which, library.COMPILERS)):
        pytest.skip("there is no C++ compiler")
    program = "from dsv3_jax.kernels.cpu import library; assert not library.why_not(), library.why_not()"
    compiler = tmp_path / "c++"  # it does not optimise, which takes half of the time
    compiler.write_text(f'#!/bin/sh\nexec {next(filter(shutil.which, library.COMPILERS))} "$@" -O0\n')
    compiler.chmod(0o700)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE)}
    environment["CXX"] = str(compiler)
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    assert "".join(said).count("compiling the CPU kernels") == 1
