"""Numbers and text as people read them: decimal units, and control codes that are visible."""

import re
from collections.abc import Sequence

COUNTS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3), ("", 1.0))
BYTES = ((" TB", 1e12), (" GB", 1e9), (" MB", 1e6), (" KB", 1e3), (" B", 1.0))
_CODES = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
SECONDS = ((" s", 1.0), (" ms", 1e-3), (" µs", 1e-6))


def format_count(count: int | float) -> str:
    """Write a count with four significant digits, and K, M, B or T for powers of a thousand.

    Example:
        >>> [format_count(x) for x in (0, 999, 35_136, 1_234_567, 671e9, 1e16)]
        ['0', '999', '35.14K', '1.235M', '671B', '10,000T']
    """
    return _format(count, COUNTS, 4)


def format_bytes(count: int | float) -> str:
    """Write a number of bytes with four significant digits; 1 KB is 1,000 B.

    Example:
        >>> [format_bytes(x) for x in (12, 1_234_567, 80e9)]
        ['12 B', '1.235 MB', '80 GB']
    """
    return _format(count, BYTES, 4)


def format_seconds(seconds: int | float) -> str:
    """Write a duration in seconds with three significant digits.

    Example:
        >>> [format_seconds(x) for x in (2, 0.0123, 2e-6)]
        ['2 s', '12.3 ms', '2 µs']
    """
    return _format(seconds, SECONDS, 3)


def format_duration(seconds: int | float) -> str:
    """Write a duration as people say it.

    Example:
        >>> [format_duration(s) for s in (0.2, 4, 200, 9000, 2e5)]
        ['1 second', '4 seconds', '3 minutes', '2.5 hours', '2.3 days']
    """
    if seconds >= 172_800:
        return f"{seconds / 86_400:,.1f} days"
    if seconds >= 6000:
        return f"{seconds / 3600:.1f} hours"
    size, unit = (60, "minute") if seconds >= 100 else (1, "second")
    count = max(round(seconds / size), 1)
    return f"{count} {unit}{'s' if count > 1 else ''}"


def _format(value: int | float, units: Sequence[tuple[str, float]], digits: int) -> str:
    """Divide by the largest unit that does not exceed the value, else by the last unit."""
    unit, scale = next((pair for pair in units if value >= pair[1]), units[-1])
    scaled = value / scale
    whole = scaled >= 10**digits  # beyond the largest unit
    return f"{scaled:,.0f}{unit}" if whole else f"{scaled:.{digits}g}{unit}"


def shortened(text: str, most: int) -> str:
    """The text, or the beginning and the end of one that has more than `most` characters.

    Example:
        >>> shortened("to be or not to be", 10)
        'to be … to be'
    """
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def printable(text: str) -> str:
    """Write out codes that would steer a terminal or reorder a line: C0, C1, surrogates, bidi.

    Line ends and tabs stay.

    Example:
        >>> printable("é\\x1b[31m \\u202e\\n")
        'é\\\\x1b[31m \\\\u202e\\n'
    """
    return _CODES.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
