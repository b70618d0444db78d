"""Documents: their text, their domain, and their side of the split into training and validation.

The default corpus is the text that this Python installation contains, so no download is needed.
"""

import hashlib
import itertools
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from dsv3_jax.config import DataConfig
from dsv3_jax.data.installed import installed_texts
from dsv3_jax.data.manifest import MANIFEST
from dsv3_jax.data.text_files import rows_of_path

T = TypeVar("T")

# longer texts are cut, so that tokenising one, or resuming in it, takes little time
_MAX_CHARACTERS = 2**18


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
        sums = {domain: [0, 0] for domain in self.domains}  # training, validation
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
        >>> from pathlib import Path
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

    # A text's side depends on its hash alone, so other texts that come or go do not move it.
    digests = [
        hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest() for text, _ in documents
    ]
    train, val, fingerprint = split(documents, digests, cfg.val_fraction)
    domains = dict.fromkeys(document.domain for document in documents)
    return Corpus(tuple(train), tuple(val), tuple(domains), fingerprint)


def read_documents(paths: Sequence[str], text_column: str = "text") -> Iterator[Document]:
    """Yield documents as `load_corpus` reads them, one by one: memory does not grow with them.

    Args: text_column: the key of JSONL and the column of Parquet with the text.
    Raises: ValueError as `load_corpus`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.jsonl").write_text('{"body": "x = 1", "domain": "code"}')
        ...     list(read_documents([folder], text_column="body"))
        [Document(text='x = 1', domain='code')]
    """
    if not paths:
        return itertools.starmap(Document, installed_texts())
    return itertools.chain.from_iterable(_documents_of(path, text_column) for path in paths)


def _documents_of(path: str, column: str) -> Iterator[Document]:
    """Yield the documents of one of `DataConfig.paths`."""
    if (Path(path) / MANIFEST).is_file() and any(Path(path).glob("*.array_record")):
        raise ValueError(f"path={path!r} is a folder of shards; read it by --data.format shards")
    empty = True
    for location, row, domain in rows_of_path(path, (column,)):
        if column not in row:
            raise ValueError(
                f'{location}: no key "{column}" is among {sorted(row)!r:.200}; name one by '
                "data.text_column; `dsv3 train sft` learns chats"
            )
        text = row[column]
        if not isinstance(text, str):
            raise ValueError(
                f'{location}: "{column}" is {reprlib.repr(text)}, not a string; the keys are '
                f"{sorted(row)!r:.200}"
            )

        # The parts of a long text are documents of one domain; white space alone is none.
        for part in _split_long(text):
            empty = False
            yield Document(part, domain)
    if empty:
        raise ValueError(f"path={path!r} holds no text")


def _split_long(text: str) -> Iterable[str]:
    """Cut a long text at line ends; an empty text gives no part."""
    start = 0
    while start < len(text):
        # The last line end within reach; a line that is longer is cut where the part ends.
        end = start + _MAX_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        if not text[start:end].isspace():
            yield text[start:end]
        start = end


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
    # Hashes are uniform, so a fraction of them is below the threshold; at least the smallest is.
    threshold = max(int(fraction * 2**64), int.from_bytes(min(digests)) + 1)
    sides: tuple[list[T], list[T]] = [], []
    for text, digest in zip(texts, digests, strict=True):
        sides[int.from_bytes(digest) < threshold].append(text)

    if not sides[0]:
        distinct = f"{len(texts)} in all, {len(set(digests))} of them distinct"
        raise ValueError(
            f"val_fraction={fraction} leaves no text for training: there are {distinct}; add "
            "texts, or divide this one into several files or rows of JSONL"
        )
    trained = (digest for digest in digests if int.from_bytes(digest) >= threshold)
    return *sides, fingerprint_of(trained)


def fingerprint_of(digests: Iterable[bytes]) -> str:
    """Return a hash of hashes in their order."""
    order = hashlib.blake2b(digest_size=8)
    for digest in digests:
        order.update(digest)
    return order.hexdigest()
