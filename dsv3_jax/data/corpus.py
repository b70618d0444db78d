"""Documents: their text, their domain, and their side of the split into training and validation.

The default corpus is the text that this Python installation contains, so no download is needed.
"""

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
from typing import Any, NamedTuple

from dsv3_jax.config import DataConfig
from dsv3_jax.data.hub import dataset_rows, is_dataset, parts_of
from dsv3_jax.files import check_regular, parse_json

_MAX_CHARACTERS = 2**18  # longer texts are cut, so that tokenising one, or resuming in it, takes little time
_MAX_TEXT_BYTES = 2**31  # of a file that is one text
_MAX_LINE_BYTES = 2**28  # of a line of JSONL
_MAX_DOMAIN = 200  # characters of a domain's name
_MIN_INSTALLED_FILES = 100  # of a domain; below it other packages' files are added: Debian moves headers and tests away
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
        >>> train, val = (Document("ab", "text"), Document("x = 1", "code")), (Document("é", "text"),)
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
    It leaves out character tables (`encodings`, `html/entities.py`), build settings, files above 256 KiB, and files
    that are not UTF-8.

    A path is a file or a folder. `.jsonl` has an object in each line, with "text" and optionally "domain". `.parquet`
    has columns of these names. `cfg.text_column` is another name of "text". Any other file is one document. Hidden and
    binary files of a folder are skipped. `hf:NAME` is a dataset of Hugging Face, see `hub`.
    A document's domain is the one it states, else the first folder below the path, else the file's suffix.
    Texts above 2^18 characters are cut at line ends into several documents.

    Equal texts are on the same side. If no hash selects a text for validation, the text with the smallest hash is used.

    Raises: ValueError naming a path that is absent, empty, unreadable or malformed; or when the documents are too few
        for two sides.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for i in range(4):
        ...         _ = (Path(folder) / f"{i}.txt").write_text(f"document {i}")
        ...     corpus = load_corpus(DataConfig(paths=(folder,)))
        >>> len(corpus.train), len(corpus.val), corpus.domains
        (3, 1, ('txt',))
    """
    documents = list(itertools.islice(read_documents(cfg.paths, cfg.text_column), cfg.max_documents))
    if not documents:
        raise ValueError("this Python installation holds no document; give paths of files or folders with text")
    digests = [hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest() for text, _ in documents]
    is_val = held_out(digests, cfg.val_fraction)
    train = tuple(d for d, v in zip(documents, is_val, strict=True) if not v)
    val = tuple(d for d, v in zip(documents, is_val, strict=True) if v)
    if not train:
        raise ValueError(
            f"val_fraction={cfg.val_fraction} leaves no text for training: there are {len(documents)} document(s) with "
            f"{len(set(digests))} distinct text(s); add text"
        )
    fingerprint = fingerprint_of(digest for digest, v in zip(digests, is_val, strict=True) if not v)
    return Corpus(train, val, tuple(dict.fromkeys(d.domain for d in documents)), fingerprint)


def read_documents(paths: Sequence[str], text_column: str = "text") -> Iterator[Document]:
    """Yield documents as `load_corpus` reads them, one by one: the memory does not depend on their number.

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


def held_out(digests: list[bytes], fraction: float) -> list[bool]:
    """Say by hashes of 8 bytes which texts are held out for validation: about a fraction, and at least one.

    Example:
        >>> held_out([bytes(8), b"\\xff" * 8, b"\\x7f" * 8], fraction=0.01)
        [True, False, False]
    """
    threshold = max(int(fraction * 2**64), int.from_bytes(min(digests)) + 1)
    return [int.from_bytes(digest) < threshold for digest in digests]


def fingerprint_of(digests: Iterable[bytes]) -> str:
    """Return a hash of hashes in their order."""
    order = hashlib.blake2b(digest_size=8)
    for digest in digests:
        order.update(digest)
    return order.hexdigest()


# The text of a Python installation


def _installed_documents() -> Iterator[Document]:
    """Alternate between the domains, so that `max_documents` keeps some of each."""
    domains = (_python_files(tests=False), _python_files(tests=True), _c_headers(), _language_reference())
    for one_of_each in itertools.zip_longest(*domains):
        yield from (document for document in one_of_each if document is not None)


def _python_files(tests: bool) -> Iterator[Document]:
    """Yield the standard library's sources, or its tests."""
    tables = {"encodings", "pydoc_data", "entities.py"}
    count = 0
    root = Path(sysconfig.get_path("stdlib"))
    for path in files_below(root, skip=("site-packages", "dist-packages")):
        names = set(path.relative_to(root).parts)
        if path.suffix == ".py" and bool(names & {"test", "tests", "idle_test"}) == tests and not names & tables:
            if not path.name.startswith("_sysconfigdata"):
                for document in _installed_file(path, "tests" if tests else "code"):
                    count += 1
                    yield document
    if tests and count < _MIN_INSTALLED_FILES:
        for path in itertools.chain.from_iterable(map(_package_files, ("numpy", "scipy"))):
            if path.suffix == ".py" and "tests" in path.parts:
                yield from _installed_file(path, "tests")


def _c_headers() -> Iterator[Document]:
    headers = [path for path in files_below(Path(sysconfig.get_path("include"))) if path.suffix == ".h"]
    if len(headers) < _MIN_INSTALLED_FILES:
        packages = itertools.chain.from_iterable(map(_package_files, ("numpy", "jaxlib")))
        headers += [path for path in packages if path.suffix in (".h", ".hpp")]
    for path in headers:
        yield from _installed_file(path, "C")


def _language_reference() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some slim builds leave it out
        return
    for name in sorted(topics):
        yield Document(topics[name], "English")


def _package_files(name: str) -> Iterator[Path]:
    """Yield the files of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from files_below(Path(folder))


def _installed_file(path: Path, domain: str) -> Iterator[Document]:
    """Yield the file as a document unless it is large, empty or not UTF-8; tests of codecs contain broken files."""
    try:
        text = path.read_bytes().decode("utf-8") if path.stat().st_size <= _MAX_INSTALLED_BYTES else ""
    except (OSError, UnicodeDecodeError):
        return
    if text.strip():
        yield Document(text, domain)


def files_below(root: Path, skip: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield files below `root` in order of name, without hidden files, compiled caches and folders named in `skip`."""

    def fail(error: OSError):
        if error.filename != str(root) or root.exists():
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__" and f not in skip)
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


# The user's files


def _documents_of(path: str, column: str) -> Iterator[Document]:
    """Yield the documents of one of `DataConfig.paths`."""
    empty = True
    for text, domain in _texts_of_dataset(path, column) if is_dataset(path) else _texts_of(path, column):
        for part in _split_long(text):
            empty = False
            yield Document(part, _printable(domain))
    if empty:
        raise ValueError(f"path={path!r} holds no text")


def _texts_of(path: str, column: str) -> Iterator[tuple[str, str]]:
    root = Path(path)
    if not root.exists():
        raise ValueError(f"path={path!r} does not exist")
    wanted = {"needed": (column,), "also": ("domain",)}
    for file in user_files(root) if root.is_dir() else (root,):
        check_regular(file)
        parts = file.relative_to(root).parts if root.is_dir() else ()
        domain, suffix = parts[0] if len(parts) > 1 else file.suffix[1:].lower() or "text", file.suffix.lower()
        try:
            if suffix in (".jsonl", ".parquet"):
                for location, row in json_lines(file) if suffix == ".jsonl" else parquet_rows(file, **wanted):
                    yield _checked(row, column, domain, location)
            elif not root.is_dir() or not _is_binary(file):
                check_regular(file, _MAX_TEXT_BYTES)
                yield _utf8(file.read_bytes(), file), domain
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def _texts_of_dataset(path: str, column: str) -> Iterator[tuple[str, str]]:
    domain = Path(parts_of(path)[0]).name
    for location, row in dataset_rows(path, needed=(column,), also=("domain",)):
        yield _checked(row, column, domain, location)


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)  # git's rule for binary files


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Read a JSONL file; empty lines are passed over.

    Returns: pairs of a value and where it is, for errors: (`FILE, line N`, value).
    Raises: ValueError for a line that is not UTF-8 or not JSON.
    """
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > _MAX_LINE_BYTES:
                raise ValueError(f"{path}, line {number}, is longer than {_MAX_LINE_BYTES:,} bytes")
            text = _utf8(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = parse_json(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
            yield f"{path}, line {number}", record


def parquet_rows(path: Path, needed: Sequence[str], also: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a Parquet file row by row.

    Args: needed, also: columns to read; one of `needed` must be there.
    Returns: pairs as `json_lines`.
    Raises: ValueError for a file that is not Parquet, has none of the columns, or without pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path} needs pyarrow, which is not installed; run pip install 'dsv3-jax[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            if not names & set(needed):
                raise ValueError(f'{path} has no column "{needed[0]}" among {sorted(names)}')
            row = 0
            for batch in file.iter_batches(columns=sorted(names & {*needed, *also})):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", record
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error


def _checked(row: Any, column: str, default: str, location: str) -> tuple[str, str]:
    """A row's text and domain."""
    if not isinstance(row, dict) or column not in row:
        found = f"; it has {reprlib.repr(sorted(row))}" if isinstance(row, dict) else ""
        raise ValueError(f'{location}, is not an object with "{column}"{found}')
    text, domain = row[column], row.get("domain")
    if not isinstance(text, str):
        raise ValueError(f'{location}: "{column}" is {reprlib.repr(text)}, not a string')
    if domain is not None and (not isinstance(domain, str) or len(domain) > _MAX_DOMAIN):
        raise ValueError(f'{location}: "domain" is {reprlib.repr(domain)}, not a string of {_MAX_DOMAIN} or less')
    return text, domain or default


def user_files(root: Path) -> Iterator[Path]:
    """Yield the files of a folder, and say on stderr which links lead nowhere."""
    dangling = []
    for file in files_below(root):
        if file.is_symlink() and not file.exists():
            dangling.append(file)
        else:
            yield file
    if dangling:
        print(
            f"path={str(root)!r}: passed over {len(dangling)} links that lead nowhere, such as {dangling[0].name!r}",
            file=sys.stderr,
        )


def _printable(domain: str) -> str:
    """A domain's name on a terminal, in pictures and in JSON: file names may hold control codes and broken UTF-8."""
    return "".join(c if c.isprintable() else "\ufffd" for c in domain)


def _utf8(data: bytes, path: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise ValueError(f"{path} is not UTF-8: byte {position} is 0x{data[error.start]:02x}") from error


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
