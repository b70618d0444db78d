"""The pattern by which Kimi and Moonlight split a text; `tiktoken.model` does not hold it."""

# One alternative a line: Han; words without Han that begin with capitals, or are capitals; up to
# three digits; signs; line ends; spaces. Unlike in the patterns of OpenAI, a word has no Han
# characters.
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = (
    rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}")
)
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
