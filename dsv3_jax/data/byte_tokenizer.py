"""What every tokenizer does, and the simplest one: the bytes of UTF-8.

A tokenizer has a table from id to bytes, an id that ends a document, and possibly three ids for
fill-in-the-middle. Special tokens have no bytes: they decode to nothing and add nothing to bits a
byte.

`encode` is for text of which nothing is known: the name of a special token in it stays text.
`encode_with_specials` is for text that a person or a chat template wrote for a model: such a name
becomes the special's id.
"""

import abc
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from operator import index
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int32

SPECIALS = ("<eos>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")

# A text that tokenizers split in different ways, for the fingerprint.
_PROBE = (
    f"to be, or not: é 漢字 🙂\n{'a' * 64}! {' ' * 64}x {'1' * 64}- {'=' * 64}é{'ab ' * 32}\n\n"
)


def pattern_of(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of some names, the longest first, in one group.

    Example:
        >>> pattern_of(["<a>", "<a><b>"]).split("1<a><b>2<a>")
        ['1', '<a><b>', '2', '<a>', '']
    """
    longest_first = sorted(names, key=len, reverse=True)
    # (?!) matches nothing
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


class Tokenizer(abc.ABC):
    """Base class of tokenizers.

    Attributes:
        vocab_size: ids are 0 … vocab_size - 1.
        eos_id: ends a document.
        byte_lengths: int32 [vocab_size], the bytes of text of each token, 0 for specials. Bits a
            byte are the targets' nats over ln 2 and over the sum of their byte lengths.
        specials: name → id of the special tokens.
        added: name → id of all tokens that are found in a text before it is split, as DeepSeek's
            `<｜User｜>`, which is not special.
        puts_space_before: a text's ids begin with a space that the text does not have.
    """

    puts_space_before = False

    def __init__(
        self,
        token_bytes: list[bytes],
        eos_id: int,
        fim_ids: tuple[int, int, int] | None,
        specials: dict[str, int] | None = None,
        added: dict[str, int] | None = None,
    ):
        self.vocab_size = len(token_bytes)
        self.specials = specials or {}
        self.added = self.specials if added is None else added
        self.eos_id = eos_id
        self.byte_lengths: Int32[np.ndarray, " W"] = np.array(
            [len(b) for b in token_bytes], np.int32
        )
        self._token_bytes = token_bytes
        self._fim_ids = fim_ids

    @property
    def fim_ids(self) -> tuple[int, int, int]:
        """Ids before prefix, suffix and middle. Raises: ValueError when the vocabulary has none."""
        if self._fim_ids is None:
            raise ValueError(
                f"vocab_size={self.vocab_size} has no fill-in-the-middle specials; use fim_rate=0"
            )
        return self._fim_ids

    @abc.abstractmethod
    def encode_array(self, text: str) -> Int32[np.ndarray, " n"]:
        """Return the ids of `text`.

        No special is added, and the name of a special in the text stays text.
        """

    def encode_arrays(self, texts: Sequence[str]) -> Iterator[Int32[np.ndarray, " n"]]:
        """Yield `encode_array` of each text; many at once where the library can."""
        return map(self.encode_array, texts)

    def encode(self, text: str) -> list[int]:
        """Return `encode_array` as a list.

        Example:
            >>> ByteTokenizer().encode("hé")
            [104, 195, 169]
        """
        return self.encode_array(text).tolist()

    def encode_with_specials(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode text in which the name of a special token means that token.

        Returns: (ids, for each id the characters of `text` that it covers: first, and one past the
            last). A character of several ids belongs to each of them.

        Example:
            >>> ByteTokenizer().encode_with_specials("é<eos>")
            ([195, 169, 256], [(0, 1), (0, 1), (1, 6)])
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        start = 0

        # The text between two names is encoded by itself: no id covers a part of a name.
        for i, part in enumerate(self._special_name.split(text)):
            end = start + len(part)
            if i % 2:  # a split by a group returns text and names in turn
                ids.append(self.specials[part])
                spans.append((start, end))
            else:
                new = self.encode(part)
                ids += new
                spans += self._characters(part, new, start)
            start = end
        return ids, spans

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of `encode_with_specials`, with what the tokenizer's file adds, as BOS."""
        return self.encode_with_specials(text)[0]

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of `text` without any of `added`."""
        return self.encode(text)

    @cached_property
    def _special_name(self) -> re.Pattern[str]:
        return pattern_of(self.specials)

    def _characters(self, text: str, ids: list[int], start: int) -> list[tuple[int, int]]:
        """Return the characters of each id of `text`, which begins at `start`, by bytes."""
        # The first byte of each character, and the bytes at which each token begins and ends.
        first_byte = np.cumsum([0, *(len(c.encode("utf-8", "replace")) for c in text)])[:-1]
        ends = np.cumsum(self.byte_lengths[ids])
        begins = ends - self.byte_lengths[ids]

        # A character is the last one that begins at a byte or before it.
        first = np.searchsorted(first_byte, begins, side="right") - 1 + start
        last = np.searchsorted(first_byte, ends - 1, side="right") - 1 + start
        return [(int(a), int(b) + 1) for a, b in zip(first, last, strict=True)]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Return the text of `ids`.

        Broken UTF-8 becomes U+FFFD; specials and ids beyond the vocabulary are skipped.


        Example:
            >>> ByteTokenizer().decode([104, 195, 169, 256])
            'hé'
        """
        return self.bytes_of(ids).decode("utf-8", "replace")

    def decode_with_names(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, with the names of special tokens.

        Example:
            >>> ByteTokenizer().decode_with_names([257, 257, 104, 105])
            '<fim_prefix><fim_prefix>hi'
        """
        names = {i: name for name, i in self.specials.items()}

        # Ids between two names are decoded together: a character may have several.
        runs = itertools.groupby(ids, names.get)
        return "".join(name * len(list(run)) if name else self.decode(run) for name, run in runs)

    def bytes_of(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Return the bytes of `ids`; the first and last character may be incomplete."""
        return b"".join(self._token_bytes[i] for i in map(index, ids) if 0 <= i < self.vocab_size)

    def same_ids(self, other: "Tokenizer") -> bool:
        """Say whether every id has the same bytes and role in both tokenizers."""
        left, right = ((t._token_bytes, t.eos_id, t._fim_ids) for t in (self, other))
        return left == right

    @property
    def fingerprint(self) -> str:
        """A hash of the ids, their bytes and roles, and of how a text hard to split is encoded.

        Example:
            >>> from dsv3_jax.data.tokenizer import load
            >>> ByteTokenizer().fingerprint == load("bytes").fingerprint
            True
        """
        # Two tokenizers with one table may still cut a text in different places: hash an encoding.
        found = hashlib.blake2b(digest_size=8)
        found.update(self.byte_lengths.tobytes() + b"".join(self._token_bytes))
        found.update(repr((self.eos_id, self._fim_ids, sorted(self.specials.items()))).encode())
        found.update(self.encode_array(_PROBE).tobytes())
        return found.hexdigest()


class ByteTokenizer(Tokenizer):
    """Ids 0 … 255 are bytes of UTF-8, then come `SPECIALS`: 256 ends a document, 257 … 259 are FIM.

    Example:
        >>> ByteTokenizer().vocab_size, ByteTokenizer().eos_id
        (260, 256)
    """

    def __init__(self) -> None:
        specials = dict(zip(SPECIALS, range(256, 256 + len(SPECIALS)), strict=True))
        token_bytes = [bytes([b]) for b in range(256)] + [b""] * len(SPECIALS)
        super().__init__(token_bytes, eos_id=256, fim_ids=(257, 258, 259), specials=specials)

    def encode_array(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
