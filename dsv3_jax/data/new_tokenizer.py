"""New tokenizers: byte-level BPE that is trained on texts, and one whose ids are the bytes."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import tokenizers

from dsv3_jax.data.special_tokens import MAX_IDS
from dsv3_jax.data.tokenizer_file import byte_by_character

_LONG_RUN = re.compile(r"\s{8192}|\S{8192}")


def trained_bpe(texts: Iterable[str], vocab_size: int, specials: Sequence[str]) -> tokenizers.Tokenizer:
    """Train byte-level BPE. Its ids are `specials`, then the 256 bytes, then merges.

    Raises: ValueError when vocab_size is too small for bytes and specials, or larger than is supported.
    """
    if vocab_size > MAX_IDS:
        raise ValueError(f"vocab_size={vocab_size} is more than the {MAX_IDS:,} that are supported")
    if vocab_size < 256 + len(specials):
        raise ValueError(
            f"vocab_size={vocab_size} is below {256 + len(specials)}, the number of bytes and specials; increase it"
        )
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(itertools.chain.from_iterable(map(_cut_runs, texts)), trainer)
    return inner


def _cut_runs(text: str) -> Iterator[str]:
    """Cut runs with or without spaces after 8,192 characters: training takes time by the square of a word's length."""
    piece = ""
    runs = re.findall(r"\s{1,8192}|\S{1,8192}", text) if _LONG_RUN.search(text) else [text]
    for run in runs:
        piece += run
        if len(run) == 8192:
            yield piece
            piece = ""
    yield piece


def single_bytes(specials: Sequence[str]) -> tokenizers.Tokenizer:
    """Ids 0 … 255 are the bytes, followed by `specials`."""
    character_of = {byte: character for character, byte in byte_by_character().items()}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({character_of[b]: b for b in range(256)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(list(specials))
    return inner
