"""Documents: their text, their domain, and their side of the split into training and validation.

The default corpus is the text that this Python installation contains, so no download is needed.
"""

import contextlib
import hashlib
import importlib.util
import itertools
import os
import reprlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dsv3_jax.config import DataConfig
from dsv3_jax.data.hub import dataset_rows, is_dataset, numbered, parts_of
from dsv3_jax.host.files import check_regular, open_file, parse_json, read_text

T = TypeVar("T")
# longer texts are cut, so that tokenising one, or resuming in it, takes little time
_MAX_CHARACTERS = 2**18
_MAX_TEXT_BYTES = 2**31  # of a file that is one text
_MAX_LINE_BYTES = 2**26  # of a line of JSONL, or a row of a library
_MAX_CHAT_BYTES = 2**23  # of a line of chats: the places of its tokens take a hundred times as much
_PARQUET_ROWS = 16  # that are decoded at once: a file of kilobytes may hold many rows of megabytes
MAX_DOMAIN = 200  # characters of a domain's name
# of a domain; below it other packages' files are added: Debian moves headers and tests away
_MIN_INSTALLED_FILES = 100
_MAX_INSTALLED_BYTES = 2**18  # larger installed files are left out: most of them are tables


class Document(NamedTuple):
    """A text and the name of its domain.

    Example:
        >>> Document("x = 1", domain="code").domain
        'code'
    """

    text: str
    domain: str


@dataclass(frozen=True)
class Corpus:
    """Documents of both sides of the split.

    Attributes:
        domains: names in order of first appearance.
        fingerprint: a hash of the training texts in their order.

    Example:
        >>> train = (Document("ab", "text"), Document("x = 1", "code"))
        >>> val = (Document("é", "text"),)
        >>> corpus = Corpus(train, val, domains=("text", "code"), fingerprint="")
        >>> corpus.sizes()
        {'text': (2, 2), 'code': (5, 0)}
    """

    train: tuple[Document, ...]
    val: tuple[Document, ...]
    domains: tuple[str, ...]
    fingerprint: str

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return bytes of UTF-8 by domain: (training, validation)."""
        sums = {domain: [0, 0] for domain in self.domains}
        for side, documents in enumerate((self.train, self.val)):
            for text, domain in documents:
                sums[domain][side] += len(text.encode("utf-8"))
        return {domain: (train, val) for domain, (train, val) in sums.items()}


def load_corpus(cfg: DataConfig) -> Corpus:
    """Read the documents of `cfg.paths` and split them by a hash of each text.

    Without paths the default corpus is read. It alternates between four domains:
        code: the standard library.
        tests: its tests; if they are not installed, those of NumPy and SciPy.
        C: Python's headers; if they are not installed, those of NumPy and jaxlib.
        English: the language reference in `pydoc_data.topics`, one document a topic.
    It leaves out character tables (`encodings`, `html/entities.py`), build settings, files above
    256 KiB, and files that are not UTF-8.

    A path is a file or a folder. `.jsonl` has an object in each line, with "text" and optionally
    "domain". `.parquet` has columns of these names. `cfg.text_column` is another name of "text".
    Any other file is one document. Hidden and binary files of a folder are skipped. `hf:NAME` is a
    dataset of Hugging Face, see `hub`. A document's domain is the one it states, else the first
    folder below the path, else the file's suffix. Texts above 2^18 characters are cut at line ends
    into several documents.

    Equal texts are on the same side. If no hash selects a text for validation, the text with the
    smallest hash is used.

    Raises: ValueError naming a path that is absent, empty, unreadable or malformed; or when the
        documents are too few for two sides.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for i in range(4):
        ...         _ = (Path(folder) / f"{i}.txt").write_text(f"document {i}")
        ...     corpus = load_corpus(DataConfig(paths=(folder,)))
        >>> len(corpus.train), len(corpus.val), corpus.domains
        (3, 1, ('txt',))
    """
    documents = list(
        itertools.islice(read_documents(cfg.paths, cfg.text_column), cfg.max_documents)
    )
    if not documents:
        raise ValueError(
            "this Python installation holds no document; give paths of files or folders with text"
        )
    digests = [
        hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest() for text, _ in documents
    ]
    train, val, fingerprint = split(documents, digests, cfg.val_fraction)
    return Corpus(
        tuple(train), tuple(val), tuple(dict.fromkeys(d.domain for d in documents)), fingerprint
    )


def read_documents(paths: Sequence[str], text_column: str = "text") -> Iterator[Document]:
    """Yield documents as `load_corpus` reads them, one by one: memory does not grow with them.

    Args: text_column: the key of JSONL and the column of Parquet with the text.
    Raises: ValueError as `load_corpus`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.jsonl").write_text('{"body": "x = 1", "domain": "code"}')
        ...     list(read_documents([folder], text_column="body"))
        [Document(text='x = 1', domain='code')]
    """
    if not paths:
        return _installed_documents()
    return itertools.chain.from_iterable(_documents_of(path, text_column) for path in paths)


def split(
    texts: Sequence[T], digests: Sequence[bytes], fraction: float
) -> tuple[list[T], list[T], str]:
    """Divide texts by hashes of 8 bytes into training and validation: a fraction, at least one.

    Returns: (training, validation, a hash of the training texts in their order).
    Raises: ValueError when all are held out.

    Example:
        >>> split("abc", [bytes(8), b"\\xff" * 8, b"\\x7f" * 8], fraction=0.01)[:2]
        (['b', 'c'], ['a'])
    """
    threshold = max(int(fraction * 2**64), int.from_bytes(min(digests)) + 1)
    sides: tuple[list[T], list[T]] = [], []
    for text, digest in zip(texts, digests, strict=True):
        sides[int.from_bytes(digest) < threshold].append(text)
    if not sides[0]:
        distinct = f"{len(texts)} in all, {len(set(digests))} of them distinct"
        raise ValueError(
            f"val_fraction={fraction} leaves no text for training: there are {distinct}; add text"
        )
    trained = (digest for digest in digests if int.from_bytes(digest) >= threshold)
    return *sides, fingerprint_of(trained)


def fingerprint_of(digests: Iterable[bytes]) -> str:
    """Return a hash of hashes in their order."""
    order = hashlib.blake2b(digest_size=8)
    for digest in digests:
        order.update(digest)
    return order.hexdigest()


# The text of a Python installation


def _installed_documents() -> Iterator[Document]:
    """Alternate between the domains, so that `max_documents` keeps some of each."""
    tests = _python_files(tests=True)
    if len(tests) < _MIN_INSTALLED_FILES:
        tests += [
            path
            for path in _package_files("numpy", "scipy")
            if path.suffix == ".py" and "tests" in path.parts
        ]
    headers = [
        path for path in files_below(Path(sysconfig.get_path("include"))) if path.suffix == ".h"
    ]
    if len(headers) < _MIN_INSTALLED_FILES:
        headers += [
            path for path in _package_files("numpy", "jaxlib") if path.suffix in (".h", ".hpp")
        ]
    domains = {"code": _python_files(tests=False), "tests": tests, "C": headers}
    found = (_installed_files(paths, domain) for domain, paths in domains.items())
    for one_of_each in itertools.zip_longest(*found, _language_reference()):
        yield from (document for document in one_of_each if document is not None)


def _python_files(tests: bool) -> list[Path]:
    """The standard library's sources, or its tests."""
    tables = {"encodings", "pydoc_data", "entities.py"}
    found = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in files_below(root, skip=("site-packages", "dist-packages")):
        names = set(path.relative_to(root).parts)
        if (
            path.suffix == ".py"
            and bool(names & {"test", "tests", "idle_test"}) == tests
            and not names & tables
        ):
            found.append(path)
    return [path for path in found if not path.name.startswith("_sysconfigdata")]


def _language_reference() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some slim builds leave it out
        return
    for name in sorted(topics):
        yield Document(topics[name], "English")


def _package_files(*names: str) -> Iterator[Path]:
    """Yield the files of installed packages without importing them."""
    for spec in map(importlib.util.find_spec, names):
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield from files_below(Path(folder))


def _installed_files(paths: Iterable[Path], domain: str) -> Iterator[Document]:
    """Yield the UTF-8 files that are neither large nor empty; tests of codecs have broken ones."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            text = read_text(path, _MAX_INSTALLED_BYTES)
            if text.strip():
                yield Document(text, domain)


def files_below(root: Path, skip: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield files below `root` by name, but no hidden ones, caches and folders of `skip`."""

    def fail(error: OSError):
        if error.filename != str(root) or root.exists():
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    try:
        for folder, folders, files in os.walk(root, onerror=fail):
            folders[:] = sorted(
                f for f in folders if not f.startswith(".") and f != "__pycache__" and f not in skip
            )
            yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))
    except RecursionError:  # of `os.walk` before Python 3.12
        raise ValueError(f"path={str(root)!r} has too many folders within each other") from None


# The user's files


def _documents_of(path: str, column: str) -> Iterator[Document]:
    """Yield the documents of one of `DataConfig.paths`."""
    empty = True
    for location, row, domain in rows_of(path, (column,)):
        text = row.get(column)
        if not isinstance(text, str):
            raise ValueError(
                f'{location}: "{column}" is {reprlib.repr(text)}, not a string, of '
                f"{sorted(row)!r:.200}"
            )
        for part in _split_long(text):
            empty = False
            yield Document(part, domain)
    if empty:
        raise ValueError(f"path={path!r} holds no text")


def rows_of(
    path: str, needed: Sequence[str], chats: bool = False
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Read the rows of one of `DataConfig.paths`: JSONL, Parquet, a dataset, or files of one text.

    Args:
        needed: keys; Parquet and datasets must have one of them. The first one is that of a file's
            text.
        chats: read `tools` and `functions`, too; pass over files other than JSONL and Parquet.
    Returns: triples of where the row is, for errors, the row, and its domain. That is the one that
        it states, else the first folder below the path or the file's suffix, for chats the file's
        name.
    Raises: ValueError that names the path, file or row.
    """
    also = ("domain", "tools", "functions") if chats else ("domain",)
    limit = _MAX_CHAT_BYTES if chats else _MAX_LINE_BYTES
    if is_dataset(path):
        name = Path(parts_of(path)[0]).name
        found = (
            (*located, name) for located in numbered(path, dataset_rows(path, needed, also), limit)
        )
    else:
        found = _rows_of_files(Path(path), needed, also, chats, limit)
    for location, row, domain in found:
        if not isinstance(row, dict):
            raise ValueError(f"{location}, is not an object")
        own = row.get("domain")
        if own is not None and (not isinstance(own, str) or len(own) > MAX_DOMAIN):
            raise ValueError(
                f'{location}: "domain" is {reprlib.repr(own)}, not a string of {MAX_DOMAIN} or less'
            )
        # For terminals, pictures and JSON: names may hold control codes and broken UTF-8.
        shown = (own or domain)[:MAX_DOMAIN]
        yield location, row, "".join(c if c.isprintable() else "\ufffd" for c in shown)


def _rows_of_files(
    root: Path, needed: Sequence[str], also: Sequence[str], chats: bool, limit: int
) -> Iterator[tuple[str, Any, str]]:
    if not root.exists():
        raise ValueError(f"path={str(root)!r} does not exist")
    for file in files_below(root) if root.is_dir() else (root,):
        if file.is_symlink() and not file.exists():
            print(f"passed over {str(file)!r}: a link that leads nowhere", file=sys.stderr)
            continue
        suffix = file.suffix.lower()
        folders = file.relative_to(root).parts[:-1]
        rows: Iterable[tuple[str, Any]] = ()
        try:
            check_regular(file)
            if suffix == ".jsonl":
                rows = json_lines(file, limit)
            elif suffix == ".parquet":
                rows = numbered(str(file), parquet_rows(file, needed, also), limit)
            elif not chats and not (root.is_dir() and _is_binary(file)):
                rows = [(str(file), {needed[0]: read_text(file, _MAX_TEXT_BYTES)})]
            for location, row in rows:
                yield (
                    location,
                    row,
                    file.stem if chats else folders[0] if folders else suffix[1:] or "text",
                )
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def _is_binary(path: Path) -> bool:
    with open_file(path) as file:
        return b"\0" in file.read(8192)  # git's rule for binary files


def json_lines(path: Path, limit: int) -> Iterator[tuple[str, Any]]:
    """Read a JSONL file; empty lines are passed over.

    Args: limit: bytes of a line, at most; a longer one is not read to its end.
    Returns: pairs of a value and where it is, for errors: (`FILE, line N`, value).
    Raises: ValueError for a line that is not UTF-8 or not JSON.
    """
    with open_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(limit + 1), b""), 1):
            if len(line) > limit:
                raise ValueError(f"{path}, line {number}, is longer than {limit:,} bytes")
            try:
                if line.strip():
                    yield f"{path}, line {number}", parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error


def parquet_rows(
    path: Path, needed: Sequence[str], also: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Read a Parquet file row by row.

    Args: needed, also: columns to read; one of `needed` must be there.
    Raises: ValueError without the columns or pyarrow; errors of many kinds for a file that is
        damaged or not Parquet.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("it needs pyarrow: pip install 'dsv3-jax[parquet]'") from error
    with pyarrow.parquet.ParquetFile(path) as file:
        names = set(file.schema_arrow.names)
        if not names & set(needed):
            raise ValueError(f"there is no column {needed[0]!r} among {sorted(names)}")
        num_rows = 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=sorted(names & {*needed, *also})):
            num_rows += batch.num_rows
            for i in range(batch.num_rows):  # one by one: each may hold megabytes
                yield from batch.slice(i, 1).to_pylist()
        if num_rows != file.metadata.num_rows:
            raise ValueError(f"the file says that it has {file.metadata.num_rows:,} rows")


def _split_long(text: str) -> Iterable[str]:
    """Cut a long text at line ends; an empty text gives no part."""
    start = 0
    while start < len(text):
        end = start + _MAX_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        if not text[start:end].isspace():
            yield text[start:end]
        start = end
