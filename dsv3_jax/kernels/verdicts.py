"""Implementations that `check_apart.py` found wrong on a chip: a file in the user's cache folder.

It is of one chip and of the versions of what compiles for it. One of other versions, or damaged,
counts as absent.
"""

import json
import re
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from dsv3_jax.kernels.cpu.library import private_folder

PACKAGES = (
    "dsv3-jax", "jax", "jaxlib", "flax", "libtpu", "tokamax", "jax-cuda12-plugin",
    "jax-cuda13-plugin", "jax-rocm7-plugin",
)  # fmt: skip


def path_of(platform: str, chip: str) -> Path:
    """The file of a chip. Raises: as `private_folder`."""
    name = re.sub(r"[^a-z0-9.]+", "-", f"{platform}-{chip}".lower())
    return private_folder() / f"wrong-{name}.json"


def read(platform: str, chip: str) -> dict[str, str]:
    """Reasons by implementation, as `Implementation.of` names it."""
    with suppress(OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        found = json.loads(path_of(platform, chip).read_text(encoding="utf-8"))
        if found["versions"] == versions():
            return {str(name): str(reason) for name, reason in found["wrong"].items()}
    return {}


def keep(platform: str, chip: str, name: str, wrong: str) -> None:
    """Keep what is wrong with an implementation; "" means nothing. Raises: as `private_folder`."""
    others = {other: reason for other, reason in read(platform, chip).items() if other != name}
    content = {"versions": versions(), "wrong": others | ({name: wrong} if wrong else {})}
    path = path_of(platform, chip)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    part.replace(path)  # in one step: a process that is killed loses no verdict


@cache
def versions() -> dict[str, str]:
    """The versions of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
