"""Packed token batches: documents are cut into pieces, shuffled, tokenised, concatenated and cut into rows of T tokens.

Training batches never end and resume exactly from two numbers. Validation is a fixed list. `corpus` reads documents.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import grain
import jax
import numpy as np
from jaxtyping import Bool, Int32

from dsv3_jax.config import DataConfig, replace
from dsv3_jax.data.corpus import Corpus, Document, load_corpus
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.tokenizer import load as load_tokenizer

__all__ = [
    "Batch", "Corpus", "Document", "Piece", "TrainBatches", "check_position", "check_rows", "check_vocab",
    "held_out_prompts", "load_corpus", "model_inputs", "one_row", "pack", "train_batches", "val_batches",
]  # fmt: skip

Tokens = Int32[np.ndarray, "_"]
PIECE_ROWS = 4  # characters of a piece, in units of T


class Batch(TypedDict):
    """Arrays of one shape, int32 [B, T]; loss_mask is bool.

    tokens: The tokenizer's eos follows each document.
    segment_ids: A row's documents are 1, 2, …; 0 is padding, which only validation has.
    positions: They count from 0 in each document of a row. Without `separate_documents` they are 0 … T-1, and all
        segment_ids are 1.
    domains: index into `Corpus.domains`.
    documents: index into `Corpus.train`, or `Corpus.val` for validation.
    loss_mask: tokens that count as targets of the losses. Without it all do.
    """

    tokens: Int32[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    domains: Int32[np.ndarray, "B T"]
    documents: Int32[np.ndarray, "B T"]
    loss_mask: NotRequired[Bool[np.ndarray, "B T"]]


def model_inputs(batch: Batch) -> dict[str, np.ndarray]:
    """Return the arrays of a batch that the model and its losses read.

    Example:
        >>> a = np.ones((1, 2), np.int32)
        >>> list(model_inputs(Batch(tokens=a, segment_ids=a, positions=a, domains=a, documents=a)))
        ['tokens', 'segment_ids', 'positions']
    """
    arrays = {"tokens": batch["tokens"], "segment_ids": batch["segment_ids"], "positions": batch["positions"]}
    return arrays | ({"loss_mask": batch["loss_mask"]} if "loss_mask" in batch else {})


def one_row(tokens: Sequence[int], domain: int = 0) -> Batch:
    """Return a batch of one row that holds one document, as the measures of a model take it.

    Example:
        >>> batch = one_row(b"x = 1")
        >>> batch["tokens"].tolist(), batch["positions"].tolist()
        ([[120, 32, 61, 32, 49]], [[0, 1, 2, 3, 4]])
    """
    ids = np.array([list(tokens)], np.int32)
    zeros, positions = np.zeros_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None]
    return Batch(tokens=ids, segment_ids=zeros + 1, positions=positions, domains=zeros + domain, documents=zeros)


def check_rows(rows: np.ndarray, cfg: DataConfig) -> None:
    """Check that a process's rows are in the global batch.

    Raises: ValueError when one is not.

    Example:
        >>> check_rows(np.arange(2), DataConfig(batch_size=2))
    """
    if not all(0 <= row < cfg.batch_size for row in rows):
        raise ValueError(f"rows={rows.tolist()} are not all in the batch; give rows from 0 to {cfg.batch_size - 1}")


def check_position(source: dict[str, Any], state: dict[str, Any]) -> None:
    """Check that a saved data position belongs to the data that is read.

    Args: source: what identifies the data; state: the position, which has the same keys.
    Raises: ValueError when a key differs.

    Example:
        >>> check_position({"seed": 0}, {"seed": 0, "row": 7})
    """
    for name, value in source.items():
        if state.get(name) != value:
            raise ValueError(
                f"{name}={value!r} differs from {name}={state.get(name)!r} of the saved data position; resume with the "
                "same data"
            )


class Piece(NamedTuple):
    """Tokens of one document, or of a part of it."""

    tokens: Tokens
    domain: int
    document: int


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a model of `vocab_size` has every id of the tokenizer.

    Raises: ValueError when it does not.

    Example:
        >>> check_vocab(load_tokenizer("bytes"), vocab_size=256)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: vocab_size=256 is below the tokenizer's 260 ids; ...
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is below the tokenizer's {tokenizer.vocab_size} ids; increase the model's "
            "vocab_size or choose another tokenizer"
        )


def train_batches(
    corpus: Corpus, tokenizer: Tokenizer, cfg: DataConfig, rows: Sequence[int] | np.ndarray | None = None
) -> "TrainBatches":
    """Iterate over endless training batches [R, T].

    Args: rows: the R rows of each global batch that this process holds. None means all B.
    Raises: ValueError when a row is outside the batch, or `fim_rate` needs specials that the tokenizer lacks.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> corpus = Corpus((Document("ab", "text"),), (), ("text",), "")
        >>> batch = next(train_batches(corpus, ByteTokenizer(), DataConfig(seq_len=4, batch_size=1)))
        >>> batch["tokens"].tolist(), batch["segment_ids"].tolist()
        ([[97, 98, 256, 97]], [[1, 1, 1, 2]])
    """
    return TrainBatches(corpus, tokenizer, cfg, np.arange(cfg.batch_size) if rows is None else np.asarray(rows))


class TrainBatches(Iterator[Batch]):
    """Iterator of `train_batches`. Its state is a piece of the endless shuffled order and a token in that piece.

    A document longer than a few rows is cut into pieces that are shuffled separately, so that no batch is one document.
    Only its last piece ends in eos. Fill-in-the-middle treats a piece as a document.

    Every process packs the global batch and keeps its rows, because tokenising is cheap compared with training. All
    processes then share one state, which is also valid for another number of processes. Grain gives the order: a new
    shuffle each epoch with random access, and a random generator for each piece.
    Grain's ConcatThenSplit is not used: its state does not survive JSON, because it identifies slices by tuples.

    Example:
        >>> corpus = Corpus((Document("abcdef", "text"),), (), ("text",), "")
        >>> batches = train_batches(corpus, load_tokenizer("bytes"), DataConfig(seq_len=4, batch_size=1))
        >>> _, position = next(batches), batches.get_state()
        >>> position["piece"], position["offset"]  # of "abcdef" and its eos 4 tokens are read
        (0, 4)
        >>> second = next(batches)["tokens"].tolist()
        >>> batches.set_state(position)
        >>> next(batches)["tokens"].tolist() == second
        True
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, cfg: DataConfig, rows: np.ndarray):
        check_rows(rows, cfg)
        fim_ids = tokenizer.fim_ids if cfg.fim_rate else None
        domain_ids = {domain: i for i, domain in enumerate(corpus.domains)}

        def tokenise(piece: tuple[int, int, int], rng: np.random.Generator) -> Piece:
            document, start, stop = piece
            text, domain = corpus.train[document]
            part = text[start:stop]
            if fim_ids and rng.random() < cfg.fim_rate:
                tokens = _fill_in_the_middle(part, tokenizer, fim_ids, rng)
            elif stop < len(text):
                tokens = tokenizer.encode_array(part)
            else:
                tokens = _encode(part, tokenizer)
            return Piece(tokens, domain_ids[domain], document)

        pieces = _pieces(corpus.train, PIECE_ROWS * cfg.seq_len)
        order = grain.MapDataset.source(pieces).seed(cfg.seed % 2**32).shuffle().repeat()
        self._pieces = order.random_map(tokenise)
        self._cfg, self._rows = cfg, rows
        self._source: dict[str, Any] = {"corpus": corpus.fingerprint, "seed": cfg.seed, "seq_len": cfg.seq_len}
        self._seek(0, 0)

    def __next__(self) -> Batch:
        missing = self._cfg.batch_size * self._cfg.seq_len
        pieces = []
        while missing:
            tokens = self._current.tokens[self._offset : self._offset + missing]
            pieces.append(self._current._replace(tokens=tokens))
            missing -= len(tokens)
            self._offset += len(tokens)
            if self._offset == len(self._current.tokens):
                self._seek(self._piece + 1, 0)
        batch, rows = pack(pieces, self._cfg.batch_size, self._cfg), self._rows
        return Batch(
            tokens=batch["tokens"][rows],
            segment_ids=batch["segment_ids"][rows],
            positions=batch["positions"][rows],
            domains=batch["domains"][rows],
            documents=batch["documents"][rows],
        )

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch as plain JSON."""
        return {**self._source, "piece": self._piece, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a state of `get_state`, in constant time.

        Raises: ValueError when the state belongs to another corpus, seed or sequence length.
        """
        check_position(self._source, state)
        self._seek(state["piece"], state["offset"])

    def _seek(self, piece: int, offset: int) -> None:
        self._piece, self._offset = piece, offset
        current = self._pieces[piece]
        assert current is not None  # Grain returns None for filtered elements, and nothing is filtered
        self._current = current


def _pieces(documents: Sequence[Document], size: int) -> list[tuple[int, int, int]]:
    """List (document, start, stop) of pieces of about `size` characters, cut at line ends where possible."""
    pieces = []
    for i, (text, _) in enumerate(documents):
        start = 0
        while len(text) - start > 1.5 * size:
            stop = text.rfind("\n", start + size // 2, start + size) + 1 or start + size
            pieces.append((i, start, stop))
            start = stop
        pieces.append((i, start, len(text)))
    return pieces


def val_batches(corpus: Corpus, tokenizer: Tokenizer, cfg: DataConfig, num_batches: int) -> list[Batch]:
    """Return the validation set: rows that alternate between domains, from as many documents as possible.

    A document gives one window of T tokens at a random position from a fixed seed. It gives a second one only after
    every document of its domain gave one, so that a few batches represent all documents. No text is repeated, and
    nothing is filled in the middle.

    Args: num_batches: the most to return. A small corpus gives fewer, and the last one may end in padding (segment 0).

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> corpus = Corpus((), (Document("ab", "text"),), ("text",), "")
        >>> [batch] = val_batches(corpus, ByteTokenizer(), DataConfig(seq_len=4, batch_size=1), 8)
        >>> batch["tokens"].tolist(), batch["segment_ids"].tolist()
        ([[97, 98, 256, 0]], [[1, 1, 1, 0]])
    """
    streams = [_val_rows(corpus, i, tokenizer, cfg) for i in range(len(corpus.domains))]
    rounds = itertools.zip_longest(*streams)
    rows = (row for one_of_each in rounds for row in one_of_each if row is not None)
    rows = list(itertools.islice(rows, num_batches * cfg.batch_size))
    rows += [pack([], 1, cfg)] * (-len(rows) % cfg.batch_size)
    groups = (rows[i : i + cfg.batch_size] for i in range(0, len(rows), cfg.batch_size))
    return [jax.tree.map(lambda *parts: np.concatenate(parts), *group) for group in groups]


def held_out_prompts(cfg: DataConfig, batch: int, context: int) -> list[list[int]]:
    """Cut prompts of `context` tokens from held-out text; each starts with another document if there are enough.

    A document that is too short continues with the next one. For chats and shards the default text is read.

    Raises: ValueError if the held-out text has fewer tokens than one prompt.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for i in range(4):
        ...         _ = pathlib.Path(folder, f"{i}.txt").write_text(f"document {i}")
        ...     [prompt] = held_out_prompts(DataConfig(paths=(folder,)), batch=1, context=8)
        >>> load_tokenizer("bytes").decode(prompt)
        'document'
    """
    if cfg.format != "text":
        cfg = replace(cfg, paths=(), format="text", chat_template=None, mixture=(), temperature=1.0)
    documents, tokenizer = load_corpus(cfg).val, load_tokenizer(cfg.tokenizer)
    prompts = []
    for i in range(batch):
        first, tokens = i * len(documents) // batch, []
        for document in [*documents[first:], *documents[:first]]:
            tokens += [*tokenizer.encode(document.text), tokenizer.eos_id]
            if len(tokens) >= context:
                break
        if len(tokens) < context:
            raise ValueError(
                f"context={context} is more than the {len(tokens)} tokens of the held-out text; use a shorter context"
            )
        prompts.append(tokens[:context])
    return prompts


def _val_rows(corpus: Corpus, domain: int, tokenizer: Tokenizer, cfg: DataConfig) -> Iterator[Batch]:
    """Yield rows [1, T] of one domain; the last may end in padding."""
    texts = {i: d.text for i, d in enumerate(corpus.val) if d.domain == corpus.domains[domain]}
    pieces, missing = [], cfg.seq_len
    for document, window in _windows(texts, tokenizer, cfg.seq_len):
        while len(window):
            pieces.append(Piece(window[:missing], domain, document))
            window, missing = window[missing:], missing - len(pieces[-1].tokens)
            if not missing:
                yield pack(pieces, 1, cfg)
                pieces, missing = [], cfg.seq_len
    if pieces:
        yield pack(pieces, 1, cfg)


def _windows(texts: dict[int, str], tokenizer: Tokenizer, length: int) -> Iterator[tuple[int, Tokens]]:
    """Yield (key, window) until every token of every text was in one window.

    Each round yields one window of `length` tokens of each text that has more.
    """
    rng = np.random.default_rng(0)
    keys, remaining = list(texts), []  # (key, windows, index of the first one)
    for i in rng.permutation(len(texts)):
        tokens = _encode(texts[keys[i]], tokenizer)
        windows = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        first = int(rng.integers(len(windows)))
        yield keys[i], windows[first]
        remaining.append((keys[i], windows, first))
    for num_yielded in itertools.count(1):
        remaining = [text for text in remaining if len(text[1]) > num_yielded]
        if not remaining:
            return
        for key, windows, first in remaining:
            yield key, windows[(first + num_yielded) % len(windows)]


def _encode(text: str, tokenizer: Tokenizer) -> Tokens:
    return np.append(tokenizer.encode_array(text), np.int32(tokenizer.eos_id))


def _fill_in_the_middle(
    text: str, tokenizer: Tokenizer, fim_ids: tuple[int, int, int], rng: np.random.Generator
) -> Tokens:
    """Return <prefix> pre <suffix> suf <middle> mid <eos>, cut at two uniformly random characters.

    Source: prefix-suffix-middle order of arXiv 2207.14255.
    """
    start, end = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    parts = (text[:start], text[end:], text[start:end])
    ids = [array for special, part in zip(fim_ids, parts, strict=True)
           for array in (np.array([special], np.int32), tokenizer.encode_array(part))]  # fmt: skip
    return np.concatenate([*ids, np.array([tokenizer.eos_id], np.int32)])


def pack(pieces: list[Piece], num_rows: int, cfg: DataConfig) -> Batch:
    """Concatenate pieces into rows of T tokens, and pad the end.

    Each piece is a segment. Its remainder in the next row is a segment of that row.

    Example:
        >>> piece = Piece(np.array([5, 6, 7], np.int32), domain=0, document=0)
        >>> pack([piece], 1, DataConfig(seq_len=4))["segment_ids"]
        array([[1, 1, 1, 0]], dtype=int32)
    """
    shape = (num_rows, cfg.seq_len)
    tokens, domains, documents, starts = np.zeros((4, num_rows * cfg.seq_len), np.int32)
    end = 0
    for piece in pieces:
        begin, end = end, end + len(piece.tokens)
        tokens[begin:end], domains[begin:end], documents[begin:end] = piece
        starts[begin] = 1
    columns = np.broadcast_to(np.arange(cfg.seq_len, dtype=np.int32), shape)
    valid = np.arange(num_rows * cfg.seq_len).reshape(shape) < end
    starts = starts.reshape(shape)
    if not cfg.separate_documents:
        starts[:] = 0
    starts[:, 0] = 1
    segment_ids = np.cumsum(starts, axis=1, dtype=np.int32)
    positions = columns - np.maximum.accumulate(np.where(starts == 1, columns, np.int32(0)), axis=1)
    return Batch(
        tokens=tokens.reshape(shape),
        segment_ids=np.where(valid, segment_ids, np.int32(0)),
        positions=np.where(valid, positions, np.int32(0)),
        domains=domains.reshape(shape),
        documents=documents.reshape(shape),
    )
