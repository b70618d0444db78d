"""Sources of batches: one interface over documents, chat examples and shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data import batches
from dsv3_jax.data.batches import Batch
from dsv3_jax.data.corpus import Corpus, load_corpus
from dsv3_jax.data.examples import load_examples
from dsv3_jax.data.shards import open_shards
from dsv3_jax.data.text_settings import TextSettings
from dsv3_jax.data.tokenizer import Tokenizer


@runtime_checkable  # tests check signatures when functions are called
class Batches(Iterator[Batch], Protocol):
    """Endless training batches that resume from a position."""

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch as plain JSON."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a position. Raises: ValueError when it belongs to other data."""
        ...


@runtime_checkable
class Source(Protocol):
    """Data to train and to measure on.

    Attributes:
        domains: names that `Batch.domains` indexes.
        fingerprint: a hash of what is trained on.
    """

    @property
    def domains(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    def describe(self) -> str:
        """Return one line on what there is."""
        ...

    def train_batches(self, rows: Sequence[int] | np.ndarray | None = None) -> Batches:
        """Iterate over training batches. Args: rows: of each global batch that this process holds; None means all."""
        ...

    def val_batches(self, num_batches: int) -> list[Batch]:
        """Return held-out batches, at most `num_batches`."""
        ...


@dataclass(frozen=True)
class Documents:
    """A corpus with its tokenizer: a `Source` in which every token is a target.

    Example:
        >>> from dsv3_jax.data.corpus import Document
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> corpus = Corpus((Document("ab", "text"),), (Document("c", "text"),), ("text",), "")
        >>> Documents(corpus, ByteTokenizer(), DataConfig()).describe()
        'text: text 0.0 MB; 0.00 MB of it held out'
    """

    corpus: Corpus
    tokenizer: Tokenizer
    cfg: DataConfig

    @property
    def domains(self) -> tuple[str, ...]:
        return self.corpus.domains

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def describe(self) -> str:
        sizes = self.corpus.sizes()
        parts = ", ".join(f"{name} {(train + val) / 1e6:.1f} MB" for name, (train, val) in sizes.items())
        return f"text: {parts}; {sum(val for _, val in sizes.values()) / 1e6:.2f} MB of it held out"

    def train_batches(self, rows: Sequence[int] | np.ndarray | None = None) -> Batches:
        return batches.train_batches(self.corpus, self.tokenizer, self.cfg, rows)

    def val_batches(self, num_batches: int) -> list[Batch]:
        return batches.val_batches(self.corpus, self.tokenizer, self.cfg, num_batches)


def training_bytes(source: Source) -> dict[str, float] | None:
    """Return the bytes of the training text by domain, or None where only the source knows its mix.

    Example:
        >>> from dsv3_jax.data.corpus import Document
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> corpus = Corpus((Document("ab", "text"),), (Document("c", "text"),), ("text",), "")
        >>> training_bytes(Documents(corpus, ByteTokenizer(), DataConfig()))
        {'text': 2.0}
    """
    if not isinstance(source, Documents):
        return None
    return {name: float(train) for name, (train, _) in source.corpus.sizes().items()}


def open_source(cfg: DataConfig, tokenizer: Tokenizer, text: TextSettings | None = None, quiet: bool = True) -> Source:
    """Read the data of a run.

    Args:
        text: how the model reads chats, needed for format="chat".
        quiet: print nothing while examples are encoded.
    Raises: ValueError as `load_corpus`, `load_examples` and `open_shards`.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> source = open_source(DataConfig(max_documents=8), ByteTokenizer())
        >>> source.domains[:2]
        ('code', 'tests')
    """
    if cfg.format == "shards":
        return open_shards(cfg, tokenizer)
    if cfg.format == "text":
        return Documents(load_corpus(cfg), tokenizer, cfg)
    assert text is not None
    return load_examples(cfg, text, quiet)
