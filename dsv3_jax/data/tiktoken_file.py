"""A `tiktoken.model` of Kimi: its ranks, the pattern that splits a text, and the lengths that the library can bear."""

import base64
from collections.abc import Iterator
from pathlib import Path

from dsv3_jax.files import MAX_JSON, check_regular

# One alternative a line: Han; words without Han that begin with capitals, or are capitals; up to three digits;
# signs; line ends; spaces. Unlike in the patterns of OpenAI, a word has no Han characters.
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = (rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join([
    r"[\p{Han}]+",
    f"{_WORD}{_UPPER}*{_LOWER}+{_ENDING}",
    f"{_WORD}{_UPPER}+{_LOWER}*{_ENDING}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read the lines of a `tiktoken.model`: base64 of a token's bytes, and its rank."""
    # Not by the library's reader, which keeps files in a cache by their path and would give back an older one.
    ranks = {}
    check_regular(file, MAX_JSON)
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f"tokenizer={str(file)!r} cannot be read: line {number} holds no token and rank"
            ) from error
    return ranks


def bounded(text: str, longest: int = 400_000, longest_run: int = 25_000) -> Iterator[str]:
    """Cut a text as Kimi's tokenizer does: after 400,000 characters, and runs with or without spaces after 25,000.

    The library's pattern search needs stack in proportion to a run's length.
    """
    for start in range(0, len(text), longest):
        part, begin, run = text[start : start + longest], 0, 0
        for i, character in enumerate(part):
            run = run + 1 if i and character.isspace() == part[i - 1].isspace() else 1
            if run > longest_run:
                yield part[begin:i]
                begin, run = i, 1
        yield part[begin:]
