"""Packed token batches: documents are cut into pieces, shuffled, tokenised, laid end to end and cut into rows of T.

Training never ends and resumes exactly from two numbers; validation is a fixed list. Reading is in `corpus`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import grain
import jax
import numpy as np
from jaxtyping import Int32

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import Corpus, Document, load_corpus
from dsv3_jax.data.tokenizer import Tokenizer

__all__ = ["Batch", "Corpus", "Document", "TrainBatches", "check_vocab", "load_corpus", "train_batches", "val_batches"]

Tokens = Int32[np.ndarray, "_"]
PIECE_ROWS = 4  # characters of a piece, in rows of T tokens


class Batch(TypedDict):
    """Arrays of one shape, int32 [B, T].

    tokens: each document is followed by the tokenizer's eos.
    segment_ids: documents of a row count 1, 2, …; 0 is padding, which only validation has.
    positions: start at 0 with each document of a row. Without `separate_documents` they run 0 … T-1 and segment_ids
        are all 1.
    domains: index into `Corpus.domains`.
    documents: index into `Corpus.train`, of validation into `Corpus.val`.
    """

    tokens: Int32[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    domains: Int32[np.ndarray, "B T"]
    documents: Int32[np.ndarray, "B T"]


class Piece(NamedTuple):
    """Tokens of one document, to be laid beside others."""

    tokens: Tokens
    domain: int
    document: int


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises: ValueError when the tokenizer has ids that a model of `vocab_size` has not."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab_size={vocab_size}")


def train_batches(
    corpus: Corpus, tokenizer: Tokenizer, cfg: DataConfig, rows: Sequence[int] | np.ndarray | None = None
) -> "TrainBatches":
    """Endless training batches [R, T]: of each global batch those `rows` that this process holds; None is all B.

    Raises: ValueError when a row is not of the batch, or fill-in-the-middle is asked of a tokenizer without its
        specials.
    """
    return TrainBatches(corpus, tokenizer, cfg, np.arange(cfg.batch_size) if rows is None else np.asarray(rows))


class TrainBatches(Iterator[Batch]):
    """Iterator of `train_batches`. Its place is (piece of the endless shuffled order, token within it).

    A document longer than some rows is cut into pieces that are shuffled apart, so that a batch is never a single
    document's; only its last piece ends in eos. Fill-in-the-middle takes a piece for a document.

    Every process lays out the global batch and keeps its rows: tokenising is cheap beside training, and all processes
    then share one state, which also holds for another number of processes. Grain gives the order: a new shuffle each
    epoch at random access, and a random generator for each place in it.
    Grain's own ConcatThenSplit is not used: its state does not survive JSON (it tells slices by tuples).
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, cfg: DataConfig, rows: np.ndarray):
        if not all(0 <= row < cfg.batch_size for row in rows):
            raise ValueError(f"rows {rows.tolist()} are not all within batch_size={cfg.batch_size}")
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
        self._move(0, 0)

    def __next__(self) -> Batch:
        missing = self._cfg.batch_size * self._cfg.seq_len
        pieces = []
        while missing:
            tokens = self._current.tokens[self._offset : self._offset + missing]
            pieces.append(self._current._replace(tokens=tokens))
            missing -= len(tokens)
            self._offset += len(tokens)
            if self._offset == len(self._current.tokens):
                self._move(self._piece + 1, 0)
        batch = _lay_out(pieces, self._cfg.batch_size, self._cfg)
        mine = self._rows
        return Batch(
            tokens=batch["tokens"][mine],
            segment_ids=batch["segment_ids"][mine],
            positions=batch["positions"][mine],
            domains=batch["domains"][mine],
            documents=batch["documents"][mine],
        )

    def get_state(self) -> dict[str, Any]:
        """Where the next batch begins, as plain JSON."""
        return {**self._source, "piece": self._piece, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`'s place, in a constant time.

        Raises: ValueError when the state was taken over another corpus or seed.
        """
        for name, mine in self._source.items():
            if state[name] != mine:
                raise ValueError(f"data state was saved with {name}={state[name]!r}, this run has {mine!r}")
        self._move(state["piece"], state["offset"])

    def _move(self, piece: int, offset: int) -> None:
        self._piece, self._offset = piece, offset
        current = self._pieces[piece]
        assert current is not None  # Grain's mark of a filtered element; nothing is filtered
        self._current = current


def _pieces(documents: Sequence[Document], size: int) -> list[tuple[int, int, int]]:
    """(document, start, stop) of pieces of about `size` characters, cut at line ends where there are some."""
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
    """The validation set: rows of each domain in turn, drawn from as many documents as there are.

    A document gives one window of T tokens, from a place drawn with a fixed seed, and a second one only when every
    document of its domain gave one: a few batches then represent everything. No text is repeated and nothing is
    filled in the middle. Small corpora give fewer batches; what is left of the last one is padding (segment 0).
    """
    streams = [_val_rows(corpus, i, tokenizer, cfg) for i in range(len(corpus.domains))]
    turns = itertools.zip_longest(*streams)
    rows = (row for turn in turns for row in turn if row is not None)
    rows = list(itertools.islice(rows, num_batches * cfg.batch_size))
    rows += [_lay_out([], 1, cfg)] * (-len(rows) % cfg.batch_size)
    groups = (rows[i : i + cfg.batch_size] for i in range(0, len(rows), cfg.batch_size))
    return [jax.tree.map(lambda *parts: np.concatenate(parts), *group) for group in groups]


def _val_rows(corpus: Corpus, domain: int, tokenizer: Tokenizer, cfg: DataConfig) -> Iterator[Batch]:
    """Rows [1, T] of one domain; the last may end in padding."""
    texts = {i: d.text for i, d in enumerate(corpus.val) if d.domain == corpus.domains[domain]}
    pieces, room = [], cfg.seq_len
    for document, window in _windows(texts, tokenizer, cfg.seq_len):
        while len(window):
            pieces.append(Piece(window[:room], domain, document))
            window, room = window[room:], room - len(pieces[-1].tokens)
            if not room:
                yield _lay_out(pieces, 1, cfg)
                pieces, room = [], cfg.seq_len
    if pieces:
        yield _lay_out(pieces, 1, cfg)


def _windows(texts: dict[int, str], tokenizer: Tokenizer, length: int) -> Iterator[tuple[int, Tokens]]:
    """Every token of every text once, in windows of `length`: one of each text, then the next of each, in turn.

    Each comes with its text's key.
    """
    rng = np.random.default_rng(0)
    keys, open_texts = list(texts), []  # (key, windows, index of the first one)
    for i in rng.permutation(len(texts)):
        tokens = _encode(texts[keys[i]], tokenizer)
        windows = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        first = int(rng.integers(len(windows)))
        yield keys[i], windows[first]
        open_texts.append((keys[i], windows, first))
    for turn in itertools.count(1):
        open_texts = [text for text in open_texts if len(text[1]) > turn]
        if not open_texts:
            return
        for key, windows, first in open_texts:
            yield key, windows[(first + turn) % len(windows)]


def _encode(text: str, tokenizer: Tokenizer) -> Tokens:
    return np.append(tokenizer.encode_array(text), np.int32(tokenizer.eos_id))


def _fill_in_the_middle(
    text: str, tokenizer: Tokenizer, fim_ids: tuple[int, int, int], rng: np.random.Generator
) -> Tokens:
    """<prefix> pre <suffix> suf <middle> mid <eos>, cut at two characters drawn evenly (PSM, arXiv 2207.14255)."""
    start, end = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    parts = (text[:start], text[end:], text[start:end])
    ids = [part for special, words in zip(fim_ids, parts, strict=True)
           for part in (np.array([special], np.int32), tokenizer.encode_array(words))]  # fmt: skip
    return np.concatenate([*ids, np.array([tokenizer.eos_id], np.int32)])


def _lay_out(pieces: list[Piece], rows: int, cfg: DataConfig) -> Batch:
    """Lay pieces end to end over `rows` rows of T; what they leave open is padding.

    Each piece is a segment, and so is what of it goes on in the next row.
    """
    shape = (rows, cfg.seq_len)
    tokens, domains, documents, starts = np.zeros((4, rows * cfg.seq_len), np.int32)
    end = 0
    for piece in pieces:
        begin, end = end, end + len(piece.tokens)
        tokens[begin:end], domains[begin:end], documents[begin:end] = piece
        starts[begin] = 1
    columns = np.broadcast_to(np.arange(cfg.seq_len, dtype=np.int32), shape)
    real = np.arange(rows * cfg.seq_len).reshape(shape) < end
    starts = starts.reshape(shape)
    if not cfg.separate_documents:
        starts[:] = 0
    starts[:, 0] = 1
    segment_ids = np.cumsum(starts, axis=1, dtype=np.int32)
    positions = columns - np.maximum.accumulate(np.where(starts == 1, columns, np.int32(0)), axis=1)
    return Batch(
        tokens=tokens.reshape(shape),
        segment_ids=np.where(real, segment_ids, np.int32(0)),
        positions=np.where(real, positions, np.int32(0)),
        domains=domains.reshape(shape),
        documents=documents.reshape(shape),
    )
