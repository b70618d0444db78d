"""Documents to shards of token ids, in memory that does not depend on the corpus, resumable.

Documents are read in groups of some megabytes, shuffled, sorted by domain and joined to records. A
group becomes a shard: a file of training records and one of held-out records, see `data.shards`.
When both files are complete, a mark beside them has a hash of the text and the settings. The same
command passes over such shards.
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
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
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
from dsv3_jax.data.tokenizer import load as load_tokenizer
from dsv3_jax.host.files import PART, check_writable, file_hash, read_json, sync, write_atomic
from dsv3_jax.host.lock import acquire

SETTINGS, LOCK = "settings.json", "tokenize.lock"


@dataclass(frozen=True)
class Tokenize:
    """Write shards of token ids for --data.format shards; the same command resumes after a stop."""

    paths: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PATHS", help_behavior_hint="(required)"),
    ]
    """files or folders: text, source trees, JSONL, Parquet; or hf:NAME[:CONFIG][@SPLIT], a dataset
    of Hugging Face"""
    out: Path
    """the folder to write"""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json"""
    format: Literal["text", "chat"] = "text"
    """text, all of whose tokens are targets; or chat examples, whose assistant's tokens are"""
    start: str | None = None
    """for chat: the run or released model whose tokenizer and template encode the examples"""
    chat_template: str | None = None
    """for chat: the file of a Jinja template, or plain; None means the template of --start"""
    template: tuple[str, ...] = ()
    """for chat: variables of the template, as in --template.thinking true"""
    prompts: Literal["turn", "text"] = "turn"
    """for chat: what the prompt of a task is if it is a text: a user's turn, or text that the model
    continues"""
    row_tokens: int = 4096
    """tokens of a record; the sequence length of training must divide it"""
    val_fraction: float = 0.01
    """share of documents that are held out for validation, chosen by a hash of the text or of what
    a chat teaches"""
    text_column: str = "text"
    """key of JSONL and column of Parquet or a dataset with the text; for chat, the messages"""
    shard_mb: float = 64.0
    """megabytes of text of a shard, which memory holds"""


class Item(NamedTuple):
    """A document or chat example."""

    content: Any  # str, or the record of a chat, which is later replaced by its `Example`
    domain: int
    document: int
    location: str  # for errors


class Encoder(NamedTuple):
    """Turns items into pairs of ids and loss mask. No mask means that all ids are targets."""

    tokenizer: Tokenizer
    # the source of the chat template, a line for each of its variables, and `prompts`
    template: str | None
    read: Callable[[Item], Item] | None  # replaces the record of a chat by its `Example`
    encode: Callable[[Sequence[Item]], Iterable[tuple[np.ndarray, np.ndarray | None]]]


def encoder_of(job: Tokenize) -> Encoder:
    """Return the encoder of a job's documents or chat examples.

    Example:
        >>> encoder = encoder_of(Tokenize((), Path("shards")))
        >>> [ids.tolist() for ids, _ in encoder.encode([Item("hi", 0, 0, "here")])]
        [[104, 105, 256]]
    """
    if job.format == "chat":
        from dsv3_jax.chat.examples import read_example
        from dsv3_jax.chat.text_settings import plain_settings, with_template
        from dsv3_jax.runs.open_model import load_text

        if job.start is None and job.chat_template is None:
            raise ValueError(
                "format='chat' needs a template; name a model by --start, or give --chat-template "
                "plain"
            )
        text = plain_settings(job.tokenizer) if job.start is None else load_text(job.start)
        text = with_template(text, job.chat_template, job.template)

        def read(item: Item) -> Item:
            return item._replace(
                content=read_example(item.content, text, item.location, job.prompts)
            )

        def chats(items: Sequence[Item]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            return ((item.content.ids, item.content.targets) for item in items)

        return Encoder(
            text.tokenizer, "\n".join([text.chat.source, *job.template, job.prompts]), read, chats
        )
    for name in ("start", "chat_template", "template", "prompts"):
        if (value := getattr(job, name)) != getattr(Tokenize, name):
            raise ValueError(f"{name}={value!r} is for format='chat'")
    words = load_tokenizer(job.tokenizer)
    end = np.int32(words.eos_id)

    def texts(items: Sequence[Item]) -> Iterator[tuple[np.ndarray, None]]:
        for ids in words.encode_arrays([item.content for item in items]):
            yield np.append(ids, end), None

    return Encoder(words, None, None, texts)


def tokenize(job: Tokenize) -> Manifest:
    """Write the shards of a job that are not there yet, and the manifest.

    Print a line after each shard.

    Raises: ValueError as `corpus.read_documents`; for a folder with shards of other settings, or
        that another process writes; for documents of which none is held out, or all are.
    """
    for name, least in (("row_tokens", 2), ("shard_mb", 1e-6)):
        if not least <= getattr(job, name) < float("inf"):
            raise ValueError(f"{name}={getattr(job, name)} is below {least}, or no finite number")
    if not 0 < job.val_fraction < 1:
        raise ValueError(f"val_fraction={job.val_fraction} is outside (0, 1)")
    DataConfig(paths=job.paths)  # refuses names that are no text
    encoder = encoder_of(job)
    names = ("format", "row_tokens", "val_fraction", "text_column", "shard_mb")
    settings: dict[str, Any] = {name: getattr(job, name) for name in names} | {
        "version": VERSIONS[job.format], "tokenizer": encoder.tokenizer.fingerprint,
        "chat_template": encoder.template, "paths": list(job.paths),
    }  # fmt: skip
    check_writable(job.out, folders=True)
    job.out.mkdir(parents=True, exist_ok=True)
    with acquire(job.out, LOCK) as lock:
        _claim(job.out, settings)
        domains: dict[str, int] = {}
        began = time.monotonic()
        shards: list[dict[str, Any]] = []
        for group in _groups(job, domains):
            shards.append(_shard(job, encoder, settings, len(shards), group))
            lock.check()
            print(_summary(shards, time.monotonic() - began), flush=True)
        files = {name: facts for shard in shards for name, facts in shard["files"].items()}
        for side, what in zip(
            SIDES, ("leaves no document for training", "holds no document out"), strict=True
        ):
            if not any(facts["side"] == side for facts in files.values()):
                raise ValueError(
                    f"val_fraction={job.val_fraction} {what}; there are too few documents"
                )
        same = ("version", "format", "row_tokens", "tokenizer")
        values = {name: settings[name] for name in same} | {
            "vocab_size": encoder.tokenizer.vocab_size, "domains": list(domains), "files": files,
            "documents": sum(facts["documents"] for facts in files.values()),
        }  # fmt: skip
        write_atomic(job.out / MANIFEST, sealed(values))
        kept = {*files, *(f"shard-{number:05d}.json" for number in range(len(shards)))}
        for path in (*job.out.glob("shard-*.json"), *job.out.glob("*.array_record")):
            if path.name not in kept:
                print(f"deleted {str(path)!r}: the text that was here before was longer")
                path.unlink()
    return read_manifest(job.out)


def _summary(shards: list[dict[str, Any]], seconds: float) -> str:
    files = [facts for shard in shards for facts in shard["files"].values()]
    documents, tokens = (sum(facts[key] for facts in files) for key in ("documents", "tokens"))
    left_out = sum(shard["left_out"] for shard in shards)
    speed = tokens / max(seconds, 1e-9)
    line = (
        f"{len(shards):,} shards, {documents:,} documents, {tokens:,} tokens, {speed:,.0f} tokens/s"
    )
    if left_out:
        line += f"; left out: {left_out:,} without an assistant's turn or too long"
    return line


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new folder, or compare with those that are there.

    Raises: ValueError when they differ, or the folder holds something else.
    """
    file = out / SETTINGS
    for path in out.glob(f".*{PART}"):  # of a killed process
        path.unlink()
    if not file.is_file():
        if any(path.name != LOCK for path in out.iterdir()):
            raise ValueError(f"out={str(out)!r} holds other files; choose an empty folder")
        write_atomic(file, json.dumps(settings, indent=1))
    if difference := first_difference(read_json(file), settings):
        raise ValueError(
            f"{difference[0]}={difference[2]!r:.200} is not what {file} has; choose another folder"
        )


def _groups(job: Tokenize, domains: dict[str, int]) -> Iterator[list[Item]]:
    """Yield the documents of each shard, and number the domains by first appearance."""
    if job.format == "chat":
        from dsv3_jax.chat.examples import contents

        found = contents(job.paths, job.text_column)
    else:
        documents = enumerate(read_documents(job.paths, job.text_column))
        found = ((text, domain, f"document {i}") for i, (text, domain) in documents)
    group: list[Item] = []
    size = 0
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
    job: Tokenize, encoder: Encoder, settings: dict[str, Any], number: int, group: list[Item]
) -> dict[str, Any]:
    """Write one shard unless it is complete, and return its facts."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for item in group:
        digest.update(_hash(item.content) + repr(item[1:3]).encode())
    done = job.out / f"shard-{number:05d}.json"
    # a bad mark counts as absent
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        before = read_sealed(done)
        files = [(job.out / name, found) for name, found in before["files"].items()]
        whole = all(
            x.stat().st_size == found["bytes"] and file_hash(x) == found["hash"]
            for x, found in files
        )
        if before["input"] == digest.hexdigest() and whole:
            return before
    # The old manifest goes before the first shard that it names: it cannot see that one has other
    # bytes.
    (job.out / MANIFEST).unlink(missing_ok=True)
    done.unlink(missing_ok=True)
    sync(job.out)
    items: dict[str, list[Item]] = {side: [] for side in SIDES}
    for item in map(encoder.read, group) if encoder.read else group:
        mark = item.content.side if encoder.read else _hash(item.content)
        held_out = int.from_bytes(mark) < int(job.val_fraction * 2**64)
        items["val" if held_out else "train"].append(item)
    facts: dict[str, Any] = {"input": digest.hexdigest(), "files": {}, "left_out": 0}
    for side, own in items.items():
        order = np.random.default_rng(number).permutation(len(own))
        own = sorted((own[i] for i in order), key=lambda item: item.domain)
        name = f"{side}-{number:05d}.array_record"
        written, left_out = _write(job.out / name, own, job, encoder)
        facts["left_out"] += left_out
        if written:
            facts["files"][name] = {"side": side} | written
    write_atomic(done, sealed(facts))
    return facts


def _write(
    path: Path, items: list[Item], job: Tokenize, encoder: Encoder
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
            fits = mask is None or (len(ids) <= job.row_tokens and bool(mask[1:].any()))
            used[fits] += 1
            if fits:
                yield Piece(ids, item.domain, item.document, mask)

    domains: list[list[int]] = []  # each with its records and tokens
    try:
        with contextlib.closing(ArrayRecordWriter(str(part), "group_size:1")) as writer:
            for domain, of_domain in itertools.groupby(items, key=lambda item: item.domain):
                lengths = []
                for row in fill(pieces(list(of_domain)), job.row_tokens, whole):
                    record = Record.of(row)
                    writer.write(record.to_bytes())
                    lengths.append(len(record.tokens))
                domains += [[domain, len(lengths), sum(lengths)]] if lengths else []
        if not domains:
            return {}, used[False]
        records, tokens = (sum(counts[i] for counts in domains) for i in (1, 2))
        facts = {"records": records, "tokens": tokens, "documents": used[True], "domains": domains,
                 "bytes": part.stat().st_size, "hash": file_hash(part)}  # fmt: skip
        sync(part)
        part.replace(path)
        return facts, used[False]
    finally:
        part.unlink(missing_ok=True)
