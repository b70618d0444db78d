"""Documents to shards of token ids, in memory that does not depend on the corpus, resumable.

Documents are read in groups of some megabytes, shuffled, sorted by domain and joined to records. A
group becomes a shard: a file of training records and one of held-out records, see `data.shards`.
When both files are complete, a mark beside them has a hash of the text and the settings. The same
call passes over such shards.
"""

import contextlib
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dsv3_jax.config import DataConfig, first_difference
from dsv3_jax.data.corpus import read_documents
from dsv3_jax.data.manifest import (
    MANIFEST,
    SIDES,
    VERSIONS,
    Manifest,
    read_manifest,
    read_sealed,
    sealed,
)
from dsv3_jax.data.packing import Piece, Record, fill
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.host.files import PART, check_writable, file_hash, read_json, sync, write_atomic
from dsv3_jax.host.lock import acquire

SETTINGS, LOCK = "settings.json", "tokenize.lock"
# Without such a side, shards cannot be trained on or measured on.
WITHOUT = {
    "train": "leaves no document for training; lower it, or add documents",
    "val": "holds no document out; raise it, or add documents",
}


@dataclass(frozen=True)
class ShardJob:
    """The documents of some paths, and the shards that are made of them."""

    paths: tuple[str, ...]
    out: Path  # the folder to write
    format: str = "text"  # or "chat"
    row_tokens: int = 4096  # of a record
    val_fraction: float = 0.01  # of the documents, by a hash of the text or of what a chat teaches
    text_column: str = "text"  # key of JSONL and column of Parquet; for chats, of the messages
    shard_mb: float = 64.0  # megabytes of text of a shard, which memory holds

    def check(self) -> None:
        """Check numbers and names. Raises: ValueError (ConfigError)."""
        for name, least in (("row_tokens", 2), ("shard_mb", 1e-6)):
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise ValueError(f"{name}={value} is below {least}, or no finite number")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} is outside (0, 1)")
        DataConfig(paths=self.paths)


class Item(NamedTuple):
    """A document or chat example."""

    content: Any  # str, or the record of a chat, which is later replaced by its `Example`
    domain: int
    document: int
    location: str  # for errors


class Encoder(NamedTuple):
    """Reads items, and turns them into pairs of ids and loss mask. No mask: all ids are targets."""

    tokenizer: Tokenizer
    # the source of the chat template, a line for each of its variables, and `prompts`
    template: str | None
    # of paths and the column: (content, domain, location) of each item
    contents: Callable[[tuple[str, ...], str], Iterable[tuple[Any, str, str]]]
    read: Callable[[Item], Item] | None  # replaces the record of a chat by its `Example`
    encode: Callable[[Sequence[Item]], Iterable[tuple[np.ndarray, np.ndarray | None]]]


def text_encoder(tokenizer: Tokenizer) -> Encoder:
    """Return the encoder of documents, each of which ends in eos; `chat.encoder` has that of chats.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> encoder = text_encoder(ByteTokenizer())
        >>> [ids.tolist() for ids, _ in encoder.encode([Item("hi", 0, 0, "here")])]
        [[104, 105, 256]]
    """
    end = np.int32(tokenizer.eos_id)

    def documents(paths: tuple[str, ...], column: str) -> Iterator[tuple[str, str, str]]:
        for i, (text, domain) in enumerate(read_documents(paths, column)):
            yield text, domain, f"document {i}"

    def texts(items: Sequence[Item]) -> Iterator[tuple[np.ndarray, None]]:
        for ids in tokenizer.encode_arrays([item.content for item in items]):
            yield np.append(ids, end), None

    return Encoder(tokenizer, None, documents, None, texts)


def write_shards(job: ShardJob, encoder: Encoder) -> Manifest:
    """Write the shards of a job that are not there yet, and the manifest.

    Print a line after each shard.

    Raises: ValueError as `corpus.read_documents`; for a folder with shards of other settings, or
        that another process writes; for documents of which none is held out, or all are.
    """
    job.check()
    settings = _settings_of(job, encoder)
    check_writable(job.out, folders=True)
    job.out.mkdir(parents=True, exist_ok=True)

    with acquire(job.out, LOCK) as lock:
        _claim(job.out, settings)
        # One shard after another; memory holds the text of one.
        began = time.monotonic()
        domains: dict[str, int] = {}
        shards: list[dict[str, Any]] = []
        for group in _groups(job, encoder, domains):
            shards.append(_shard(job, encoder, settings, len(shards), group))
            lock.check()
            print(_summary(shards, time.monotonic() - began), flush=True)

        # The manifest names them all, so it comes after them.
        files = {name: facts for shard in shards for name, facts in shard["files"].items()}
        sides = {facts["side"] for facts in files.values()}
        for side in SIDES:
            if side not in sides:
                raise ValueError(f"val_fraction={job.val_fraction} {WITHOUT[side]}")
        same = ("version", "format", "row_tokens", "tokenizer")
        values = {name: settings[name] for name in same}
        values |= {"vocab_size": encoder.tokenizer.vocab_size, "domains": list(domains)}
        values |= {"files": files}
        values |= {"documents": sum(facts["documents"] for facts in files.values())}
        write_atomic(job.out / MANIFEST, sealed(values))
        _delete_others(job.out, files, len(shards))
    return read_manifest(job.out)


def _settings_of(job: ShardJob, encoder: Encoder) -> dict[str, Any]:
    """All that the bytes of a shard depend on, apart from the text."""
    names = ("format", "row_tokens", "val_fraction", "text_column", "shard_mb")
    return {name: getattr(job, name) for name in names} | {
        "version": VERSIONS[job.format],
        "tokenizer": encoder.tokenizer.fingerprint,
        "chat_template": encoder.template,
        "paths": list(job.paths),
    }


def _summary(shards: list[dict[str, Any]], seconds: float) -> str:
    files = [facts for shard in shards for facts in shard["files"].values()]
    documents, tokens = (sum(facts[key] for facts in files) for key in ("documents", "tokens"))
    left_out = sum(shard["left_out"] for shard in shards)
    speed = tokens / max(seconds, 1e-9)
    counts = counted(len(shards), "shard"), counted(documents, "document")
    line = f"{', '.join(counts)}, {tokens:,} tokens, {speed:,.0f} tokens/s"
    if left_out:
        line += f"; left out: {left_out:,} without an assistant's turn or too long"
    return line


def counted(count: int, noun: str) -> str:
    """Write a count with its noun.

    Example:
        >>> counted(1, "shard"), counted(2000, "shard")
        ('1 shard', '2,000 shards')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a folder without shards, or compare with those that are there.

    Raises: ValueError when they differ, or the folder holds something else.
    """
    file = out / SETTINGS
    for path in out.glob(f".*{PART}"):  # of a killed process
        path.unlink()
    is_there = file.is_file()
    if not is_there and any(path.name != LOCK for path in out.iterdir()):
        raise ValueError(f"out={str(out)!r} holds other files; choose an empty folder")

    # Before a shard is complete, nothing depends on them: a wrong path or number can be mended.
    begun = any(out.glob("shard-*.json"))
    if not is_there or (not begun and read_json(file).keys() == settings.keys()):
        write_atomic(file, json.dumps(settings, indent=1))
    if difference := first_difference(read_json(file), settings):
        raise ValueError(
            f"{difference[0]}={difference[2]!r:.200} is not what {file} has; choose another folder"
        )


def _delete_others(out: Path, files: dict[str, Any], shards: int) -> None:
    """Delete shards beyond those that the manifest names."""
    kept = {*files, *(f"shard-{number:05d}.json" for number in range(shards))}
    for path in (*out.glob("shard-*.json"), *out.glob("*.array_record")):
        if path.name not in kept:
            print(f"deleted {str(path)!r}: the text that was here before was longer")
            path.unlink()


def _groups(job: ShardJob, encoder: Encoder, domains: dict[str, int]) -> Iterator[list[Item]]:
    """Yield the documents of each shard, and number the domains by first appearance."""
    group: list[Item] = []
    size = 0
    found = encoder.contents(job.paths, job.text_column)
    for number, (content, domain, location) in enumerate(found):
        group.append(Item(content, domains.setdefault(domain, len(domains)), number, location))
        size += len(_bytes_of(content))
        if size >= job.shard_mb * 1e6:
            yield group
            group = []
            size = 0
    if group:
        yield group


def _bytes_of(content: Any) -> bytes:
    return (content if isinstance(content, str) else json.dumps(content, sort_keys=True)).encode()


def _hash(content: Any) -> bytes:
    return hashlib.blake2b(_bytes_of(content), digest_size=8).digest()


def _shard(
    job: ShardJob, encoder: Encoder, settings: dict[str, Any], number: int, group: list[Item]
) -> dict[str, Any]:
    """Write one shard unless it is complete, and return its facts."""
    # A shard is complete if its mark has the hash of this text and these settings.
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for item in group:
        digest.update(_hash(item.content) + repr(item[1:3]).encode())
    mark = job.out / f"shard-{number:05d}.json"
    before = _facts_of(mark)
    if before is not None and before.get("input") == digest.hexdigest():
        return before

    # The old manifest goes before the first shard that it names: it cannot see that one has other
    # bytes.
    (job.out / MANIFEST).unlink(missing_ok=True)
    mark.unlink(missing_ok=True)
    sync(job.out)

    # Equal documents have one hash, so they are on one side.
    items: dict[str, list[Item]] = {side: [] for side in SIDES}
    for item in map(encoder.read, group) if encoder.read else group:
        by = item.content.side if encoder.read else _hash(item.content)
        held_out = int.from_bytes(by) < int(job.val_fraction * 2**64)
        items["val" if held_out else "train"].append(item)

    # Shuffle, then sort by domain, which keeps the order within each.
    facts: dict[str, Any] = {"input": digest.hexdigest(), "files": {}, "left_out": 0}
    for side, own in items.items():
        order = np.random.default_rng(number).permutation(len(own))
        own = sorted((own[i] for i in order), key=lambda item: item.domain)
        name = f"{side}-{number:05d}.array_record"
        written, left_out = _write(job.out / name, own, job, encoder)
        facts["left_out"] += left_out
        if written:
            facts["files"][name] = {"side": side} | written
    write_atomic(mark, sealed(facts))
    return facts


def _facts_of(mark: Path) -> dict[str, Any] | None:
    """The facts of a shard whose files are as they were written; a bad mark counts as absent."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        facts = read_sealed(mark)
        for name, expected in facts["files"].items():
            file = mark.with_name(name)
            if file.stat().st_size != expected["bytes"] or file_hash(file) != expected["hash"]:
                return None
        return facts
    return None


def _write(
    path: Path, items: list[Item], job: ShardJob, encoder: Encoder
) -> tuple[dict[str, Any], int]:
    """Write a file of records under a temporary name, then rename it.

    Without a record there is no file.

    Returns: (its facts, the number of chat examples that are left out: longer than a record, or
        without a target).
    """
    part = path.with_name(f".{path.name}{PART}")
    part.unlink(missing_ok=True)  # it may be a link
    whole = job.format == "chat"
    used = Counter[bool]()

    def pieces(items: list[Item]) -> Iterator[Piece]:
        for item, (ids, mask) in zip(items, encoder.encode(items), strict=True):
            # A chat example must fit in a record uncut, and have a target after its first token.
            fits = mask is None or (len(ids) <= job.row_tokens and bool(mask[1:].any()))
            used[fits] += 1
            if fits:
                yield Piece(ids, item.domain, item.document, mask)

    domains: list[list[int]] = []  # each with its records and tokens
    try:
        # A record has one domain alone.
        with contextlib.closing(ArrayRecordWriter(str(part), "group_size:1")) as writer:
            for domain, of_domain in itertools.groupby(items, key=lambda item: item.domain):
                lengths = []
                for row in fill(pieces(list(of_domain)), job.row_tokens, whole):
                    record = Record.of(row)
                    writer.write(record.to_bytes())
                    lengths.append(len(record.tokens))
                if lengths:
                    domains.append([domain, len(lengths), sum(lengths)])
        if not domains:
            return {}, used[False]

        # The disk has the bytes before the name says that they are complete.
        records, tokens = (sum(counts[i] for counts in domains) for i in (1, 2))
        facts = {"records": records, "tokens": tokens, "documents": used[True], "domains": domains}
        facts |= {"bytes": part.stat().st_size, "hash": file_hash(part)}
        sync(part)
        part.replace(path)
        return facts, used[False]
    finally:
        part.unlink(missing_ok=True)
