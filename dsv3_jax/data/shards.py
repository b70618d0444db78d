"""Shards of token ids on disk, read row by row: the memory does not depend on the corpus.

`dsv3 data tokenize` writes a folder (see `data.tokenizing`):

    manifest.json                    what there is: `Manifest`
    train-00000.array_record, …      records of the training documents
    val-00000.array_record, …        records of the held-out documents

A record is one long row of R tokens of one domain, the documents one after the other. The last
record of a domain in a file may be shorter. With R a multiple of T, a record has R / T training
rows.
"""

import bisect
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from dsv3_jax.config import DataConfig, did_you_mean
from dsv3_jax.data.batches import Row, Source
from dsv3_jax.data.byte_tokenizer import Tokenizer
from dsv3_jax.data.corpus import fingerprint_of
from dsv3_jax.data.manifest import Manifest, Part, read_manifest
from dsv3_jax.data.packing import Record
from dsv3_jax.host.files import file_hash

_READER = "readahead_buffer_size:0,max_parallelism:0"  # reads no record that is not asked for


def check_files(manifest: Manifest, wholly: bool = False) -> Iterator[str]:
    """Yield a sentence on each shard that is missing or damaged.

    Args: wholly: read every byte, compare hashes, and check every record. Otherwise the first
        record is checked.
    """
    for name, facts in manifest.files.items():
        path = manifest.folder / name
        # Cheap checks come first; a later one relies on the earlier ones.
        if not path.is_file():
            yield f"shard {str(path)!r} is missing"
        elif path.stat().st_size != facts["bytes"]:
            yield f"shard {str(path)!r} has {path.stat().st_size:,} bytes of {facts['bytes']:,}"
        elif wholly and file_hash(path) != facts["hash"]:
            yield f"shard {str(path)!r} has other bytes than when it was written"
        else:
            try:
                # By the first record a shard of another version or tokenizer shows.
                shard = Shard(manifest, name)
                records = range(facts["records"] if wholly else 1)
                tokens = sum(len(shard.read(record).tokens) for record in records)
                expected = sum(part[2] for part in facts["domains"])
                if wholly and tokens != expected:
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

        # Domains follow one another in a file; `_ends` has the number of the record after each.
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
            if not self._is_possible(record, number):
                raise ValueError("its ids, starts, domain, length or loss mask are not possible")
            return record

    def _is_possible(self, record: Record, number: int) -> bool:
        """Compare a record with the manifest: its bytes may be damaged, or a stranger's."""
        starts, tokens, mask = record.starts, record.tokens, record.loss_mask
        if tokens.min() < 0 or tokens.max() >= self._manifest.vocab_size:
            return False
        if starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= len(tokens):
            return False

        part = bisect.bisect_right(self._ends, number)
        domain, records, total = self._domains[part]
        is_text = self._manifest.format == "text"
        if record.domains[0] != domain or (mask is None) != is_text:
            return False

        # A text's records are full, but for the last one of a domain, which has the rest.
        size = self._manifest.row_tokens
        if mask is None:
            is_last = number + 1 == self._ends[part]
            return len(tokens) == (total - (records - 1) * size if is_last else size)
        return bool(len(mask) == len(tokens) <= size and mask.view(np.uint8).max() <= 1)

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
    """`RowSequence` of T tokens of some parts of shards.

    Args: parts: in their order; each has the rows of one domain in one file.
    """

    def __init__(self, manifest: Manifest, parts: Sequence[Part], cfg: DataConfig):
        self._parts = parts
        self._cfg = cfg
        self._per_record = manifest.row_tokens // cfg.seq_len

        # A file is opened at the first read of it, and stays open.
        self._shard = cache(partial(Shard, manifest))

        # The number of each part's first row. Its last record may have fewer rows than the others.
        if self._per_record == 1:
            rows = [part.records for part in parts]
        else:
            rows = [-(-part.tokens // cfg.seq_len) for part in parts]
        self._first = [0, *itertools.accumulate(rows)]

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, row: int) -> Row:
        # The part, the record in it, and the row in that.
        part = bisect.bisect_right(self._first, row) - 1
        file, skip = self._parts[part][:2]
        record, i = divmod(row - self._first[part], self._per_record)

        first = i * self._cfg.seq_len
        stop = first + self._cfg.seq_len
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

    # Relative to the largest weight, so that no power overflows at a low temperature. One that
    # underflows to 0 is left out, as a weight of 0 is.
    most = max(weights.values())
    scaled = {name: (weight / most) ** (1 / cfg.temperature) for name, weight in weights.items()}
    return {name: weight / sum(scaled.values()) for name, weight in scaled.items() if weight}


def open_shards(cfg: DataConfig, tokenizer: Tokenizer) -> Source:
    """Open the folder of shards that `cfg.paths` names.

    Every row occurs once in each pass. Without a mixture a pass is over all rows. With one, passes
    are counted for each domain.

    Raises: ValueError for shards of another tokenizer, a missing or torn shard, a sequence length
        that does not divide the records, or an unknown domain in the mixture.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> from dsv3_jax.data.tokenizing import ShardJob, text_encoder, write_shards
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "text.jsonl")
        ...     _ = file.write_text("\\n".join(f'{{"text": "document {i}"}}' for i in range(9)))
        ...     out = Path(folder, "shards")
        ...     job = ShardJob((str(file),), out, row_tokens=8, val_fraction=0.3)
        ...     _ = write_shards(job, text_encoder(ByteTokenizer()))  # doctest: +ELLIPSIS
        ...     cfg = DataConfig((str(job.out),), seq_len=8, batch_size=1, format="shards")
        ...     shape = next(open_shards(cfg, ByteTokenizer()).train_batches())["tokens"].shape
        1 shard, 9 documents, ... tokens, ... tokens/s
        >>> shape
        (1, 8)
    """
    folder = cfg.paths[0]
    manifest = read_manifest(folder)
    _check_run(cfg, manifest, tokenizer)
    for damage in check_files(manifest):
        raise ValueError(
            f"{damage}; run dsv3 data tokenize again, which writes only what is absent"
        )

    # One order for each domain that is mixed, or one order of all records.
    train = manifest.parts("train")
    sizes = {name: sum(part.tokens for part in parts) for name, parts in train.items()}
    shares = proportions(sizes, cfg)
    if cfg.mixture or cfg.temperature != 1:
        mixed = [train[name] for name in shares]
    else:
        mixed = [sum(train.values(), [])]

    def held_out() -> list[Any]:
        # A few batches are read of each domain: rows from all over its files.
        return [
            grain.MapDataset.source(ShardRows(manifest, parts, cfg)).seed(0).shuffle()
            for parts in manifest.parts("val").values()
            if parts
        ]

    # For the user, before the run begins.
    of_domains = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    held_out_tokens = sum(part.tokens for parts in manifest.parts("val").values() for part in parts)
    hashes = (facts["hash"] for facts in manifest.files.values() if facts["side"] == "train")

    return Source(
        cfg,
        manifest.domains,
        fingerprint=fingerprint_of(map(bytes.fromhex, hashes)),
        summary=f"shards: {len(manifest.files):,} files, {manifest.documents:,} documents, "
        f"{sum(sizes.values()):,} tokens ({of_domains}); {held_out_tokens:,} held out",
        train=lambda: [ShardRows(manifest, parts, cfg) for parts in mixed],
        held_out=held_out,
        weights=tuple(shares.values()),
    )


def _check_run(cfg: DataConfig, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raises: ValueError for settings of a run that these shards cannot serve."""
    folder = cfg.paths[0]
    if manifest.tokenizer != tokenizer.fingerprint or manifest.vocab_size > tokenizer.vocab_size:
        raise ValueError(
            f"tokenizer={cfg.tokenizer!r} is not that of shards={folder!r}; name theirs"
        )

    # A record of text is cut into rows; an example of a chat is never cut.
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
