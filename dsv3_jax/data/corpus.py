"""Documents: where text comes from, under which domain, and on which side of the train/validation split.

A corpus needs no download: without paths it is the text that this Python installation carries.
"""

import hashlib
import importlib.util
import itertools
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.config import DataConfig

_LARGEST_PART = 2**18  # characters: longer texts are cut, so that tokenising one, or resuming in it, stays cheap
_LARGEST_SOURCE = 2**18  # bytes: installed files beyond it are left out; what is so large is mostly tables
_FEW = 100  # installed files of a domain below which other packages help out: Debian keeps headers and tests apart


class Document(NamedTuple):
    text: str
    domain: str


@dataclass(frozen=True)
class Corpus:
    """Documents of both sides; `domains` in order of first appearance, `fingerprint` of the training texts' order."""

    train: tuple[Document, ...]
    val: tuple[Document, ...]
    domains: tuple[str, ...]
    fingerprint: str

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Bytes of UTF-8 by domain: (train, validation)."""
        sums = {domain: [0, 0] for domain in self.domains}
        for side, documents in enumerate((self.train, self.val)):
            for text, domain in documents:
                sums[domain][side] += len(text.encode("utf-8"))
        return {domain: (train, val) for domain, (train, val) in sums.items()}


def load_corpus(cfg: DataConfig) -> Corpus:
    """Read `cfg.paths`, or what this Python installation carries, and split it by a hash of each text.

    The default corpus has four domains, read in turn: "code" (the standard library), "tests" (its tests; where the
    distribution leaves them out, those of NumPy and SciPy), "C" (Python's headers, else those that NumPy and jaxlib
    carry) and "English" (the language reference in `pydoc_data.topics`, each topic a document). Character tables
    (`encodings`, `html/entities.py`), build settings and files above 256 KiB are left out; so is what is not UTF-8.

    A path is a file or a folder. `.jsonl` holds an object a line with "text" and, if wanted, "domain"; `.parquet` has
    such columns; anything else is text, one document a file. Hidden and binary files of a folder are passed over.
    A document's domain is its own, else the first folder below the given one, else the file's suffix.
    Texts above 2^18 characters are cut at line ends into documents of their own.

    Equal texts fall on the same side; where no text falls below `val_fraction` the one with the least hash is kept
    for validation.

    Raises: ValueError naming the path for what is absent, empty, unreadable or malformed, and when the documents
        cannot be split in two.
    """
    documents = _installation() if not cfg.paths else itertools.chain.from_iterable(map(_read, cfg.paths))
    documents = list(itertools.islice(documents, cfg.max_documents))
    if not documents:
        raise ValueError(f"there is no document in {', '.join(cfg.paths) or 'this Python installation'}")
    digests = [hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest() for text, _ in documents]
    # at least the least hash, so that a handful of documents has a validation side
    border = max(int(cfg.val_fraction * 2**64), int.from_bytes(min(digests)) + 1)
    is_val = [int.from_bytes(digest) < border for digest in digests]
    train = tuple(d for d, v in zip(documents, is_val, strict=True) if not v)
    val = tuple(d for d, v in zip(documents, is_val, strict=True) if v)
    if not train:
        raise ValueError(
            f"{len(documents)} document(s) of {len(set(digests))} distinct text(s) at val_fraction={cfg.val_fraction} "
            "leave none for training"
        )
    order = hashlib.blake2b(digest_size=8)
    for digest, v in zip(digests, is_val, strict=True):
        if not v:
            order.update(digest)
    return Corpus(train, val, tuple(dict.fromkeys(d.domain for d in documents)), order.hexdigest())


# The text that a Python installation carries


def _installation() -> Iterator[Document]:
    """Domains in turn, so that `max_documents` leaves some of each."""
    domains = (_python(tests=False), _python(tests=True), _headers(), _english())
    for turn in itertools.zip_longest(*domains):
        yield from (document for document in turn if document is not None)


def _python(tests: bool) -> Iterator[Document]:
    """The standard library's sources, or its tests."""
    tables = {"encodings", "pydoc_data", "entities.py"}
    count = 0
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, skip=("site-packages", "dist-packages")):
        names = set(path.relative_to(root).parts)
        if path.suffix == ".py" and bool(names & {"test", "tests", "idle_test"}) == tests and not names & tables:
            if not path.name.startswith("_sysconfigdata"):
                for document in _installed(path, "tests" if tests else "code"):
                    count += 1
                    yield document
    if tests and count < _FEW:
        for path in itertools.chain.from_iterable(map(_package, ("numpy", "scipy"))):
            if path.suffix == ".py" and "tests" in path.parts:
                yield from _installed(path, "tests")


def _headers() -> Iterator[Document]:
    include = Path(sysconfig.get_path("include"))
    headers = [path for path in _walk(include) if path.suffix == ".h"]
    if len(headers) < _FEW:
        packages = itertools.chain.from_iterable(map(_package, ("numpy", "jaxlib")))
        headers += [path for path in packages if path.suffix in (".h", ".hpp")]
    for path in headers:
        yield from _installed(path, "C")


def _english() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some slim builds leave it out
        return
    for name in sorted(topics):
        yield Document(topics[name], "English")


def _installed(path: Path, domain: str) -> Iterator[Document]:
    """The file as a document, if it is fit to be one: tests of decoding carry broken files on purpose."""
    try:
        text = path.read_bytes().decode("utf-8") if path.stat().st_size <= _LARGEST_SOURCE else ""
    except (OSError, UnicodeDecodeError):
        return
    if text.strip():
        yield Document(text, domain)


def _package(name: str) -> Iterator[Path]:
    """Files of an installed package, which need not be imported for it."""
    spec = importlib.util.find_spec(name)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from _walk(Path(folder))


def _walk(root: Path, skip: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files below `root` in order of name; nothing hidden, no compiled caches, no folder named in `skip`."""

    def refuse(error: OSError):
        if error.filename != str(root) or root.exists():
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__" and f not in skip)
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


# The user's own files


def _read(given: str) -> Iterator[Document]:
    """Documents of one path of the configuration."""
    root = Path(given)
    if not root.exists():
        raise ValueError(f"path {given!r} does not exist")
    found = False
    for path in _walk(root) if root.is_dir() else (root,):
        inner = path.relative_to(root).parts if root.is_dir() else ()
        domain = inner[0] if len(inner) > 1 else path.suffix[1:].lower() or "text"
        reader = {".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix.lower(), _text)
        try:
            for text, own in reader(path, lenient=root.is_dir()):
                for part in _parts(text):
                    found = True
                    yield Document(part, own or domain)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not found:
        raise ValueError(f"path {given!r} holds no text")


def _text(path: Path, lenient: bool) -> Iterator[tuple[str, str | None]]:
    data = path.read_bytes()
    if lenient and b"\0" in data[:8192]:  # git's rule for binary files
        return
    yield _utf8(data, path), None


def _jsonl(path: Path, lenient: bool) -> Iterator[tuple[str, str | None]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _utf8(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
            if not isinstance(record, dict) or "text" not in record:
                raise ValueError(f'{path}, line {number}, is not an object with a "text"')
            yield _record(record["text"], record.get("domain"), f"{path}, line {number}")


def _parquet(path: Path, lenient: bool) -> Iterator[tuple[str, str | None]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow, which is not installed: pip install 'dsv3-jax[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            if "text" not in names:
                raise ValueError(f'{path} has no column "text" among {sorted(names)}')
            row = 0
            for batch in file.iter_batches(columns=sorted(names & {"text", "domain"})):
                for record in batch.to_pylist():
                    row += 1
                    yield _record(record["text"], record.get("domain"), f"{path}, row {row}")
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error


def _record(text: object, domain: object, place: str) -> tuple[str, str | None]:
    if not isinstance(text, str):
        raise ValueError(f'{place}: "text" is {text!r}, not a string')
    if domain is not None and not isinstance(domain, str):
        raise ValueError(f'{place}: "domain" is {domain!r}, not a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise ValueError(f'{place}: "text" is not UTF-8 at character {error.start}') from error
    return text, domain


def _utf8(data: bytes, path: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = offset + error.start
        raise ValueError(f"{path} is not UTF-8: byte {where} is 0x{data[error.start]:02x}") from error


def _parts(text: str) -> Iterable[str]:
    """Cut a long text at line ends; an empty text has no part."""
    start = 0
    while start < len(text):
        end = start + _LARGEST_PART
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        if not text[start:end].isspace():
            yield text[start:end]
        start = end
