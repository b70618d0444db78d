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
    parts, text = [], b""
    for i in [*ids, None]:
        piece = b"" if i is None else tokenizer.bytes_of([i])
        text += piece
        if not piece:  # a special or the end: a character of several ids is complete here
            parts.append("".join(map(_printable, text.decode("utf-8", "backslashreplace"))))
            text = b""
            if i is not None:
                parts.append("<eos>" if i == tokenizer.eos_id else f"<{i}>")
    return "".join(parts)


def _printable(character: str) -> str:
    sign = character.translate(VISIBLE)
    return sign if sign.isprintable() else character.encode("unicode_escape").decode("ascii")


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
