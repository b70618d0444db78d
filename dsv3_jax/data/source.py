"""Open the data of a run: documents, which are packed in memory, or shards on disk."""

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Integer

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.data.batches import RowSequence, Source
from dsv3_jax.data.byte_tokenizer import Tokenizer
from dsv3_jax.data.corpus import Corpus, load_corpus
from dsv3_jax.data.packing import PackedRows, Piece
from dsv3_jax.data.shards import open_shards

Tokens = Integer[np.ndarray, " n"]
_FIM_ROWS = 4  # characters of a part that fill-in-the-middle rearranges, in units of T


def open_source(cfg: DataConfig, tokenizer: Tokenizer) -> Source:
    """Read the text or open the shards of a run.

    Chats need a template, see `chat.examples.load_examples`.

    Raises: ValueError as `load_corpus` and `open_shards`; ConfigError for chats.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> source = open_source(DataConfig(max_documents=8), ByteTokenizer())
        >>> source.domains[:2]
        ('code', 'tests')
    """
    if cfg.format == "chat":
        raise ConfigError(
            "data.format='chat' needs a model's template; pass "
            "source=chat.examples.load_examples(…)"
        )
    if cfg.format == "shards":
        return open_shards(cfg, tokenizer)
    return from_corpus(load_corpus(cfg), tokenizer, cfg)


def from_corpus(corpus: Corpus, tokenizer: Tokenizer, cfg: DataConfig) -> Source:
    """Pack documents in memory; every token is a target.

    Rows are cut once, from the documents in an order that depends on the seed. A document's tokens
    end in eos.

    Raises: ValueError when `fim_rate` needs specials that the tokenizer lacks.

    Example:
        >>> from dsv3_jax.data.corpus import Document
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> corpus = Corpus((Document("ab", "text"),), (Document("c", "text"),), ("text",), "")
        >>> source = from_corpus(corpus, ByteTokenizer(), DataConfig(seq_len=4, batch_size=2))
        >>> train, val = next(source.train_batches()), source.val_batches(1)[0]
        >>> train["tokens"].tolist(), val["segment_ids"].tolist()
        ([[97, 98, 256, 0], [97, 98, 256, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]])
        >>> source.summary
        'text: text 0.0 MB; 0.00 MB of it held out'
    """
    if cfg.fim_rate:
        _ = tokenizer.fim_ids  # refuses

    def train() -> list[RowSequence]:
        pieces = _training_pieces(corpus, tokenizer, cfg)
        return [PackedRows(pieces, cfg.seq_len, separate=cfg.separate_documents)]

    def held_out() -> list[RowSequence]:
        return [
            PackedRows(
                _held_out_pieces(corpus, domain, tokenizer, cfg.seq_len),
                cfg.seq_len,
                separate=cfg.separate_documents,
            )
            for domain in range(len(corpus.domains))
        ]

    sizes = corpus.sizes()
    held_out_bytes = sum(val for _, val in sizes.values())
    parts = ", ".join(
        f"{name} {(train + val) / 1e6:.1f} MB" for name, (train, val) in sizes.items()
    )
    return Source(
        cfg,
        corpus.domains,
        corpus.fingerprint,
        summary=f"text: {parts}; {held_out_bytes / 1e6:.2f} MB of it held out",
        train=train,
        held_out=held_out,
        corpus=corpus,
        training_bytes={name: float(train) for name, (train, _) in sizes.items()},
    )


def _training_pieces(corpus: Corpus, tokenizer: Tokenizer, cfg: DataConfig) -> Iterator[Piece]:
    """Yield the training documents in a random order; for fill-in-the-middle in parts."""
    rng = np.random.default_rng(cfg.seed)
    order = rng.permutation(len(corpus.train)).tolist()

    # Fill-in-the-middle cuts a document into parts; without it many are encoded at once.
    if cfg.fim_rate:
        parts = (
            (i, part)
            for i in order
            for part in _rearranged(corpus.train[i].text, tokenizer, cfg, rng)
        )
    else:
        encoded = tokenizer.encode_arrays([corpus.train[i].text for i in order])
        parts = (
            (i, np.append(ids, np.int32(tokenizer.eos_id)))
            for i, ids in zip(order, encoded, strict=True)
        )

    # All tokens stay in memory: ids of a small vocabulary take two bytes.
    number = {domain: i for i, domain in enumerate(corpus.domains)}
    small = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    for i, ids in parts:
        yield Piece(ids.astype(small, copy=False), number[corpus.train[i].domain], i)


def _held_out_pieces(
    corpus: Corpus, domain: int, tokenizer: Tokenizer, length: int
) -> Iterator[Piece]:
    name = corpus.domains[domain]
    texts = {i: document.text for i, document in enumerate(corpus.val) if document.domain == name}
    for i, window in _windows(texts, tokenizer, length):
        yield Piece(window, domain, i)


def _encode(text: str, tokenizer: Tokenizer) -> Tokens:
    return np.append(tokenizer.encode_array(text), np.int32(tokenizer.eos_id))


def _windows(
    texts: dict[int, str], tokenizer: Tokenizer, length: int
) -> Iterator[tuple[int, Tokens]]:
    """Yield (key, window) until every token of every text was in one window of `length` tokens.

    Each round yields one window of each text that has more, the first at a random place from a
    fixed seed. A few rows then represent all documents.
    """
    rng = np.random.default_rng(0)
    keys = list(texts)
    remaining = []  # (key, windows, index of the first one)

    # The first round: a random window of each text, in a random order.
    for i in rng.permutation(len(texts)):
        tokens = _encode(texts[keys[i]], tokenizer)
        windows = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        first = int(rng.integers(len(windows)))
        yield keys[i], windows[first]
        remaining.append((keys[i], windows, first))

    # Later rounds go on from there, and come back to a text's beginning after its end.
    for num_yielded in itertools.count(1):
        remaining = [text for text in remaining if len(text[1]) > num_yielded]
        if not remaining:
            return
        for key, windows, first in remaining:
            yield key, windows[(first + num_yielded) % len(windows)]


def _rearranged(
    text: str, tokenizer: Tokenizer, cfg: DataConfig, rng: np.random.Generator
) -> Iterator[Tokens]:
    """Cut a text at line ends into parts of a few rows; rearrange some for fill-in-the-middle.

    A rearranged part is <prefix> pre <suffix> suf <middle> mid <eos>, cut at two uniformly random
    characters.

    Source: prefix-suffix-middle order of arXiv 2207.14255.
    """
    size = _FIM_ROWS * cfg.seq_len
    begin = 0
    while begin < len(text):
        # The last line end in the second half of `size` characters; without one, exactly `size`.
        stop = len(text)
        if stop - begin > 1.5 * size:
            stop = text.rfind("\n", begin + size // 2, begin + size) + 1 or begin + size
        part = text[begin:stop]
        begin = stop

        if rng.random() < cfg.fim_rate:
            # Prefix, suffix, middle, each after its special. The middle is what is learnt.
            a, b = sorted(rng.integers(0, len(part) + 1, size=2).tolist())
            pieces = (part[:a], part[b:], part[a:b])
            ids = [
                np.append(np.int32(special), tokenizer.encode_array(piece))
                for special, piece in zip(tokenizer.fim_ids, pieces, strict=True)
            ]
            yield np.append(np.concatenate(ids), np.int32(tokenizer.eos_id))
        elif stop == len(text):
            yield _encode(part, tokenizer)
        else:
            yield tokenizer.encode_array(part)


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a model of `vocab_size` has every id of the tokenizer.

    Raises: ValueError when it does not.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> check_vocab(ByteTokenizer(), vocab_size=256)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: vocab_size=256 is below the tokenizer's 260 ids; ...
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is below the tokenizer's {tokenizer.vocab_size} ids; "
            f"increase it, as by --model.vocab-size {tokenizer.vocab_size}"
        )
