"""Shards of token ids on disk, read row by row: the memory does not depend on the corpus.

`dsv3 data tokenize` writes a folder (see `cli.tokenize`):

    manifest.json                    what there is: `Manifest`
    train-00000.array_record, …      records of the training documents
    val-00000.array_record, …        records of the held-out documents

A record is one long row of R tokens of one domain, the documents one after the other. The last
record of a domain in a file may be shorter. With R a multiple of T, a record has R / T training
rows.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from dsv3_jax.config import DataConfig, did_you_mean
from dsv3_jax.data.batches import Row, Source
from dsv3_jax.data.corpus import fingerprint_of
from dsv3_jax.data.packing import Record
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.host.files import file_hash, read_json

MANIFEST = "manifest.json"
# Of shards, by what they hold. Chats of version 2 were split by their records, ids included: those
# that were held out may be trained on, too.
VERSIONS = {"text": 2, "chat": 3}
SIDES = ("train", "val")
_READER = "readahead_buffer_size:0,max_parallelism:0"  # reads no record that is not asked for


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
            skip = 0
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
            f"shards={str(folder)!r} has no {MANIFEST}; run dsv3 data tokenize PATHS --out {folder}"
        )
    values = read_sealed(file)
    try:
        version = values.pop("version")
        newest = VERSIONS[values["format"]]
        if version != newest:
            raise ValueError(
                f"{file} is not of version {newest}; tokenize again into an empty folder"
            )
        _check(values)
        return Manifest(folder=Path(folder), **values | {"domains": tuple(values["domains"])})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a manifest of shards: {error}; tokenize again into an empty folder"
        ) from None


def _check(values: dict[str, Any]) -> None:
    """Check types and ranges: anybody can seal a manifest. Raises: TypeError that names a value."""
    domains, files = values.get("domains"), values.get("files")
    files = files if isinstance(files, dict) else {}
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
    with contextlib.suppress(KeyError, TypeError, ValueError):
        side, size, parts = facts["side"], values["row_tokens"], facts["domains"]
        shortest = size if values["format"] == "text" else 1  # but for the last record of a domain
        return (
            (side in SIDES and name.startswith(f"{side}-") and Path(name).name == name)
            and (_is_count(facts["bytes"]) and len(bytes.fromhex(facts["hash"])) == 16)
            and all(
                _is_count(domain, 0, len(values["domains"]) - 1) and _is_count(n)
                for domain, n, _ in parts
            )
            and all(_is_count(tokens, (n - 1) * shortest + 1, n * size) for _, n, tokens in parts)
            and sum(n for _, n, _ in parts) == facts["records"] > 0
        )
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


def check_files(manifest: Manifest, wholly: bool = False) -> Iterator[str]:
    """Yield a sentence on each shard that is missing or damaged.

    Args: wholly: read every byte, compare hashes, and check every record. Otherwise the first
        record is checked.
    """
    for name, facts in manifest.files.items():
        path = manifest.folder / name
        if not path.is_file():
            yield f"shard {str(path)!r} is missing"
        elif path.stat().st_size != facts["bytes"]:
            yield f"shard {str(path)!r} has {path.stat().st_size:,} bytes of {facts['bytes']:,}"
        elif wholly and file_hash(path) != facts["hash"]:
            yield f"shard {str(path)!r} has other bytes than when it was written"
        else:
            try:
                shard = Shard(manifest, name)
                tokens = sum(
                    len(shard.read(record).tokens)
                    for record in range(facts["records"] if wholly else 1)
                )
                if wholly and tokens != (expected := sum(part[2] for part in facts["domains"])):
                    yield f"shard {str(path)!r} has {tokens:,} tokens of {expected:,}"
            except ValueError as error:
                yield str(error)


class Shard:
    """The records of a file; every read is checked.

    Raises: ValueError that names a damaged shard.
    """

    def __init__(self, manifest: Manifest, name: str):
        self._manifest = manifest
        self._path = manifest.folder / name
        self._domains = manifest.files[name]["domains"]
        self._ends = list(itertools.accumulate(records for _, records, _ in self._domains))
        with self._named("the index"):
            self._reader = ArrayRecordReader(str(self._path), _READER)
            if self._reader.num_records() != manifest.files[name]["records"]:
                raise ValueError(f"it has {self._reader.num_records():,} records")

    def read(self, number: int) -> Record:
        """Return a record."""
        with self._named(f"record {number}"):
            record = Record.from_bytes(self._reader.read([number])[0])
            starts, tokens, mask = record.starts, record.tokens, record.loss_mask
            # By the manifest. A text's records are full but for the last one of a domain.
            part = bisect.bisect_right(self._ends, number)
            domain, records, total = self._domains[part]
            size = self._manifest.row_tokens
            length = size if number + 1 < self._ends[part] else total - (records - 1) * size
            if not (
                (0 <= tokens.min() and tokens.max() < self._manifest.vocab_size)
                and (starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < len(tokens))
                and (
                    record.domains[0] == domain
                    and (mask is None) == (self._manifest.format == "text")
                )
                and (len(tokens) == length if mask is None else len(mask) == len(tokens) <= size)
                and (mask is None or mask.view(np.uint8).max() <= 1)
            ):
                raise ValueError("its ids, starts, domain, length or loss mask are not possible")
            return record

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"shard {str(self._path)!r} is damaged in {what}: "
                f"{str(error).splitlines()[0]:.200}; see dsv3 data "
                f"check {self._manifest.folder}, delete the shard and tokenize again"
            ) from error


class ShardRows:
    """`Rows` of T tokens of some parts of shards.

    Args: parts: in their order; each has the rows of one domain in one file.
    """

    def __init__(self, manifest: Manifest, parts: Sequence[Part], cfg: DataConfig):
        self._parts = parts
        self._cfg = cfg
        self._per_record = manifest.row_tokens // cfg.seq_len
        rows = (p.records if self._per_record == 1 else -(-p.tokens // cfg.seq_len) for p in parts)
        self._first = [0, *itertools.accumulate(rows)]
        self._shard = cache(partial(Shard, manifest))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, row: int) -> Row:
        part = bisect.bisect_right(self._first, row) - 1
        file, skip = self._parts[part][:2]
        record, i = divmod(row - self._first[part], self._per_record)
        first = i * self._cfg.seq_len
        stop = (i + 1) * self._cfg.seq_len
        found = self._shard(file).read(skip + record)
        return found.row(first, stop, self._cfg.seq_len, self._cfg.separate_documents)


def proportions(sizes: dict[str, int], cfg: DataConfig) -> dict[str, float]:
    """Return each domain's share of the training rows: in proportion to weight^(1 / temperature).

    Args: sizes: training tokens by domain; they are the weights of a run without a mixture.
    Raises: ValueError for a mixture of a domain that has no training rows.
    Source: temperature-scaled mixing of T5 (arXiv 1910.10683), section 3.5.2.

    Example:
        >>> mixture = ("code=8", "English=2")
        >>> cfg = DataConfig(("shards",), format="shards", mixture=mixture, temperature=2.0)
        >>> shares = proportions({"code": 100, "C": 100, "English": 50}, cfg)
        >>> {name: round(share, 3) for name, share in shares.items()}
        {'code': 0.667, 'English': 0.333}
    """
    sizes = {name: size for name, size in sizes.items() if size}
    weights = cfg.weights() or {name: float(size) for name, size in sizes.items()}
    for name, weight in weights.items():
        if weight and name not in sizes:
            known = ", ".join(sizes) + did_you_mean(name, sizes)
            raise ValueError(
                f"mixture={cfg.mixture} names domain {name!r}, and the shards have {known}"
            )
    most = max(weights.values())
    scaled = {
        name: (weight / most) ** (1 / cfg.temperature) for name, weight in weights.items() if weight
    }
    return {name: weight / sum(scaled.values()) for name, weight in scaled.items()}


def open_shards(cfg: DataConfig, tokenizer: Tokenizer) -> Source:
    """Open the folder of shards that `cfg.paths` names.

    Every row occurs once in each pass. Without a mixture a pass is over all rows. With one, passes
    are counted for each domain.

    Raises: ValueError for shards of another tokenizer, a missing or torn shard, a sequence length
        that does not divide the records, or an unknown domain in the mixture.

    Example:
        >>> import tempfile
        >>> from dsv3_jax.cli.tokenize import Tokenize, tokenize
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "text.jsonl")
        ...     _ = file.write_text("\\n".join(f'{{"text": "document {i}"}}' for i in range(9)))
        ...     job = Tokenize((str(file),), Path(folder, "shards"), row_tokens=8, val_fraction=0.3)
        ...     _ = tokenize(job)  # doctest: +ELLIPSIS
        ...     cfg = DataConfig((str(job.out),), seq_len=8, batch_size=1, format="shards")
        ...     shape = next(open_shards(cfg, ByteTokenizer()).train_batches())["tokens"].shape
        1 shards, 9 documents, ... tokens, ... tokens/s
        >>> shape
        (1, 8)
    """
    folder = cfg.paths[0]
    manifest = read_manifest(folder)
    if manifest.tokenizer != tokenizer.fingerprint or manifest.vocab_size > tokenizer.vocab_size:
        raise ValueError(
            f"tokenizer={cfg.tokenizer!r} is not that of shards={folder!r}; name theirs"
        )
    if manifest.row_tokens % cfg.seq_len or (
        manifest.format == "chat" and manifest.row_tokens != cfg.seq_len
    ):
        whole = " equal" if manifest.format == "chat" else " divide"
        raise ValueError(
            f"seq_len={cfg.seq_len} does not{whole} the {manifest.row_tokens} tokens of a record "
            f"of shards={folder!r}; change seq_len, or tokenize with another --row-tokens"
        )
    if manifest.format == "chat" and not cfg.separate_documents:
        raise ValueError(
            "separate_documents=False is for text: chat examples never see one another"
        )
    for damage in check_files(manifest):
        raise ValueError(
            f"{damage}; run dsv3 data tokenize again, which writes only what is absent"
        )
    train, val = manifest.parts("train"), manifest.parts("val")
    sizes = {name: sum(part.tokens for part in parts) for name, parts in train.items()}
    shares = proportions(sizes, cfg)
    mixed = (
        [train[name] for name in shares]
        if cfg.mixture or cfg.temperature != 1
        else [sum(train.values(), [])]
    )
    held_out = sum(part.tokens for parts in val.values() for part in parts)
    return Source(
        cfg,
        manifest.domains,
        fingerprint_of(
            bytes.fromhex(f["hash"]) for f in manifest.files.values() if f["side"] == "train"
        ),
        f"shards: {len(manifest.files):,} files, {manifest.documents:,} documents, "
        f"{sum(sizes.values()):,} tokens "
        f"({', '.join(f'{name} {size:,}' for name, size in sizes.items())}); {held_out:,} held out",
        lambda: [ShardRows(manifest, parts, cfg) for parts in mixed],
        lambda: [
            grain.MapDataset.source(ShardRows(manifest, p, cfg)).seed(0).shuffle()
            for p in val.values()
            if p
        ],
        weights=tuple(shares.values()),
    )
