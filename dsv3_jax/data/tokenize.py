"""Documents to shards of token ids: in several processes, in memory that does not depend on the corpus, resumable.

One process reads documents and deals them out in groups of some megabytes. A group becomes a shard: a file of training
records and one of held-out records, see `shards`. Each worker shuffles its group's documents, sorts them by domain and
joins them to records. When both files of a shard are complete, a mark beside them has a hash of the text and the
settings. The same command passes over such shards.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dsv3_jax.data.corpus import read_documents
from dsv3_jax.data.packing import Piece, Record, fill
from dsv3_jax.data.shards import MANIFEST, SIDES, VERSION, Manifest, file_hash, is_count, is_shard, read_manifest
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.tokenizer import load as load_tokenizer
from dsv3_jax.files import PART, read_json, write_atomic
from dsv3_jax.lock import acquire

SETTINGS, LOCK = "settings.json", "tokenize.lock"
_SAY_EVERY = 5.0  # seconds


class Item(NamedTuple):
    """A document or chat example that a worker encodes."""

    content: Any  # str, or the record of a chat
    domain: int
    document: int
    location: str  # for errors


@dataclass(frozen=True)
class Encoder:
    """Turns documents into ids.

    Attributes:
        encode: from (content, location for errors) to ids and the loss mask. No mask means that all ids are targets.
        whole: no document is cut. Else it may continue in the next record.
    """

    tokenizer: Tokenizer
    encode: Callable[[Any, str], tuple[np.ndarray, np.ndarray | None]]
    whole: bool = False


def text_encoder(spec: str = "bytes") -> Encoder:
    """Return the encoder of text and the end of its document, by a tokenizer that `tokenizer.load` knows.

    Example:
        >>> text_encoder().encode("hi", "here")[0].tolist()
        [104, 105, 256]
    """
    tokenizer = load_tokenizer(spec)
    end = np.array([tokenizer.eos_id], np.int32)
    return Encoder(tokenizer, lambda text, where: (np.concatenate([tokenizer.encode_array(text), end]), None))


@dataclass(frozen=True)
class Tokenize:
    """A job: what to read, where to write, and how.

    Attributes:
        row_tokens: the most tokens of a record; the sequence length of training must divide it.
        val_fraction: share of documents that are held out, chosen by their hash.
        format: text, or chat for examples that must stay whole.
        shard_bytes: UTF-8 bytes of text of a shard.
        workers: number of processes that encode. 1 means this one.
        chat_template: the source of the template that chats are encoded with.
    """

    paths: tuple[str, ...]
    out: Path
    row_tokens: int = 4096
    val_fraction: float = 0.01
    format: str = "text"
    text_column: str = "text"
    shard_bytes: int = 64_000_000
    workers: int = 1
    chat_template: str | None = None

    def __post_init__(self):
        for name, least in (("row_tokens", 2), ("shard_bytes", 1), ("workers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} is outside (0, 1)")


class Done(NamedTuple):
    """Totals so far."""

    shards: int
    documents: int
    tokens: int
    seconds: float


Read = Callable[[tuple[str, ...], str], Iterable[tuple[Any, str, str]]]


def texts(paths: tuple[str, ...], text_column: str) -> Iterator[tuple[Any, str, str]]:
    """Yield (text, domain, location) of the documents of some paths."""
    for i, (text, domain) in enumerate(read_documents(paths, text_column)):
        yield text, domain, f"document {i}"


def tokenize(
    job: Tokenize,
    make_encoder: Callable[[], Encoder],
    say: Callable[[Done], None] = lambda done: None,
    read: Read = texts,
) -> Manifest:
    """Write the shards of a job that are not there yet, and the manifest.

    Args:
        make_encoder: a function that each worker calls once; with several workers it is a module's own function, or a
            `functools.partial` of one.
        say: called every few seconds, and at the end.
        read: yields (content, domain, location) from the job's paths and text column; `texts`, or `examples.contents`.
    Raises: ValueError as `corpus.read_documents`; for a folder with shards of other settings, or that another process
        writes; for documents of which none is held out, or all are.
    """
    words = make_encoder().tokenizer
    settings = asdict(job) | {"tokenizer": words.fingerprint, "version": VERSION, "paths": list(job.paths)}
    del settings["out"], settings["workers"]
    job.out.mkdir(parents=True, exist_ok=True)
    with acquire(job.out, LOCK) as lock:
        _claim(job.out, settings)
        domains: dict[str, int] = {}
        began = said = time.monotonic()
        shards: list[dict[str, Any]] = []
        for facts in _each(job, json.dumps(settings, sort_keys=True), make_encoder, _groups(job, read, domains)):
            shards.append(facts)
            lock.check()
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                say(_done(shards, said - began))
        total = _done(shards, time.monotonic() - began)
        files = {name: facts for shard in shards for name, facts in shard["files"].items()}
        for side, what in zip(SIDES, ("leaves no document for training", "holds no document out"), strict=True):
            if not any(facts["side"] == side for facts in files.values()):
                raise ValueError(f"val_fraction={job.val_fraction} {what}; there are {total.documents} documents")
        values = {name: settings[name] for name in ("version", "format", "row_tokens", "val_fraction", "tokenizer")} | {
            "vocab_size": words.vocab_size, "domains": list(domains), "documents": total.documents,
            "tokens": total.tokens, "left_out": sum(shard["left_out"] for shard in shards), "files": files,
        }  # fmt: skip
        write_atomic(job.out / MANIFEST, json.dumps(values, indent=1))
    say(total)
    return read_manifest(job.out)


def _done(shards: list[dict[str, Any]], seconds: float) -> Done:
    files = [facts for shard in shards for facts in shard["files"].values()]
    return Done(len(shards), sum(f["documents"] for f in files), sum(f["tokens"] for f in files), seconds)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new folder, or compare with those that are there.

    Raises: ValueError when they differ, or the folder holds something else.
    """
    file = out / SETTINGS
    before: Any = read_json(file) if file.is_file() else settings
    if before is settings and any(path.name != LOCK for path in out.iterdir()):
        raise ValueError(f"out={str(out)!r} holds other files; choose an empty folder")
    before = before if isinstance(before, dict) else {}
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{name}={value!r} differs from {name}={before.get(name)!r} of the shards in out={str(out)!r}; "
                "choose another folder"
            )
    write_atomic(file, json.dumps(settings, indent=1))


def _groups(job: Tokenize, read: Read, domains: dict[str, int]) -> Iterator[list[Item]]:
    """Yield the documents of each shard, and number the domains by first appearance."""
    group: list[Item] = []
    size = 0
    for number, (content, domain, location) in enumerate(read(job.paths, job.text_column)):
        group.append(Item(content, domains.setdefault(domain, len(domains)), number, location))
        size += len(_bytes_of(content))
        if size >= job.shard_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _bytes_of(content: Any) -> bytes:
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return text.encode("utf-8", "surrogatepass")


def _each(
    job: Tokenize, settings: str, make_encoder: Callable[[], Encoder], groups: Iterable[list[Item]]
) -> Iterator[dict[str, Any]]:
    """Make each group a shard, here or in processes, with at most one group waiting."""
    if job.workers == 1:
        encoder = make_encoder()
        yield from (_shard(job, settings, encoder, number, group) for number, group in enumerate(groups))
        return
    begin = (job, settings, make_encoder, os.getpid())
    with ProcessPoolExecutor(job.workers, multiprocessing.get_context("spawn"), _begin, begin) as pool:
        waiting: deque[Future] = deque()
        try:
            for number, group in enumerate(groups):
                waiting.append(pool.submit(_in_worker, number, group))
                if len(waiting) > job.workers:
                    yield waiting.popleft().result()
            yield from (future.result() for future in waiting)
        except BrokenProcessPool as error:
            raise ValueError(
                f"workers={job.workers}: one was ended, maybe for lack of memory; use fewer, or a smaller --shard-mb"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_WRITE: list[Callable[[int, list[Item]], dict[str, Any]]] = []  # of a worker's process


def _begin(job: Tokenize, settings: str, make_encoder: Callable[[], Encoder], parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _WRITE[:] = [partial(_shard, job, settings, make_encoder())]


def _end_with(parent: int) -> None:
    """End this process when its parent ends: a killed parent cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _in_worker(number: int, group: list[Item]) -> dict[str, Any]:
    return _WRITE[0](number, group)


def _shard(job: Tokenize, settings: str, encoder: Encoder, number: int, group: list[Item]) -> dict[str, Any]:
    """Write one shard unless it is complete, and return its facts."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    items: dict[str, list[Item]] = {side: [] for side in SIDES}
    for item in group:
        mark = hashlib.blake2b(_bytes_of(item.content), digest_size=8).digest()
        digest.update(mark + repr(item[1:3]).encode())
        items["val" if int.from_bytes(mark) < int(job.val_fraction * 2**64) else "train"].append(item)
    done = job.out / f"shard-{number:05d}.json"
    before = _complete(done, digest.hexdigest())
    if before is not None:
        return before
    done.unlink(missing_ok=True)
    facts: dict[str, Any] = {"input": digest.hexdigest(), "files": {}, "left_out": 0}
    for side, own in items.items():
        order = np.random.default_rng(number).permutation(len(own))
        own = sorted((own[i] for i in order), key=lambda item: item.domain)
        name = f"{side}-{number:05d}.array_record"
        written, left_out = _write(job.out / name, own, encoder, job.row_tokens)
        facts["left_out"] += left_out
        if written["records"]:
            facts["files"][name] = {"side": side} | written
    write_atomic(done, json.dumps(facts))
    return facts


def _complete(mark: Path, digest: str) -> dict[str, Any] | None:
    """Return the facts of a shard that is complete; None if it must be written, as after damage."""
    try:
        facts = read_json(mark)
    except (OSError, ValueError):
        return None
    if not (isinstance(facts, dict) and facts.get("input") == digest and is_count(facts.get("left_out"), least=0)):
        return None
    files = facts.get("files")
    whole = isinstance(files, dict) and all(
        is_shard(name, found, 2**31)
        and mark.with_name(name).is_file()
        and mark.with_name(name).stat().st_size == found["bytes"]
        for name, found in files.items()
    )
    return facts if whole else None


def _write(path: Path, items: list[Item], encoder: Encoder, row_tokens: int) -> tuple[dict[str, Any], int]:
    """Write a file of records under a temporary name, then rename it. Without a record there is no file.

    Returns: (its facts, the number of examples that are left out).
    """
    part = path.with_name(f".{path.name}{PART}")
    part.unlink(missing_ok=True)  # it may be a link
    used: list[bool] = []

    def pieces(items: Iterable[Item]) -> Iterator[Piece]:
        for item in items:
            ids, mask = encoder.encode(item.content, item.location)
            used.append(not encoder.whole or (len(ids) <= row_tokens and mask is not None and bool(mask[1:].any())))
            if used[-1]:
                yield Piece(ids, item.domain, item.document, mask)

    domains: dict[int, list[int]] = {}  # domain → records and tokens
    try:
        writer = ArrayRecordWriter(str(part), "group_size:1")
        try:
            for domain, of_domain in itertools.groupby(items, key=lambda item: item.domain):
                for row in fill(pieces(of_domain), row_tokens, encoder.whole):
                    record = Record.of(row)
                    writer.write(record.to_bytes())
                    records, tokens = domains.get(domain, (0, 0))
                    domains[domain] = [records + 1, tokens + len(record.tokens)]
        finally:
            writer.close()
        records, tokens = (sum(counts[i] for counts in domains.values()) for i in (0, 1))
        facts = {"records": records, "tokens": tokens, "documents": sum(used),
                 "domains": [[domain, *counts] for domain, counts in domains.items()]}  # fmt: skip
        if domains:
            facts |= {"bytes": part.stat().st_size, "hash": file_hash(part)}
            part.replace(path)
        return facts, len(used) - sum(used)
    finally:
        part.unlink(missing_ok=True)
