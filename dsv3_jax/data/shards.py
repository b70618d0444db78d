"""Shards of token ids on disk, and batches from them: a `Source` whose memory does not depend on the corpus.

`dsv3 data tokenize` writes a folder (see `tokenize`):

    manifest.json                    what there is: `Manifest`
    train-00000.array_record, …      records of the training documents
    val-00000.array_record, …        records of the held-out documents

A record is one long row of R tokens of one domain, the documents one after the other. The last record of a domain in a
file may be shorter. With R a multiple of T, a record has R / T training rows. An epoch is a shuffle of all rows by
index, so row i of the endless order is found in constant time. A process reads only its rows. The position of a run is
one number, which is also valid for another number of processes.
"""

import bisect
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Bool, Int32

from dsv3_jax.config import DataConfig, did_you_mean
from dsv3_jax.data.batches import Batch, Piece, check_position, check_rows, pack
from dsv3_jax.data.corpus import fingerprint_of
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.files import read_json

MANIFEST = "manifest.json"
VERSION = 1
SIDES = ("train", "val")
_READER = "readahead_buffer_size:0,max_parallelism:0"  # reads no record that is not asked for
_THREADS, _AHEAD = 2, 2  # that read batches, and the batches that are read before they are asked for


class Record(NamedTuple):
    """Up to R tokens of documents of one domain.

    Attributes:
        starts: index of the first token of each document, or of what this record has of it.
        documents: number of each document in the corpus.
        loss_mask: tokens that are targets. None means all.

    Example:
        >>> tokens, number = np.array([104, 105, 256], np.int32), np.array([7], np.int32)
        >>> record = Record(0, number * 0, number, tokens, None)
        >>> Record.from_bytes(record.to_bytes()).tokens.tolist()
        [104, 105, 256]
    """

    domain: int
    starts: Int32[np.ndarray, " d"]
    documents: Int32[np.ndarray, " d"]
    tokens: Int32[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"] | None

    def to_bytes(self) -> bytes:
        """Return three int32 (domain, d, n), starts, documents and tokens in int32, and the loss mask in bytes."""
        head = np.array([self.domain, len(self.starts), len(self.tokens)], np.int32)
        ids = np.concatenate([head, self.starts, self.documents, self.tokens]).astype("<i4")
        return ids.tobytes() + (b"" if self.loss_mask is None else self.loss_mask.tobytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Record":
        """Read what `to_bytes` returns."""
        domain, d, n = np.frombuffer(data, "<i4", 3).tolist()
        ids = np.frombuffer(data, "<i4", 2 * d + n, offset=12).astype(np.int32, copy=False)
        mask = np.frombuffer(data, bool, offset=12 + ids.nbytes) if len(data) > 12 + ids.nbytes else None
        return cls(domain, ids[:d], ids[d : 2 * d], ids[2 * d :], mask)

    def part(self, first: int, length: int) -> tuple[list[Piece], Bool[np.ndarray, " m"] | None]:
        """Return the documents of `length` tokens, or of as many as there are, and their loss mask."""
        stop = min(first + length, len(self.tokens))
        ends = [*self.starts[1:].tolist(), len(self.tokens)]
        pieces = [
            Piece(self.tokens[max(start, first) : min(end, stop)], self.domain, document)
            for start, end, document in zip(self.starts.tolist(), ends, self.documents.tolist(), strict=True)
            if start < stop and end > first
        ]
        return pieces, None if self.loss_mask is None else self.loss_mask[first:stop]


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
        train, val: for each domain, where its records are.
        files: name → bytes, records and hash.
    """

    folder: Path
    format: str
    row_tokens: int
    tokenizer: str
    domains: tuple[str, ...]
    documents: int
    train: tuple[tuple[Part, ...], ...]
    val: tuple[tuple[Part, ...], ...]
    files: dict[str, dict[str, Any]]


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a folder of shards.

    Raises: ValueError when the folder has none, or it is damaged.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"shards={str(folder)!r} has no {MANIFEST}; write them, or finish them, by: dsv3 data tokenize PATHS --out "
            f"{folder}"
        )
    values = read_json(file)
    try:
        if values["version"] != VERSION:
            raise ValueError(f"{file} has version={values['version']!r}; version {VERSION} is supported")
        domains, files = tuple(values["domains"]), dict(values["files"])
        parts: dict[str, list[list[Part]]] = {side: [[] for _ in domains] for side in SIDES}
        for name, facts in files.items():
            skip = 0
            for domain, records, tokens in facts["domains"]:
                parts[facts["side"]][domain].append(Part(name, skip, records, tokens))
                skip += records
        train, val = (tuple(map(tuple, parts[side])) for side in SIDES)
        facts = (values["format"], values["row_tokens"], values["tokenizer"], domains, values["documents"])
        return Manifest(Path(folder), *facts, train, val, files)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a manifest of shards: {error!r}; tokenize again into an empty folder"
        ) from error


def check_files(manifest: Manifest, hashes: bool = False) -> Iterator[str]:
    """Yield a sentence on each shard that is missing or torn.

    Args: hashes: read every byte and compare hashes too.
    """
    for name, facts in manifest.files.items():
        path = manifest.folder / name
        if not path.is_file():
            yield f"shard {str(path)!r} is missing"
        elif path.stat().st_size != facts["bytes"]:
            yield f"shard {str(path)!r} has {path.stat().st_size:,} bytes of {facts['bytes']:,}"
        elif hashes and file_hash(path) != facts["hash"]:
            yield f"shard {str(path)!r} has other bytes than when it was written"
        elif _records_of(path) != facts["records"]:
            yield f"shard {str(path)!r} is damaged: its index does not have {facts['records']:,} records"


def file_hash(path: Path) -> str:
    """Return the BLAKE2b hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _records_of(path: Path) -> int | None:
    """Number of records by a file's own index; None when it cannot be read."""
    try:
        reader = ArrayRecordReader(str(path), _READER)
        try:
            return reader.num_records()
        finally:
            reader.close()
    except (RuntimeError, ValueError):
        return None


@dataclass(frozen=True)
class _Slice:
    """Records of a file, as ArrayRecord's data source takes them."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class _Rows:
    """Rows of T tokens of one domain by index: pairs of documents and loss mask."""

    def __init__(self, manifest: Manifest, parts: Sequence[Part], seq_len: int):
        slices = [
            _Slice(str(manifest.folder / p.file), p.skip, p.records, manifest.files[p.file]["records"]) for p in parts
        ]
        self._records = grain.sources.ArrayRecordDataSource(slices)
        self._per_record, self._seq_len = manifest.row_tokens // seq_len, seq_len
        rows = [p.records if self._per_record == 1 else -(-p.tokens // seq_len) for p in parts]
        self._ends = list(itertools.accumulate(rows))
        self._first_row = [0, *self._ends]
        self._first_record = [0, *itertools.accumulate(p.records for p in parts)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> tuple[list[Piece], Bool[np.ndarray, " m"] | None]:
        part = bisect.bisect_right(self._ends, row)
        record, i = divmod(row - self._first_row[part], self._per_record)
        data = self._records[self._first_record[part] + record]
        return Record.from_bytes(data).part(i * self._seq_len, self._seq_len)


class _AllRows:
    """Rows of several domains by one index."""

    def __init__(self, domains: Sequence[_Rows]):
        self._domains, self._ends = domains, list(itertools.accumulate(map(len, domains)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> tuple[list[Piece], Bool[np.ndarray, " m"] | None]:
        domain = bisect.bisect_right(self._ends, row)
        return self._domains[domain][row - (self._ends[domain] - len(self._domains[domain]))]


@dataclass(frozen=True)
class Shards:
    """A folder of shards: a `Source`. A row has documents of one domain.

    Every row occurs once in each epoch. Without a mixture an epoch is all rows. With one, each domain has epochs of its
    own, and rows are taken from the domains in proportion to weight^(1 / temperature).

    Source: temperature-scaled mixing of T5 (arXiv 1910.10683), section 3.5.2.
    """

    manifest: Manifest
    cfg: DataConfig

    @property
    def domains(self) -> tuple[str, ...]:
        return self.manifest.domains

    @property
    def fingerprint(self) -> str:
        files = self.manifest.files.values()
        return fingerprint_of(bytes.fromhex(facts["hash"]) for facts in files if facts["side"] == "train")

    def describe(self) -> str:
        """Return a line on the shards, their domains and what is held out."""
        sizes = self.tokens("train")
        parts = ", ".join(f"{name} {count:,}" for name, count in sizes.items())
        return (
            f"shards: {len(self.manifest.files):,} files, {self.manifest.documents:,} documents, "
            f"{sum(sizes.values()):,} tokens ({parts}); {sum(self.tokens('val').values()):,} held out"
        )

    def tokens(self, side: str) -> dict[str, int]:
        """Return the number of tokens by domain. Args: side: train or val."""
        parts = getattr(self.manifest, side)
        return {name: sum(p.tokens for p in found) for name, found in zip(self.domains, parts, strict=True)}

    def proportions(self) -> dict[str, float]:
        """Return each domain's share of the training rows.

        Raises: ValueError for a mixture of a domain that has no training rows.
        """
        sizes = {name: float(count) for name, count in self.tokens("train").items() if count}
        weights = self.cfg.weights() or sizes
        for name, weight in weights.items():
            if weight and name not in sizes:
                raise ValueError(
                    f"mixture={self.cfg.mixture} names domain {name!r}, and the shards have "
                    f"{', '.join(sizes)}{did_you_mean(name, sizes)}"
                )
        most = max(weights.values())
        scaled = {name: (weight / most) ** (1 / self.cfg.temperature) for name, weight in weights.items() if weight}
        return {name: weight / sum(scaled.values()) for name, weight in scaled.items()}

    def train_batches(self, rows: Sequence[int] | np.ndarray | None = None) -> "ShardBatches":
        """Iterate over endless training batches. Args: rows: as in `batches.train_batches`."""
        return ShardBatches(self, np.arange(self.cfg.batch_size) if rows is None else np.asarray(rows))

    def val_batches(self, num_batches: int) -> list[Batch]:
        """Return held-out rows that alternate between domains, at most `num_batches`; the last may end in padding."""
        size = self.cfg.batch_size
        streams = [iter(grain.MapDataset.source(rows).seed(0).shuffle()) for rows in self.rows("val").values()]
        rounds = itertools.zip_longest(*streams)
        found = itertools.islice((row for r in rounds for row in r if row is not None), num_batches * size)
        rows = list(found)
        rows += [([], None)] * (-len(rows) % size)
        return [self.batch(rows[i : i + size]) for i in range(0, len(rows), size)]

    def rows(self, side: str) -> dict[str, _Rows]:
        """Return the rows of each domain that has some. Args: side: train or val."""
        parts = zip(self.domains, getattr(self.manifest, side), strict=True)
        return {name: _Rows(self.manifest, found, self.cfg.seq_len) for name, found in parts if found}

    def batch(self, rows: Sequence[tuple[list[Piece], Bool[np.ndarray, " m"] | None]]) -> Batch:
        """Join rows into a batch."""
        packed = [pack(pieces, 1, self.cfg) for pieces, _ in rows]
        batch: Any = {key: np.concatenate([row[key] for row in packed]) for key in packed[0]}  # type: ignore[literal-required]
        if self.manifest.format == "chat":
            batch["loss_mask"] = np.zeros((len(rows), self.cfg.seq_len), bool)
            for i, (_, mask) in enumerate(rows):
                if mask is not None:
                    batch["loss_mask"][i, : len(mask)] = mask
        return batch


class ShardBatches(Iterator[Batch]):
    """Iterator of `Shards.train_batches`. Its state is the number of rows before the next global batch.

    Grain gives the order and the mixture, both by index, and threads that read batches ahead.
    """

    def __init__(self, shards: Shards, rows: np.ndarray):
        cfg = shards.cfg
        check_rows(rows, cfg)
        self._shards, self._rows, self._batch_size = shards, rows, cfg.batch_size
        self._source: dict[str, Any] = {
            "corpus": shards.fingerprint, "seed": cfg.seed, "seq_len": cfg.seq_len, "mixture": list(cfg.mixture),
            "temperature": cfg.temperature,
        }  # fmt: skip
        proportions, domains = shards.proportions(), shards.rows("train")
        sources = [domains[name] for name in proportions] if cfg.mixture or cfg.temperature != 1 else None
        endless = [
            grain.MapDataset.source(source).seed((cfg.seed + i) % 2**32).shuffle().repeat()
            for i, source in enumerate(sources or [_AllRows(list(domains.values()))])
        ]
        self._order = grain.MapDataset.mix(endless, list(proportions.values())) if sources else endless[0]
        self._reader: Any = None
        self._row = 0

    def __next__(self) -> Batch:
        if self._reader is None:
            starts = grain.MapDataset.range(self._row, sys.maxsize - self._batch_size, self._batch_size)
            ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
            self._reader = iter(starts.map(self._read).to_iter_dataset(ahead))
        batch = next(self._reader)
        self._row += self._batch_size
        return batch

    def _read(self, start: int) -> Batch:
        return self._shards.batch([self._order[int(start + row)] for row in self._rows])

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch as plain JSON."""
        return {**self._source, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a state of `get_state`, in constant time.

        Raises: ValueError when the state belongs to other shards, another seed, sequence length or mixture.
        """
        check_position(self._source, state)
        self.close()
        self._row = state["row"]

    def close(self) -> None:
        """End the threads that read ahead. The next batch starts them again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def open_shards(cfg: DataConfig, tokenizer: Tokenizer) -> Shards:
    """Open the folder of shards that `cfg.paths` names.

    Raises: ValueError for shards of another tokenizer, a missing or torn shard, a sequence length that does not divide
        the records, or an unknown domain in the mixture.

    Example:
        >>> import tempfile
        >>> from dsv3_jax.data.tokenize import Tokenize, text_encoder, tokenize
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for i in range(9):
        ...         _ = Path(folder, f"{i}.txt").write_text(f"document {i}")
        ...     job = Tokenize((folder,), Path(folder, "shards"), row_tokens=8, val_fraction=0.3)
        ...     _ = tokenize(job, text_encoder)
        ...     cfg = DataConfig((str(job.out),), seq_len=8, batch_size=1, format="shards")
        ...     batches = open_shards(cfg, text_encoder().tokenizer).train_batches()
        ...     shape = next(batches)["tokens"].shape
        ...     batches.close()
        >>> shape
        (1, 8)
    """
    folder = cfg.paths[0]
    manifest = read_manifest(folder)
    if manifest.tokenizer != tokenizer.fingerprint:
        raise ValueError(
            f"shards={folder!r} were written by another tokenizer than tokenizer={cfg.tokenizer!r}; name theirs, or "
            "tokenize again"
        )
    if manifest.row_tokens % cfg.seq_len or (manifest.format == "chat" and manifest.row_tokens != cfg.seq_len):
        whole = " equal" if manifest.format == "chat" else " divide"
        raise ValueError(
            f"seq_len={cfg.seq_len} does not{whole} the {manifest.row_tokens} tokens of a record of shards={folder!r}; "
            "change seq_len, or tokenize with another --row-tokens"
        )
    if manifest.format == "chat" and not cfg.separate_documents:
        raise ValueError(
            f"separate_documents={cfg.separate_documents} is for text: chat examples never see one another"
        )
    for damage in check_files(manifest):
        raise ValueError(f"{damage}; run dsv3 data tokenize again, which writes only what is absent")
    shards = Shards(manifest, cfg)
    shards.proportions()
    return shards
