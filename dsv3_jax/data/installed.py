"""The text that a Python installation contains: the default corpus, without a download."""

import contextlib
import importlib.util
import itertools
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsv3_jax.data.text_files import files_below
from dsv3_jax.host.files import read_text

# of a domain; below it other packages' files are added: Debian moves headers and tests away
_MIN_INSTALLED_FILES = 100

_MAX_INSTALLED_BYTES = 2**18  # larger installed files are left out: most of them are tables


def installed_texts() -> Iterator[tuple[str, str]]:
    """Yield (text, domain); domains alternate, so that `max_documents` keeps some of each."""
    # A distribution may leave out tests and headers: installed packages have some, too.
    tests = _python_files(tests=True)
    if len(tests) < _MIN_INSTALLED_FILES:
        tests += [
            path
            for path in _package_files("numpy", "scipy")
            if path.suffix == ".py" and "tests" in path.parts
        ]

    headers = [
        path for path in files_below(Path(sysconfig.get_path("include"))) if path.suffix == ".h"
    ]
    if len(headers) < _MIN_INSTALLED_FILES:
        headers += [
            path for path in _package_files("numpy", "jaxlib") if path.suffix in (".h", ".hpp")
        ]

    # One of each domain in turn, until the longest list ends.
    domains = {"code": _python_files(tests=False), "tests": tests, "C": headers}
    found = (_installed_files(paths, domain) for domain, paths in domains.items())
    for one_of_each in itertools.zip_longest(*found, _language_reference()):
        yield from (text for text in one_of_each if text is not None)


def _python_files(tests: bool) -> list[Path]:
    """The standard library's sources, or its tests."""
    tables = {"encodings", "pydoc_data", "entities.py"}  # of characters, and a copy of a domain
    found = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in files_below(root, skip=("site-packages", "dist-packages")):
        names = set(path.relative_to(root).parts)
        if (
            path.suffix == ".py"
            and bool(names & {"test", "tests", "idle_test"}) == tests
            and not names & tables
        ):
            found.append(path)
    # settings of the build, by the platform's name
    return [path for path in found if not path.name.startswith("_sysconfigdata")]


def _language_reference() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some slim builds leave it out
        return
    for name in sorted(topics):
        yield topics[name], "English"


def _package_files(*names: str) -> Iterator[Path]:
    """Yield the files of installed packages without importing them."""
    for spec in map(importlib.util.find_spec, names):
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield from files_below(Path(folder))


def _installed_files(paths: Iterable[Path], domain: str) -> Iterator[tuple[str, str]]:
    """Yield the UTF-8 files that are neither large nor empty; tests of codecs have broken ones."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            text = read_text(path, _MAX_INSTALLED_BYTES)
            if text.strip():
                yield text, domain
