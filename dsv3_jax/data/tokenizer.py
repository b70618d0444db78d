"""Text to token ids and back: plain bytes, or any Hugging Face `tokenizer.json`.

A tokenizer is a table from id to bytes, one id that ends a document, and perhaps three for fill-in-the-middle.
Specials stand for no bytes: they decode to nothing and count nothing in bits a byte.
"""

import abc
import codecs
import json
import os
import re
from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import tokenizers
from jaxtyping import Int32

SPECIALS = ("<eos>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")

# Names in use among released tokenizers, tried in this order.
_EOS = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
_FIM = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek: the hole stands before the suffix
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


class Tokenizer(abc.ABC):
    """What every tokenizer can do.

    Attributes:
        vocab_size: ids are 0 … vocab_size - 1.
        eos_id: ends a document.
        byte_lengths: int32 [vocab_size], the bytes of text that each token stands for, 0 for specials. Bits a byte
            are the nats of the targets over ln 2 and over the sum of these.
    """

    def __init__(self, token_bytes: list[bytes], eos_id: int, fim_ids: tuple[int, int, int] | None):
        self.vocab_size = len(token_bytes)
        self.eos_id = eos_id
        self.byte_lengths: Int32[np.ndarray, " W"] = np.array([len(b) for b in token_bytes], np.int32)
        self._token_bytes = token_bytes
        self._fim_ids = fim_ids

    @property
    def fim_ids(self) -> tuple[int, int, int]:
        """Ids that open prefix, suffix and middle. Raises: ValueError when the vocabulary has none."""
        if self._fim_ids is None:
            raise ValueError(f"this tokenizer of {self.vocab_size} ids has no fill-in-the-middle specials")
        return self._fim_ids

    @abc.abstractmethod
    def encode_array(self, text: str) -> Int32[np.ndarray, " n"]:
        """Ids of `text`, without specials; what looks like a special in the text is text."""

    def encode(self, text: str) -> list[int]:
        """`encode_array` as a list."""
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of `ids`; broken UTF-8 shows as U+FFFD, specials and ids beyond the vocabulary as nothing."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def bytes_of(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes that `ids` stand for: whole characters only where the ids hold them whole."""
        return b"".join(self._token_bytes[i] for i in map(index, ids) if 0 <= i < self.vocab_size)

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether every id stands for the same bytes in both."""
        mine, theirs = ((t._token_bytes, t.eos_id, t._fim_ids) for t in (self, other))
        return mine == theirs

    def stream(self) -> "Stream":
        """A decoder for ids that arrive a few at a time."""
        return Stream(self)


class Stream:
    """Decodes ids as they come: a character of several bytes shows once it is whole.

    Example:
        >>> stream = ByteTokenizer().stream()
        >>> stream.push([0xC3]), stream.push([0xA9]), stream.finish()
        ('', 'é', '')
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """Text that became whole with `ids`."""
        return self._utf8.decode(self._tokenizer.bytes_of(ids))

    def finish(self) -> str:
        """What is left of an unfinished character (U+FFFD) or nothing."""
        return self._utf8.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """Ids 0 … 255 are bytes of UTF-8; then `SPECIALS`: 256 ends a document, 257 … 259 are fill-in-the-middle."""

    def __init__(self):
        super().__init__([bytes([b]) for b in range(256)] + [b""] * len(SPECIALS), 256, (257, 258, 259))

    def encode_array(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


class FileTokenizer(Tokenizer):
    """A `tokenizer.json`: byte-level BPE (GPT-2, DeepSeek, Llama 3) or the SentencePiece kind with "▁" for a space.

    A SentencePiece kind puts a space before a text and `decode` takes it away; `bytes_of` and `stream` keep it, for
    they may stand in the middle of a text. Where it normalises characters, bytes are those of the normalised text.

    Raises: ValueError when the file is absent, is no tokenizer, or has no special that ends a document.
    """

    def __init__(self, path: str):
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"tokenizer {path!r} is neither 'bytes' nor a tokenizer.json")
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer {str(file)!r} cannot be read: {error}") from error
        inner.encode_special_tokens = True  # documents may spell specials; only this project sets them
        inner.no_padding()
        inner.no_truncation()
        eos = next((i for name in _EOS if (i := inner.token_to_id(name)) is not None), None)
        if eos is None:
            raise ValueError(f"tokenizer {str(file)!r} has no end of document: none of {', '.join(_EOS)}")
        fim = next((ids for names in _FIM if (ids := _ids(inner, names))), None)
        self._inner = inner
        self._byte_level = _is_byte_level(inner)
        super().__init__(_table(inner, self._byte_level, {eos, *(fim or ())}), eos, fim)

    def encode_array(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        if self._byte_level:
            return super().decode(ids)
        return self._inner.decode([i for i in map(index, ids) if 0 <= i < self.vocab_size])


def load(spec: str) -> Tokenizer:
    """The tokenizer named by `DataConfig.tokenizer`: "bytes", a `tokenizer.json`, or a folder that holds one."""
    return ByteTokenizer() if spec == "bytes" else FileTokenizer(spec)


def train_bpe(texts: Iterable[str], vocab_size: int, path: str) -> FileTokenizer:
    """Train byte-level BPE on `texts` and write it to `path` (whole or not at all).

    Ids: `SPECIALS` first, then the 256 bytes, then merges. Little text may fill fewer than `vocab_size` ids.

    Raises: ValueError when vocab_size leaves no room for bytes and specials.
    """
    if vocab_size < 256 + len(SPECIALS):
        raise ValueError(f"vocab_size={vocab_size} is below {256 + len(SPECIALS)}: the bytes and the specials")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    partial = Path(f"{path}.{os.getpid()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(inner.to_str(pretty=True), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return FileTokenizer(path)


def _ids(inner: tokenizers.Tokenizer, names: tuple[str, str, str]) -> tuple[int, int, int] | None:
    """Ids of three names, if the vocabulary has all of them."""
    first, second, third = map(inner.token_to_id, names)
    if first is None or second is None or third is None:
        return None
    return first, second, third


def _is_byte_level(inner: tokenizers.Tokenizer) -> bool:
    """Whether tokens spell bytes by GPT-2's letters."""
    return '"ByteLevel"' in json.dumps(json.loads(inner.to_str())["decoder"])


def _table(inner: tokenizers.Tokenizer, byte_level: bool, silent: set[int]) -> list[bytes]:
    """Bytes of every id; specials, `silent` ids and holes in the numbering have none."""
    vocab = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values()) + 1)
    added = inner.get_added_tokens_decoder()
    letters = _letters()
    for token, i in vocab.items():
        if i in silent or (i in added and added[i].special):
            continue
        if i in added:  # spelled as it is
            table[i] = token.encode("utf-8")
        elif byte_level:
            table[i] = bytes(letters[c] for c in token)
        elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            table[i] = bytes([int(match[1], 16)])
        else:
            table[i] = token.replace("▁", " ").encode("utf-8")
    return table


def _letters() -> dict[str, int]:
    """GPT-2's letter for each byte, inverted: printable bytes are themselves, the others follow from U+0100."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in kept)
    return {chr(b): b for b in kept} | {chr(0x100 + n): b for n, b in enumerate(others)}
