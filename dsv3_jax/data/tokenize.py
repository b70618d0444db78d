"""Documents to shards of token ids: in several processes, in memory that does not depend on the corpus, resumable.

One process reads documents and deals them out in groups of some megabytes. A group becomes a shard: a file of training
records and one of held-out records, see `shards`. Each worker shuffles its group's documents, sorts them by domain and
joins them to records. When both files of a shard are complete, a file beside them says so, with a hash of the text and
the settings. The same command passes over such shards.
"""

import hashlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dsv3_jax.data.corpus import read_documents
from dsv3_jax.data.examples import encode, records_of
from dsv3_jax.data.shards import MANIFEST, SIDES, VERSION, Manifest, Record, file_hash, read_manifest
from dsv3_jax.data.text_settings import TextSettings
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.tokenizer import load as load_tokenizer
from dsv3_jax.files import PART, read_json, write_atomic

SETTINGS = "settings.json"
_SAY_EVERY = 5.0  # seconds


class Item(NamedTuple):
    """A document or chat example that a worker encodes."""

    content: Any  # str, or the record of a chat
    domain: int
    document: int
    location: str  # for errors


@runtime_checkable  # tests check signatures when functions are called
class Encoder(Protocol):
    """Turns a document into ids.

    Attributes:
        tokenizer: whose ids they are.
        whole: no document is cut. Else it may continue in the next record.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def whole(self) -> bool: ...

    def __call__(self, content: Any, location: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return ids, and the loss mask. None means that all ids are targets."""
        ...


@dataclass(frozen=True)
class TextEncoder:
    """Encodes a text and the end of its document."""

    tokenizer: Tokenizer
    whole: bool = False

    def __call__(self, content: Any, location: str) -> tuple[np.ndarray, np.ndarray | None]:
        return np.append(self.tokenizer.encode_array(content), np.int32(self.tokenizer.eos_id)), None


def text_encoder(spec: str = "bytes") -> TextEncoder:
    """Return the encoder of text by a tokenizer that `tokenizer.load` knows.

    Example:
        >>> text_encoder()("hi", "here")[0].tolist()
        [104, 105, 256]
    """
    return TextEncoder(load_tokenizer(spec))


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes a chat example as a model reads chats; an assistant's tokens are targets.

    Example:
        >>> from dsv3_jax.data.text_settings import plain_settings
        >>> ids, mask = ChatEncoder(plain_settings())({"prompt": "1+1=", "completion": "2"}, "here")
        >>> ids.tolist(), mask.astype(int).tolist()
        ([49, 43, 49, 61, 50, 256], [0, 0, 0, 0, 1, 1])
    """

    text: TextSettings
    whole: bool = True

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer

    def __call__(self, content: Any, location: str) -> tuple[np.ndarray, np.ndarray | None]:
        ids, mask = encode(content, self.text, location)
        return np.array(ids, np.int32), np.array(mask, bool)


@dataclass(frozen=True)
class Tokenize:
    """A job: what to read, where to write, and how.

    Attributes:
        row_tokens: the most tokens of a record; the sequence length of training must divide it.
        val_fraction: share of documents that are held out, chosen by their hash.
        format: text, or chat for the examples that `examples.encode` reads.
        shard_bytes: UTF-8 bytes of text of a shard.
        workers: number of processes that encode. 1 means this one.
    """

    paths: tuple[str, ...]
    out: Path
    row_tokens: int = 4096
    val_fraction: float = 0.01
    format: str = "text"
    text_column: str = "text"
    shard_bytes: int = 64_000_000
    workers: int = 1
    chat_template: str | None = None  # the source of the template that chats are encoded with

    def __post_init__(self):
        for name in ("row_tokens", "shard_bytes", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        if self.row_tokens < 2:
            raise ValueError(f"row_tokens={self.row_tokens} is below 2")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} is outside (0, 1)")


class Done(NamedTuple):
    """Totals so far."""

    shards: int
    documents: int
    tokens: int
    seconds: float


def tokenize(
    job: Tokenize, make_encoder: Callable[[], Encoder], say: Callable[[Done], None] = lambda done: None
) -> Manifest:
    """Write the shards of a job that are not there yet, and the manifest.

    Args:
        make_encoder: a function that each worker calls once; with several workers it is a module's own function, or a
            `functools.partial` of one.
        say: called every few seconds, and at the end.
    Raises: ValueError as `corpus.read_documents`; for a folder with shards of other settings; for documents of which
        none is held out, or all are.
    """
    encoder = make_encoder()
    settings = asdict(job) | {"tokenizer": encoder.tokenizer.fingerprint, "version": VERSION}
    for name in ("out", "workers"):
        del settings[name]
    settings["paths"] = list(job.paths)
    _claim(job.out, settings)
    domains: dict[str, int] = {}
    began = said = time.monotonic()
    found: dict[int, dict[str, Any]] = {}
    for number, facts in _run(job, encoder, make_encoder, _groups(job, domains), json.dumps(settings, sort_keys=True)):
        found[number] = facts
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            say(_done(found, said - began))
    files = {name: facts for number in sorted(found) for name, facts in found[number]["files"].items()}
    for side, what in zip(SIDES, ("leaves no document for training", "holds no document out"), strict=True):
        if not any(facts["side"] == side for facts in files.values()):
            raise ValueError(
                f"val_fraction={job.val_fraction} {what}; there are {_done(found, 0.0).documents} documents"
            )
    values = {
        "version": VERSION, "format": job.format, "row_tokens": job.row_tokens, "val_fraction": job.val_fraction,
        "tokenizer": encoder.tokenizer.fingerprint, "vocab_size": encoder.tokenizer.vocab_size,
        "domains": list(domains), "documents": sum(f["documents"] for f in files.values()),
        "tokens": sum(f["tokens"] for f in files.values()), "left_out": sum(f["left_out"] for f in found.values()),
        "files": files,
    }  # fmt: skip
    write_atomic(job.out / MANIFEST, json.dumps(values, indent=1))
    say(_done(found, time.monotonic() - began))
    return read_manifest(job.out)


def _done(found: dict[int, dict[str, Any]], seconds: float) -> Done:
    files = [facts for shard in found.values() for facts in shard["files"].values()]
    return Done(len(found), sum(f["documents"] for f in files), sum(f["tokens"] for f in files), seconds)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new folder, or compare with those that are there.

    Raises: ValueError when they differ, or the folder holds something else.
    """
    file = out / SETTINGS
    if file.is_file():
        before = read_json(file)
        for name, value in settings.items():
            if not isinstance(before, dict) or before.get(name) != value:
                old = before.get(name) if isinstance(before, dict) else None
                raise ValueError(f"{name}={value!r} differs from {name}={old!r} of the shards in out={str(out)!r}; "
                                 "choose another folder")  # fmt: skip
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out={str(out)!r} holds other files; choose an empty folder")
    write_atomic(file, json.dumps(settings, indent=1))


def _groups(job: Tokenize, domains: dict[str, int]) -> Iterator[list[Item]]:
    """Yield the documents of each shard, and number the domains by first appearance."""
    group: list[Item] = []
    size = 0
    for number, (content, domain, text, location) in enumerate(_contents(job)):
        group.append(Item(content, domains.setdefault(domain, len(domains)), number, location))
        size += len(text.encode())
        if size >= job.shard_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _contents(job: Tokenize) -> Iterator[tuple[Any, str, str, str]]:
    """Yield (content, domain, text that its size is measured by, location)."""
    if job.format == "chat":
        found = (records_of(path, job.text_column) for path in job.paths)
        for location, record, name in itertools.chain.from_iterable(found):
            text = json.dumps(record, sort_keys=True)
            yield record, record.get("domain") or name, text, location
        return
    for i, (text, domain) in enumerate(read_documents(job.paths, job.text_column)):
        yield text, domain, text, f"document {i}"


def _run(
    job: Tokenize, encoder: Encoder, make_encoder: Callable[[], Encoder], groups: Iterable[list[Item]], settings: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Make each group a shard, here or in processes, with at most one group waiting for each process."""
    write = partial(_shard, job.out, job.row_tokens, job.val_fraction, settings)
    if job.workers == 1:
        for number, group in enumerate(groups):
            yield number, write(encoder, number, group)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(job.workers, context, initializer=_begin, initargs=(make_encoder,)) as pool:
        waiting: dict[Future, int] = {}
        try:
            for number, group in enumerate(groups):
                waiting[pool.submit(_in_worker, write, number, group)] = number
                if len(waiting) > job.workers:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        yield waiting.pop(future), future.result()
            for future in list(waiting):
                yield waiting.pop(future), future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_ENCODER: list[Encoder] = []  # of a worker's process


def _begin(make_encoder: Callable[[], Encoder]) -> None:
    _ENCODER[:] = [make_encoder()]


def _in_worker(write: Callable[..., dict[str, Any]], number: int, group: list[Item]) -> dict[str, Any]:
    return write(_ENCODER[0], number, group)


def _shard(
    out: Path, row_tokens: int, val_fraction: float, settings: str, encoder: Encoder, number: int, group: list[Item]
) -> dict[str, Any]:
    """Write one shard unless it is complete, and return its facts."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    items: dict[str, list[Item]] = {side: [] for side in SIDES}
    for item in group:
        content = item.content if isinstance(item.content, str) else json.dumps(item.content, sort_keys=True)
        mark = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        digest.update(mark + repr(item[1:3]).encode())
        items["val" if int.from_bytes(mark) < int(val_fraction * 2**64) else "train"].append(item)
    done = out / f"shard-{number:05d}.json"
    if done.is_file():
        before = read_json(done)
        if before["input"] == digest.hexdigest() and all(
            (out / name).is_file() and (out / name).stat().st_size == f["bytes"] for name, f in before["files"].items()
        ):
            return before
        done.unlink()
    facts: dict[str, Any] = {"input": digest.hexdigest(), "files": {}, "left_out": 0}
    for side, own in items.items():
        order = np.random.default_rng(number).permutation(len(own))
        own = sorted((own[i] for i in order), key=lambda item: item.domain)
        name = f"{side}-{number:05d}.array_record"
        written = _write(out / name, own, encoder, row_tokens)
        facts["left_out"] += written.pop("left_out")
        if written["records"]:
            facts["files"][name] = {"side": side} | written
    write_atomic(done, json.dumps(facts))
    return facts


def _write(path: Path, items: list[Item], encoder: Encoder, row_tokens: int) -> dict[str, Any]:
    """Write a file of records under a temporary name, then rename it. Without a record there is no file."""
    part = path.with_name(f".{path.name}{PART}")
    by_domain: list[list[int]] = []
    left_out = documents = 0
    try:
        writer = ArrayRecordWriter(str(part), "group_size:1")
        try:
            for domain, of_domain in itertools.groupby(items, key=lambda item: item.domain):
                records = tokens = 0
                rows = _Rows(domain, row_tokens, encoder.whole)
                for item in of_domain:
                    ids, mask = encoder(item.content, item.location)
                    if encoder.whole and (len(ids) > row_tokens or mask is None or not mask[1:].any()):
                        left_out += 1
                        continue
                    documents += 1
                    for record in rows.add(ids, mask, item.document):
                        writer.write(record.to_bytes())
                        records, tokens = records + 1, tokens + len(record.tokens)
                for record in rows.rest():
                    writer.write(record.to_bytes())
                    records, tokens = records + 1, tokens + len(record.tokens)
                if records:
                    by_domain.append([domain, records, tokens])
        finally:
            writer.close()
        facts = {
            "records": sum(records for _, records, _ in by_domain), "tokens": sum(tokens for *_, tokens in by_domain),
            "documents": documents, "domains": by_domain, "left_out": left_out,
        }  # fmt: skip
        if by_domain:
            facts |= {"bytes": part.stat().st_size, "hash": file_hash(part)}
            part.replace(path)
        return facts
    finally:
        part.unlink(missing_ok=True)


class _Rows:
    """Joins documents of one domain to records."""

    def __init__(self, domain: int, size: int, whole: bool):
        self._domain, self._size, self._whole = domain, size, whole
        self._pieces: list[tuple[np.ndarray, np.ndarray | None, int]] = []
        self._filled = 0

    def add(self, ids: np.ndarray, mask: np.ndarray | None, document: int) -> Iterator[Record]:
        """Yield the records that a document fills."""
        if self._whole and self._filled + len(ids) > self._size:
            yield from self.rest()
        first = 0
        while first < len(ids):
            stop = min(len(ids), first + self._size - self._filled)
            self._pieces.append((ids[first:stop], None if mask is None else mask[first:stop], document))
            self._filled += stop - first
            first = stop
            if self._filled == self._size:
                yield from self.rest()

    def rest(self) -> Iterator[Record]:
        """Yield the record that is being filled, if it holds anything."""
        if not self._pieces:
            return
        lengths = [len(ids) for ids, _, _ in self._pieces]
        starts = np.array([0, *itertools.accumulate(lengths[:-1])], np.int32)
        masks = [mask for _, mask, _ in self._pieces if mask is not None]
        yield Record(
            self._domain,
            starts,
            np.array([document for _, _, document in self._pieces], np.int32),
            np.concatenate([ids for ids, _, _ in self._pieces]).astype(np.int32),
            np.concatenate(masks) if masks else None,
        )
        self._pieces, self._filled = [], 0
