"""Text to token ids and back: load a tokenizer, keep a copy of it, train one.

`byte_tokenizer` says what a tokenizer does, `file_tokenizers` reads released ones.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from dsv3_jax.data.byte_tokenizer import SPECIALS, ByteTokenizer, Tokenizer
from dsv3_jax.data.file_tokenizers import (
    JSON_FILE,
    TIKTOKEN_FILE,
    FileTokenizer,
    TiktokenTokenizer,
    byte_by_character,
    known_eos,
)
from dsv3_jax.data.special_tokens import CONFIG_FILE, MAX_IDS, SPECIALS_FILE
from dsv3_jax.host.files import read_bytes, write_atomic


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


def file_of(spec: str) -> Path:
    """Return the file that `load` reads for a path or folder; it may be absent."""
    path = Path(spec)
    names = [name for name in (JSON_FILE, TIKTOKEN_FILE) if (path / name).is_file()] or [JSON_FILE]
    return path / names[0] if path.is_dir() else path


def keep_copy(spec: str, folder: Path, words: Tokenizer | None = None) -> Path:
    """Copy a tokenizer's file, with the files beside it that change its ids or a document's end.

    Args: words: the tokenizer, if it is read already.
    Returns: the copy, which is named as in a released folder.
    Raises: ValueError as `load`; OSError when it cannot be written.
    """
    source = file_of(spec)
    own = folder / (TIKTOKEN_FILE if source.name == TIKTOKEN_FILE else JSON_FILE)
    if own.exists() and own.samefile(source):
        return own

    words = words or load(str(source))  # refuses a damaged one before it is copied
    write_atomic(own, read_bytes(source))

    # tiktoken.model: the file beside it names the special tokens.
    config = source.parent / CONFIG_FILE
    if not isinstance(words, FileTokenizer):
        if config.is_file():
            write_atomic(folder / CONFIG_FILE, read_bytes(config))
    # tokenizer.json: only where a file beside it gives another end of documents than its own names.
    elif words.eos_id != known_eos(words.inner.token_to_id):
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
    character_of = {byte: character for character, byte in byte_by_character().items()}
    # A BPE without merges: every byte stays a token.
    vocab = {character_of[b]: b for b in range(256)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
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

    # No text is lost: every byte is a token from the start, and merges never cross a word's bounds.
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
