"""Readable text of tokens: a byte alone means little, and line ends would break a table."""

import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.tokenizer import Tokenizer

BEFORE, AFTER = 32, 12  # tokens of a context

VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})


def readable(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decode ids to printable text: signs for line ends and tabs, \\x.. for broken UTF-8, <eos> and <id> for specials.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> readable(ByteTokenizer(), [0x61, 0x0A, 0xC3, 0xA9, 0xC3, 0x00, 256])
        'a↵é\\\\xc3\\\\x00<eos>'
    """
    specials = [at for at, length in enumerate(tokenizer.byte_lengths[ids].tolist()) if not length]
    parts, start = [], 0
    for at in [*specials, len(ids)]:
        if at > start:  # a character of several ids is complete before a special or the end
            parts.append(_printable(tokenizer.bytes_of(ids[start:at]).decode("utf-8", "backslashreplace")))
        if at < len(ids):
            parts.append("<eos>" if ids[at] == tokenizer.eos_id else f"<{ids[at]}>")
        start = at + 1
    return "".join(parts)


def _printable(text: str) -> str:
    text = text.translate(VISIBLE)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def context(tokenizer: Tokenizer, window: Int32[np.ndarray, " window"]) -> tuple[str, str, str]:
    """Decode a row of `Contexts.tokens` to readable text: (before, the routed token, after).

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> window = np.full(BEFORE + 1 + AFTER, -1, np.int32)
        >>> window[BEFORE - 1 : BEFORE + 2] = [*b"x=1"]
        >>> context(ByteTokenizer(), window)
        ('x', '=', '1')
    """
    before, token, after = window[:BEFORE], window[BEFORE : BEFORE + 1], window[BEFORE + 1 :]
    texts = [readable(tokenizer, part[part >= 0].tolist()) for part in (before, token, after)]
    return texts[0], texts[1], texts[2]
