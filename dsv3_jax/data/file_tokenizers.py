"""Tokenizers that are read from files: a Hugging Face `tokenizer.json`, Kimi's `tiktoken.model`."""

import base64
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

from dsv3_jax.data.byte_tokenizer import Tokenizer
from dsv3_jax.data.kimi_pattern import KIMI_PATTERN
from dsv3_jax.data.special_tokens import CONFIG_FILE, MAX_IDS, end_ids, named_specials, read_object
from dsv3_jax.host.files import read_bytes

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
        >>> from dsv3_jax.data.tokenizer import train_bpe
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

        # A file of a stranger: a panic of the library and a bomb of a normalizer are refused.
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

        # Text may contain names of specials; only this project adds specials.
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self.inner = inner
        self._byte_level = '"ByteLevel"' in json.dumps(settings["decoder"])
        self.puts_space_before = not self._byte_level

        # Ids with a role, and the bytes of the others.
        eos = _eos_of(file, inner.token_to_id)
        fim = _fim_of(inner.token_to_id)
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
        # Texts go together whose ends are in the same stretch of `_BATCH` characters.
        ends = itertools.accumulate(map(len, texts))
        pairs = zip(ends, texts, strict=True)
        for _, group in itertools.groupby(pairs, lambda pair: pair[0] // _BATCH):
            # The fast one leaves out the offsets, and uses all cores.
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
        # The library's encoder always finds added tokens that are not special. So its three steps
        # are taken one by one: normalize the text, cut it into pieces, encode each of them.
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
                f"tokenizer={str(file)!r} needs tiktoken: pip install tiktoken"
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

        if wrong := [name for name in names.values() if not isinstance(name, str)]:
            raise ValueError(
                f"{file.parent / CONFIG_FILE} has content={wrong[0]!r:.80} in "
                "added_tokens_decoder, which is not the name of a token"
            )
        if absent := [i for i in range(256) if bytes([i]) not in ranks]:
            raise ValueError(
                f"tokenizer={str(file)!r} cannot be read: it lacks the byte {absent[0]}"
            )

        # Specials follow the ranks: those that are named, and the others of the block.
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
    # What one match becomes, over what it takes up. A regular expression may match no letter.
    written = len(part.get("content", "")) + len(part.get("prepend", ""))
    replaced = len(part.get("pattern", {}).get("String", ""))
    own = max(1.0, written / replaced if replaced else 1.0 + written)

    # Steps that follow one another multiply.
    return own * math.prod(map(_growth, part.get("normalizers", ())))


def _bytes_by_id(
    inner: tokenizers.Tokenizer, byte_level: bool, special_ids: set[int]
) -> list[bytes]:
    """Return the bytes of every id; specials and unused ids have none."""
    vocab = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values()) + 1)
    added = inner.get_added_tokens_decoder()
    byte_of = byte_by_character()
    for token, i in vocab.items():
        if i in special_ids or (i in added and added[i].special):
            continue

        # Added tokens are plain text. So is a token with a character that stands for no byte.
        if i in added or (byte_level and not byte_of.keys() >= set(token)):
            table[i] = token.encode("utf-8")
        elif byte_level:
            table[i] = bytes(byte_of[c] for c in token)
        elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            table[i] = bytes([int(match[1], 16)])
        else:
            table[i] = token.replace("▁", " ").encode("utf-8")
    return table


def byte_by_character() -> dict[str, int]:
    """Return the byte of each of GPT-2's characters: itself if printable, else from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _eos_of(file: Path, id_of: Callable[[str], int | None]) -> int:
    """Return the id that ends a document: by files beside the tokenizer, else by a known name."""
    folder = file.parent
    # A file of another name stands alone, whatever its folder holds.
    if file.name in (JSON_FILE, TIKTOKEN_FILE):
        name = named_specials(folder).get("eos_token")
        if name is not None:
            eos = id_of(name)
            if eos is None:
                raise ValueError(
                    f"{folder} names eos_token={name!r}, and {file.name} has no such token"
                )
            return eos

        # Some folders give the id alone.
        ids = [*end_ids(folder, "config.json"), *end_ids(folder, "generation_config.json")]
        if ids:
            return ids[0]

    found = known_eos(id_of)
    if found is None:
        raise ValueError(
            f"tokenizer={str(file)!r} has no end of document; it needs one of {', '.join(_EOS)}"
        )
    return found


def _fim_of(id_of: Callable[[str], int | None]) -> tuple[int, int, int] | None:
    """Return the ids of the first family of fill-in-the-middle specials that is complete."""
    for names in _FIM:
        prefix, suffix, middle = map(id_of, names)
        if prefix is not None and suffix is not None and middle is not None:
            return prefix, suffix, middle
    return None


def known_eos(id_of: Callable[[str], int | None]) -> int | None:
    return next((i for name in _EOS if (i := id_of(name)) is not None), None)
