"""The manifest of a folder of shards: its files, what is in them, and a seal on all of it."""

import contextlib
import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.host.files import read_json

MANIFEST = "manifest.json"

# Of shards, by what they hold. Chats of version 2 were split by their records, ids included: those
# that were held out may be trained on, too.
VERSIONS = {"text": 2, "chat": 3}

SIDES = ("train", "val")


class Part(NamedTuple):
    """Records of one domain, one after the other in a file."""

    file: str
    skip: int
    records: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards.

    Attributes:
        format: text or chat.
        row_tokens: the most tokens of a record (R).
        tokenizer: its fingerprint.
        domains: names that records number.
        documents: number of documents on both sides.
        files: name → side, bytes, records, hash, and domains: lists of domain, records and tokens.
    """

    folder: Path
    format: str
    row_tokens: int
    tokenizer: str
    vocab_size: int
    domains: tuple[str, ...]
    documents: int
    files: dict[str, dict[str, Any]]

    def parts(self, side: str) -> dict[str, list[Part]]:
        """Return where the records of each domain are. Args: side: train or val."""
        found: dict[str, list[Part]] = {name: [] for name in self.domains}
        for name, facts in self.files.items():
            skip = 0  # records of the domains before
            for domain, records, tokens in facts["domains"] if facts["side"] == side else ():
                found[self.domains[domain]].append(Part(name, skip, records, tokens))
                skip += records
        return found


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a folder of shards.

    Raises: ValueError when the folder has none, or it is damaged or of another version.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"shards={str(folder)!r} has no {MANIFEST}; run dsv3 data tokenize PATHS --out "
            f"{shlex.quote(str(folder))}"
        )

    values = read_sealed(file)
    try:
        # The version comes first: in another one the keys may mean something else.
        version = values.pop("version")
        newest = VERSIONS[values["format"]]
        if version != newest:
            raise ValueError(
                f"{file} is not of version {newest}; tokenize again into an empty folder"
            )
        _check(values)
        values["domains"] = tuple(values["domains"])
        return Manifest(folder=Path(folder), **values)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a manifest of shards: {error}; tokenize again into an empty folder"
        ) from None


def _check(values: dict[str, Any]) -> None:
    """Check types and ranges: anybody can seal a manifest. Raises: TypeError that names a value."""
    domains = values.get("domains")
    files = values.get("files")
    files = files if isinstance(files, dict) else {}

    # Key → whether its value is possible; a file's name is a key, too.
    possible = {
        key: _is_count(values.get(key)) for key in ("row_tokens", "vocab_size", "documents")
    }
    possible["tokenizer"] = isinstance(values.get("tokenizer"), str)
    possible["domains"] = isinstance(domains, list) and all(
        isinstance(x, str) and x.isprintable() for x in domains
    )
    possible["files"] = {name.partition("-")[0] for name in files} == {*SIDES}
    possible |= {name: _fits(name, facts, values) for name, facts in files.items()}

    for key, good in possible.items():
        if not good:
            raise TypeError(f"{key}={(values | files).get(key)!r:.200} is not possible")


def _fits(name: str, facts: Any, values: dict[str, Any]) -> bool:
    """Say whether a file's facts are possible, and agree with each other."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        # A name in this folder that says the side; bytes and their hash.
        side = facts["side"]
        if side not in SIDES or not name.startswith(f"{side}-") or Path(name).name != name:
            return False
        if not _is_count(facts["bytes"]) or len(bytes.fromhex(facts["hash"])) != 16:
            return False

        # Records are full, but for the last one of a domain; chats fill none to its end.
        size = values["row_tokens"]
        shortest = size if values["format"] == "text" else 1
        last_domain = len(values["domains"]) - 1
        for domain, records, tokens in facts["domains"]:
            if not _is_count(domain, 0, last_domain) or not _is_count(records):
                return False
            if not _is_count(tokens, (records - 1) * shortest + 1, records * size):
                return False
        return sum(records for _, records, _ in facts["domains"]) == facts["records"] > 0
    return False


def _is_count(value: Any, least: int = 1, most: int = 2**53) -> bool:
    return type(value) is int and least <= value <= most


def sealed(values: dict[str, Any]) -> str:
    """Return the JSON of a manifest or mark, with a hash of its content."""
    return json.dumps(values | {"seal": _seal(values)}, indent=1)


def read_sealed(file: Path) -> dict[str, Any]:
    """Read what `sealed` returned.

    Raises: ValueError that names the file, if any byte of the content has changed.
    """
    values = read_json(file)
    if values.pop("seal", None) != _seal(values):
        raise ValueError(f"{file} is damaged, or of another version; run dsv3 data tokenize again")
    return values


def _seal(values: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()
