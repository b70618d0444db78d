"""Text to token ids and back: plain bytes, or any Hugging Face `tokenizer.json`.

A tokenizer has a table from id to bytes, an id that ends a document, and possibly three ids for fill-in-the-middle.
Special tokens have no bytes: they decode to nothing and add nothing to bits a byte.
"""

import abc
import codecs
import json
import re
from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import tokenizers
from jaxtyping import Int32

from dsv3_jax.files import write_atomic

SPECIALS = ("<eos>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")

# Names in released tokenizers, tried in this order.
_EOS = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
_FIM = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek: the hole precedes the suffix
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


class Tokenizer(abc.ABC):
    """Base class of tokenizers.

    Attributes:
        vocab_size: ids are 0 … vocab_size - 1.
        eos_id: ends a document.
        byte_lengths: int32 [vocab_size], the bytes of text of each token, 0 for specials. Bits a byte are the targets'
            nats over ln 2 and over the sum of their byte lengths.
    """

    def __init__(self, token_bytes: list[bytes], eos_id: int, fim_ids: tuple[int, int, int] | None):
        self.vocab_size = len(token_bytes)
        self.eos_id = eos_id
        self.byte_lengths: Int32[np.ndarray, " W"] = np.array([len(b) for b in token_bytes], np.int32)
        self._token_bytes = token_bytes
        self._fim_ids = fim_ids

    @property
    def fim_ids(self) -> tuple[int, int, int]:
        """Ids before prefix, suffix and middle. Raises: ValueError when the vocabulary has none."""
        if self._fim_ids is None:
            raise ValueError(
                f"a tokenizer of vocab_size={self.vocab_size} has no fill-in-the-middle specials; use fim_rate=0"
            )
        return self._fim_ids

    @abc.abstractmethod
    def encode_array(self, text: str) -> Int32[np.ndarray, " n"]:
        """Return the ids of `text`. No special is added, and the name of a special in the text stays text."""

    def encode(self, text: str) -> list[int]:
        """Return `encode_array` as a list.

        Example:
            >>> ByteTokenizer().encode("hé")
            [104, 195, 169]
        """
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Return the text of `ids`. Broken UTF-8 becomes U+FFFD; specials and ids beyond the vocabulary are skipped.

        Example:
            >>> ByteTokenizer().decode([104, 195, 169, 256])
            'hé'
        """
        return self.bytes_of(ids).decode("utf-8", "replace")

    def bytes_of(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Return the bytes of `ids`; the first and last character may be incomplete."""
        return b"".join(self._token_bytes[i] for i in map(index, ids) if 0 <= i < self.vocab_size)

    def same_ids(self, other: "Tokenizer") -> bool:
        """Say whether every id has the same bytes and role in both tokenizers."""
        left, right = ((t._token_bytes, t.eos_id, t._fim_ids) for t in (self, other))
        return left == right

    def stream(self) -> "StreamDecoder":
        """Return a decoder for ids that arrive a few at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes ids as they arrive; a character of several bytes is returned once it is complete.

    Example:
        >>> stream = ByteTokenizer().stream()
        >>> stream.push([0xC3]), stream.push([0xA9]), stream.finish()
        ('', 'é', '')
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """Return the characters that `ids` complete."""
        return self._utf8.decode(self._tokenizer.bytes_of(ids))

    def finish(self) -> str:
        """Return U+FFFD for an incomplete character, else an empty string."""
        return self._utf8.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """Ids 0 … 255 are bytes of UTF-8, followed by `SPECIALS`: 256 ends a document, 257 … 259 are fill-in-the-middle.

    Example:
        >>> ByteTokenizer().vocab_size, ByteTokenizer().eos_id
        (260, 256)
    """

    def __init__(self):
        super().__init__([bytes([b]) for b in range(256)] + [b""] * len(SPECIALS), 256, (257, 258, 259))

    def encode_array(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


class FileTokenizer(Tokenizer):
    """A `tokenizer.json`: byte-level BPE (GPT-2, DeepSeek, Llama 3), or SentencePiece with "▁" for a space.

    SentencePiece puts a space before a text, and `decode` removes it. `bytes_of` and `stream` keep it, as their ids may
    come from the middle of a text. If the tokenizer normalises characters, bytes are those of the normalised text.

    Args: path: the file, or a folder that contains it.
    Raises: ValueError when the file is absent, is no tokenizer, or has no special that ends a document.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = train_bpe(["to be or not to be"] * 2, 262, f"{folder}/tokenizer.json")
        ...     tokenizer = FileTokenizer(folder)
        >>> tokenizer.decode(tokenizer.encode("not to be"))
        'not to be'
    """

    def __init__(self, path: str):
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"tokenizer={path!r} is neither 'bytes' nor a tokenizer.json; give one of them")
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer={str(file)!r} cannot be read: {error}") from error
        inner.encode_special_tokens = True  # text may contain names of specials; only this project adds specials
        inner.no_padding()
        inner.no_truncation()
        eos = next((i for name in _EOS if (i := inner.token_to_id(name)) is not None), None)
        if eos is None:
            raise ValueError(f"tokenizer={str(file)!r} has no end of document; it needs one of {', '.join(_EOS)}")
        fim = next((ids for names in _FIM if (ids := _ids_of(inner, names))), None)
        self._inner = inner
        self._byte_level = _is_byte_level(inner)
        super().__init__(_bytes_by_id(inner, self._byte_level, {eos, *(fim or ())}), eos, fim)

    def encode_array(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        if self._byte_level:
            return super().decode(ids)
        return self._inner.decode([i for i in map(index, ids) if 0 <= i < self.vocab_size])


def load(spec: str) -> Tokenizer:
    """Load the tokenizer of `DataConfig.tokenizer`.

    Args: spec: "bytes", the path of a `tokenizer.json`, or a folder that contains one.
    Raises: ValueError as `FileTokenizer`.

    Example:
        >>> load("bytes").vocab_size
        260
    """
    return ByteTokenizer() if spec == "bytes" else FileTokenizer(spec)


def train_bpe(texts: Iterable[str], vocab_size: int, path: str) -> FileTokenizer:
    """Train byte-level BPE on `texts` and write it to `path`.

    Ids are `SPECIALS`, then the 256 bytes, then merges. A short text may give fewer than `vocab_size` ids.

    Raises: ValueError when vocab_size is too small for bytes and specials.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tokenizer = train_bpe(["to be or not to be"] * 2, 262, f"{folder}/tokenizer.json")
        >>> tokenizer.vocab_size, len(tokenizer.encode("to be"))
        (262, 3)
    """
    if vocab_size < 256 + len(SPECIALS):
        raise ValueError(
            f"vocab_size={vocab_size} is below {256 + len(SPECIALS)}, the number of bytes and specials; increase it"
        )
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
    write_atomic(path, inner.to_str(pretty=True))
    return FileTokenizer(path)


def _ids_of(inner: tokenizers.Tokenizer, names: tuple[str, str, str]) -> tuple[int, int, int] | None:
    """Return the ids of three names; None if the vocabulary lacks one."""
    first, second, third = map(inner.token_to_id, names)
    if first is None or second is None or third is None:
        return None
    return first, second, third


def _is_byte_level(inner: tokenizers.Tokenizer) -> bool:
    """Say whether tokens represent bytes by GPT-2's characters."""
    return '"ByteLevel"' in json.dumps(json.loads(inner.to_str())["decoder"])


def _bytes_by_id(inner: tokenizers.Tokenizer, byte_level: bool, special_ids: set[int]) -> list[bytes]:
    """Return the bytes of every id; specials and unused ids have none."""
    vocab = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values()) + 1)
    added = inner.get_added_tokens_decoder()
    byte_of = _byte_by_character()
    for token, i in vocab.items():
        if i in special_ids or (i in added and added[i].special):
            continue
        if i in added:  # an added token is plain text
            table[i] = token.encode("utf-8")
        elif byte_level:
            table[i] = bytes(byte_of[c] for c in token)
        elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            table[i] = bytes([int(match[1], 16)])
        else:
            table[i] = token.replace("▁", " ").encode("utf-8")
    return table


def _byte_by_character() -> dict[str, int]:
    """Return the byte of each of GPT-2's characters: printable bytes are unchanged, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
