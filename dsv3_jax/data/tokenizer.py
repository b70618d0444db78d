"""Text to token ids and back: bytes, a Hugging Face `tokenizer.json`, Kimi's `tiktoken.model`.

A tokenizer has a table from id to bytes, an id that ends a document, and possibly three ids for
fill-in-the-middle. Special tokens have no bytes: they decode to nothing and add nothing to bits a
byte.

`encode` is for text of which nothing is known: the name of a special token in it stays text.
`encode_with_specials` is for text that a person or a chat template wrote for a model: such a name
becomes the special's id.
"""

import abc
import base64
import hashlib
import itertools
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from jaxtyping import Int32

from dsv3_jax.data.kimi_pattern import KIMI_PATTERN
from dsv3_jax.data.special_tokens import (
    CONFIG_FILE,
    MAX_IDS,
    SPECIALS_FILE,
    end_ids,
    named_specials,
    read_object,
)
from dsv3_jax.host.files import read_bytes, write_atomic

SPECIALS = ("<eos>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")
# what a folder's tokenizer is read from, in this order
JSON_FILE, TIKTOKEN_FILE = "tokenizer.json", "tiktoken.model"

# Names in released tokenizers, tried in this order where no file beside the tokenizer names the end
# of a document.
_EOS = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
_FIM = (
    # DeepSeek: the hole precedes the suffix
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
_BATCH = 2**21  # characters that are encoded at once: the library keeps 100 bytes a token meanwhile
_MAX_GROWTH = 100  # letters that a normalizer may make of one: the library takes 160 bytes for each
# A text that tokenizers split in different ways, for the fingerprint.
_PROBE = (
    f"to be, or not: é 漢字 🙂\n{'a' * 64}! {' ' * 64}x {'1' * 64}- {'=' * 64}é{'ab ' * 32}\n\n"
)


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of some names, the longest first, in one group.

    Example:
        >>> any_of(["<a>", "<a><b>"]).split("1<a><b>2<a>")
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
        for i, part in enumerate(self._special_name.split(text)):
            end = start + len(part)
            if i % 2:
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
        return any_of(self.specials)

    def _characters(self, text: str, ids: list[int], start: int) -> list[tuple[int, int]]:
        """Return the characters of each id of `text`, which begins at `start`, by bytes."""
        first_byte = np.cumsum([0, *(len(c.encode("utf-8", "replace")) for c in text)])[:-1]
        ends = np.cumsum(self.byte_lengths[ids])
        begins = ends - self.byte_lengths[ids]
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
            >>> ByteTokenizer().fingerprint == load("bytes").fingerprint
            True
        """
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

    def __init__(self):
        specials = dict(zip(SPECIALS, range(256, 256 + len(SPECIALS)), strict=True))
        super().__init__(
            [bytes([b]) for b in range(256)] + [b""] * len(SPECIALS), 256, (257, 258, 259), specials
        )

    def encode_array(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


class FileTokenizer(Tokenizer):
    """A `tokenizer.json`: byte-level BPE (GPT-2, DeepSeek), or SentencePiece with "▁" for a space.

    SentencePiece puts a space before a text, and `decode` removes it. `bytes_of` keeps it, as its
    ids may come from the middle of a text. If the tokenizer normalises characters, bytes belong to
    the normalised text.

    The id that ends a document is the `eos_token` of the files beside a tokenizer.json (see
    `named_specials`), else of its config.json or generation_config.json, else a known name.

    Args: path: the file, or a folder that contains it.
    Raises: ValueError when the file is absent, is no tokenizer, or has no special that ends a
        document.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = train_bpe(["to be or not to be"] * 2, 262, f"{folder}/tokenizer.json")
        ...     tokenizer = FileTokenizer(folder)
        >>> tokenizer.decode(tokenizer.encode("not to be"))
        'not to be'
    """

    def __init__(self, path: str):
        file = Path(path) / JSON_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(
                f"tokenizer={path!r} is neither 'bytes' nor a {JSON_FILE}; give one of them"
            )
        inner = _called(
            f"tokenizer={str(file)!r} cannot be read",
            tokenizers.Tokenizer.from_buffer,
            read_bytes(file),
        )
        settings = json.loads(inner.to_str())
        if (growth := _growth(settings["normalizer"])) > _MAX_GROWTH:
            raise ValueError(
                f"tokenizer={str(file)!r} has a normalizer that may make {growth:.3g} letters of "
                "one"
            )
        # text may contain names of specials; only this project adds specials
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        eos = _eos_of(file, inner.token_to_id)
        found = (
            [i for name in names if (i := inner.token_to_id(name)) is not None] for names in _FIM
        )
        fim = next(((a, b, c) for a, b, c in (ids for ids in found if len(ids) == 3)), None)
        self.inner = inner
        self._byte_level = '"ByteLevel"' in json.dumps(settings["decoder"])
        self.puts_space_before = not self._byte_level
        tokens = inner.get_added_tokens_decoder().items()
        specials = {token.content: i for i, token in tokens if token.special}
        added = {token.content: i for i, token in tokens}
        table = _bytes_by_id(inner, self._byte_level, {eos, *(fim or ())})
        if eos >= len(table):
            raise ValueError(
                f"tokenizer={str(file)!r} ends documents with id {eos}, and has no such id"
            )
        super().__init__(table, eos, fim, specials, added)

    def encode_array(self, text: str) -> Int32[np.ndarray, " n"]:
        return next(self.encode_arrays([text]))

    def encode_arrays(self, texts: Sequence[str]) -> Iterator[Int32[np.ndarray, " n"]]:
        ends = itertools.accumulate(map(len, texts))
        for _, group in itertools.groupby(
            zip(ends, texts, strict=True), lambda pair: pair[0] // _BATCH
        ):
            # It leaves out the offsets, and uses all cores.
            batch = _encoded(
                self.inner.encode_batch_fast, [text for _, text in group], add_special_tokens=False
            )
            for found in batch:
                yield np.array(found.ids, np.int32)

    def encode_with_specials(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = _encoded(self._with_specials.encode, text, add_special_tokens=False)
        return found.ids, found.offsets

    def encode_prompt(self, text: str) -> list[int]:
        return _encoded(self._with_specials.encode, text, add_special_tokens=True).ids

    def encode_plain(self, text: str) -> list[int]:
        # Step by step: the library's encoder always finds added tokens that are not special.
        if self.inner.normalizer is not None:
            text = _encoded(self.inner.normalizer.normalize_str, text)
        pieces = [text]
        if self.inner.pre_tokenizer is not None:
            pieces = [
                piece for piece, _ in _encoded(self.inner.pre_tokenizer.pre_tokenize_str, text)
            ]
        return [
            token.id for piece in pieces for token in _encoded(self.inner.model.tokenize, piece)
        ]

    @cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """A copy with the object's switch: a loader's thread may use the other one."""
        inner = tokenizers.Tokenizer.from_str(self.inner.to_str())
        inner.encode_special_tokens = False
        return inner

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        if self._byte_level:
            return super().decode(ids)
        known = [i for i in map(index, ids) if 0 <= i < self.vocab_size]
        return _called("the tokenizer cannot decode", self.inner.decode, known)


class TiktokenTokenizer(Tokenizer):
    """A `tiktoken.model`, as of Kimi and Moonlight: byte-level BPE by rank, read by `tiktoken`.

    The file holds ranks only. The pattern that splits a text is Kimi's. Special tokens follow the
    ranks: 256 ids, or as many as `added_tokens_decoder` of tokenizer_config.json needs, which names
    some of them.

    Raises: ValueError when the library is absent, the file is damaged, or nothing ends a document.

    Source: the tokenizer's code in the released folders of Moonlight-16B-A3B and Kimi-K2.
    Departs from it: runs of over 25,000 characters with or without spaces are not cut.
    """

    def __init__(self, file: Path):
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError(
                f"tokenizer={str(file)!r} needs tiktoken: pip install 'dsv3-jax[tiktoken]'"
            ) from error
        added = read_object(file.parent / CONFIG_FILE).get("added_tokens_decoder") or {}
        # Not by the library's reader, which keeps files by path: it would return an older one.
        try:
            pairs = [line.split() for line in read_bytes(file).splitlines() if line]
            ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in pairs}
            names = {int(i): token["content"] for i, token in added.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"tokenizer={str(file)!r} or {CONFIG_FILE} beside it cannot be read: {error}"
            ) from error
        base = len(ranks)
        end = max([base + 256, *(i + 1 for i in names)])
        specials = {
            names.get(i, f"<|reserved_token_{i}|>"): i for i in range(base, min(end, MAX_IDS))
        }
        if sorted(ranks.values()) != list(range(base)) or len(specials) != end - base:
            raise ValueError(
                f"tokenizer={str(file)!r} cannot be read: ids are not 0 … {end - 1}, each once"
            )
        self._encoding = tiktoken.Encoding(
            name=file.name, pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        table = [*sorted(ranks, key=ranks.__getitem__), *[b""] * (end - base)]
        super().__init__(table, _eos_of(file, specials.get), None, specials)

    def encode_array(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.array(self._encoding.encode_ordinary(text), np.int32)


def _called(what: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call the library.

    Raises: ValueError for all that it raises, also a panic of Rust, which is no Exception.
    """
    try:
        return function(*args, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from error


def _encoded(function: Callable[..., Any], text: str | list[str], **options: Any) -> Any:
    return _called(f"the tokenizer cannot encode {reprlib.repr(text)}", function, text, **options)


def _growth(normalizer: dict[str, Any] | None) -> float:
    """Return how many letters a normalizer may make of one, by the texts in its file."""
    part = normalizer or {}
    written = len(part.get("content", "")) + len(part.get("prepend", ""))
    # a regular expression may match no letter
    replaced = len(part.get("pattern", {}).get("String", ""))
    own = max(1.0, written / replaced if replaced else 1.0 + written)
    return own * math.prod(map(_growth, part.get("normalizers", ())))


def _bytes_by_id(
    inner: tokenizers.Tokenizer, byte_level: bool, special_ids: set[int]
) -> list[bytes]:
    """Return the bytes of every id; specials and unused ids have none."""
    vocab = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values()) + 1)
    added = inner.get_added_tokens_decoder()
    byte_of = _byte_by_character()
    for token, i in vocab.items():
        if i in special_ids or (i in added and added[i].special):
            continue
        # plain text, as in the library
        if i in added or (byte_level and not byte_of.keys() >= set(token)):
            table[i] = token.encode("utf-8")
        elif byte_level:
            table[i] = bytes(byte_of[c] for c in token)
        elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            table[i] = bytes([int(match[1], 16)])
        else:
            table[i] = token.replace("▁", " ").encode("utf-8")
    return table


def _byte_by_character() -> dict[str, int]:
    """Return the byte of each of GPT-2's characters: itself if printable, else from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def load(spec: str) -> Tokenizer:
    """Load the tokenizer of `DataConfig.tokenizer`.

    Args: spec: "bytes", the path of a `tokenizer.json` or `tiktoken.model`, or a folder that
        contains one of them.
    Raises: ValueError as `FileTokenizer` and `TiktokenTokenizer`.

    Example:
        >>> load("bytes").vocab_size
        260
    """
    if spec == "bytes":
        return ByteTokenizer()
    file = file_of(spec)
    if file.name == TIKTOKEN_FILE and file.is_file():
        return TiktokenTokenizer(file)
    return FileTokenizer(spec)


def _eos_of(file: Path, id_of: Callable[[str], int | None]) -> int:
    """Return the id that ends a document: by files beside the tokenizer, else by a known name."""
    folder = file.parent
    # a file of another name stands alone, whatever its folder holds
    if file.name in (JSON_FILE, TIKTOKEN_FILE):
        name = named_specials(folder).get("eos_token")
        if name is not None:
            eos = id_of(name)
            if eos is None:
                raise ValueError(
                    f"{folder} names eos_token={name!r}, and {file.name} has no such token"
                )
            return eos
        ids = [*end_ids(folder, "config.json"), *end_ids(folder, "generation_config.json")]
        if ids:
            return ids[0]
    found = _known_eos(id_of)
    if found is None:
        raise ValueError(
            f"tokenizer={str(file)!r} has no end of document; it needs one of {', '.join(_EOS)}"
        )
    return found


def file_of(spec: str) -> Path:
    """Return the file that `load` reads for a path or folder; it may be absent."""
    path = Path(spec)
    names = [name for name in (JSON_FILE, TIKTOKEN_FILE) if (path / name).is_file()] or [JSON_FILE]
    return path / names[0] if path.is_dir() else path


def keep_copy(spec: str, folder: Path) -> Path:
    """Copy a tokenizer's file, with the files beside it that change its ids or a document's end.

    Returns: the copy, which is named as in a released folder.
    Raises: ValueError as `load`; OSError when it cannot be written.
    """
    source = file_of(spec)
    own = folder / (TIKTOKEN_FILE if source.name == TIKTOKEN_FILE else JSON_FILE)
    if own.exists() and own.samefile(source):
        return own
    words = load(str(source))
    config = source.parent / CONFIG_FILE
    write_atomic(own, read_bytes(source))
    if not isinstance(words, FileTokenizer):
        if config.is_file():
            write_atomic(folder / CONFIG_FILE, read_bytes(config))
    elif words.eos_id != _known_eos(words.inner.token_to_id):  # a file beside the source names it
        write_atomic(
            folder / SPECIALS_FILE, json.dumps({"eos_token": words.inner.id_to_token(words.eos_id)})
        )
    return own


def byte_tokenizer_json() -> str:
    """Return a tokenizer.json of the same ids as `ByteTokenizer`, for other programs.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "tokenizer.json").write_text(byte_tokenizer_json())
        ...     load(folder).same_ids(ByteTokenizer())
        True
    """
    character_of = {byte: character for character, byte in _byte_by_character().items()}
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({character_of[b]: b for b in range(256)}, [])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIALS))
    return inner.to_str()


def train_bpe(texts: Iterable[str], vocab_size: int, path: str) -> FileTokenizer:
    """Train byte-level BPE on `texts` and write it to `path`.

    Ids are `SPECIALS`, then the 256 bytes, then merges. A short text may give fewer than
    `vocab_size` ids.

    Raises: ValueError when vocab_size is too small for bytes and specials.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tokenizer = train_bpe(["to be or not to be"] * 2, 262, f"{folder}/tokenizer.json")
        >>> tokenizer.vocab_size, len(tokenizer.encode("to be"))
        (262, 3)
    """
    least = 256 + len(SPECIALS)
    if not least <= vocab_size <= MAX_IDS:
        raise ValueError(
            f"vocab_size={vocab_size} is not from {least}, bytes and specials, to {MAX_IDS}"
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


def _known_eos(id_of: Callable[[str], int | None]) -> int | None:
    return next((i for name in _EOS if (i := id_of(name)) is not None), None)
