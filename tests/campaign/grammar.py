"""Changes of a file by what it is: JSON by its tree, lines, templates, headers and bytes.

The kind is found in the content, so a new file of a known kind needs nothing here.
"""

import functools
import json
import operator
import random
import re
from collections.abc import Iterator
from typing import Any

NAN, INF = float("nan"), float("inf")
NUMBERS = [0, -1, 1, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**18, 10**101, 10**399, NAN, INF, -INF, 1e308, 5e-324,
           0.5, -0.0]  # fmt: skip
ESCAPES = ["\x1b]52;c;QUJD\x07", "\x1b]0;t\x07", "\x1b[2J\x1b[H", "\x9b2J", "\u202egpj", "a\rb", "a\nb\x0bc\u2028d"]
TEXTS = ["", " ", "\0", "\ud800", "../x", "/abs/x", "[/]", "[bold]", "{{ 1 }}", "%s{0}", "é" * 300, "١", *ESCAPES]
NAMES = [text for text in TEXTS if text and len(text) < 80 and not set(text) & set("/\0\ud800")]  # of files
DEPTHS = [10, 63, 64, 65, 300, 490, 600, 800, 930, 1000, 3000, 200_000]  # Python's recursion ends at some hundreds
LENGTHS, COUNTS = [1_000, 100_000, 2_000_000], [0, 1, 2, 300, 10_000]
LOOPS = "{% for a in range(10**5) %}{% for b in range(10**5) %}{% endfor %}{% endfor %}"
BLOCKS = [
    "{{ 'a' * 10**9 }}", "{{ 1 / 0 }}", "{{ messages[99].content.x }}", "{{ raise_exception('\x1b]0;x\x07 no') }}",
    "{{ ''.__class__.__mro__ }}", "{% include 'run.json' %}", "{% if %}", "{{ range(10**12) | list }}", "{#",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages | tojson(indent=10**8) }}", "{% endfor %}",
    "{{ ['a' * 10**4] * 10**6 }}", "{{ '%1000000000d' % 1 }}", "\ufeff", "{{ 10 ** 10 ** 9 }}", LOOPS,
]  # fmt: skip


class Twin(str):
    """A key that is unlike an equal one, so that an object holds a key twice."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def dumps(document: Any, **words: Any) -> bytes:
    """Write JSON; json.dumps itself cannot nest deep."""
    text = json.dumps(document, **words)
    return re.sub(r'"@nested (\d+)@"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), text).encode()


def value_near(old: Any, rng: random.Random) -> Any:
    """A value in another's place: of its type near or at a limit, or of another type."""
    if rng.random() < 0.4 or isinstance(old, bool | None):
        nested = f"@nested {rng.choice(DEPTHS)}@"
        return rng.choice([None, True, False, [], {}, "x", 1, [old], {"a": old}, nested, rng.choice(TEXTS + NUMBERS)])
    if isinstance(old, int | float):
        return rng.choice([old - 1, old + 1, -old, old * 2, float(old), str(old), rng.choice(NUMBERS)])
    if isinstance(old, str):
        grown, half = rng.choice(["a", "é ", "\n", old or "b"]) * rng.choice(LENGTHS), old[: len(old) // 2]
        texts = [rng.choice(BLOCKS), *rng.sample(TEXTS, 3), old + rng.choice(TEXTS)]
        return rng.choice([half, grown, "../" + old, "/" + old, old.upper(), *texts])
    if isinstance(old, list):
        return rng.choice([old[:-1], old[::-1], old * rng.choice(COUNTS), [*old, old], dict(enumerate(old))])
    return rng.choice([list(old.items()), {}, dict(reversed(old.items())), dict.fromkeys(old, old)])


def places(document: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value in a document, the whole last."""
    lists = enumerate(document) if isinstance(document, list) else ()
    for key, value in document.items() if isinstance(document, dict) else lists:
        yield from places(value, (*path, key))
    yield path


def change_json(document: Any, rng: random.Random) -> Any:
    """Change a document's value, key or order."""
    found = list(places(document))
    depth = rng.choice(sorted({len(path) for path in found}))
    path = rng.choice([path for path in found if len(path) == depth])
    if not path:
        return value_near(document, rng)
    parent = functools.reduce(operator.getitem, path[:-1], document)
    key, near, action = path[-1], value_near(parent[path[-1]], rng), rng.random()
    if action < 0.6:
        parent[key] = near
    elif action < 0.75:
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), near)
    elif action < 0.85:
        parent[rng.choice([*TEXTS, key + "x", key.upper()])] = parent.pop(key)
    else:
        parent[rng.choice([*TEXTS, "a" * 10_000, *[Twin(key)] * 9])] = near
    return document


def change_lines(data: bytes, rng: random.Random) -> bytes:
    """Change lines of JSON: one of them, or how many there are."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    others = [], [b""], [b"{}"], [lines[at]] * rng.choice(COUNTS), [lines[at][:-3]]
    changed = dumps(change_json(json.loads(lines[at]), rng))
    lines[at : at + 1] = [changed] if rng.random() < 0.75 else rng.choice(others)
    return rng.choice([b"\n", b"\n", b"\r\n"]).join(lines) + rng.choice([b"\n", b""])


def change_text(data: bytes, rng: random.Random) -> bytes:
    """Change text: in a template, mostly by a block between two tags."""
    at, long = rng.randrange(len(data) + 1), b"a" * rng.choice([10**7, 2 * 10**8])
    if b"{%" in data and rng.random() < 0.8:
        at = rng.choice([0, *(match.end() for match in re.finditer(rb"[%}]}", data))])
        return data[:at] + rng.choice(BLOCKS).encode() + data[at:]
    inside = rng.choice([*ESCAPES, "\ufeff", "a" * 10**6, "a b\n" * 10**6, "\0", "9" * 5000, "e\u0301" * 10**5])
    put = data[:at] + inside.encode() + data[at:]
    lines = data.replace(b"\n", b"\r\n")
    return rng.choice(
        [b"", data[:at], lines, b"\xff\xc3" + data, data * 200, data.decode().encode("utf-16"), long, put, put, put]
    )


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change bytes: flip bits, cut, take out, zero, grow, or replace all."""
    at, size, flipped = rng.randrange(len(data) + 1), rng.choice([1, 8, 100, 10_000]), bytearray(data)
    for _ in range(rng.choice([1, 1, 3]) if data else 0):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    before, after = data[:at], data[at + size :]
    parts = [before, data[at:], before + after, before + bytes(min(size, len(data) - at)) + after]
    return rng.choice([*[bytes(flipped)] * 3, b"", *parts, data + bytes(size), data * 2, rng.randbytes(len(data))])


def change_header(data: bytes, rng: random.Random) -> bytes:
    """Change JSON behind its length, as safetensors begin."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = dumps(change_json(json.loads(data[8:end]), rng))
    return len(header).to_bytes(8, "little") + header + data[end:]


CHANGES = {
    "json": lambda data, rng: dumps(change_json(json.loads(data), rng), indent=rng.choice([None, 1])),
    "lines": lambda data, rng: change_lines(data, rng) if [json.loads(line) for line in data.splitlines()] else b"{",
    "header": change_header, "text": lambda data, rng: change_text(data.decode().encode(), rng), "bytes": change_bytes,
}  # fmt: skip


def change(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Change a file's content. Returns: (what it was taken for, the new content)."""
    for kind in ["bytes"] if rng.random() < 0.2 else CHANGES:
        try:
            return kind, CHANGES[kind](data, rng)
        except (ValueError, OverflowError, MemoryError):
            continue
    return "bytes", change_bytes(data, rng)
