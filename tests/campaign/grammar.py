"""Changes of a file by what its content is: JSON or lines of it, text, bytes."""

import contextlib
import json
import re
import tomllib
from pathlib import Path
from random import Random
from typing import Any

HOSTILE = tomllib.loads(Path(__file__).with_name("hostile.toml").read_text())
NUMBERS, PARTS = (list(map(json.loads, HOSTILE[name])) for name in ("values", "parts"))
TEXTS = [*HOSTILE["texts"], "é" * 300, "a b\n" * 10**6, "9" * 5000, "e\u0301" * 10**5]


def value_near(old: Any, rng: Random) -> Any:
    """A value in another's place: of its type near or at a limit, or of another type."""
    near = [None, True, [], {}, [old], {"a": old}]
    near += map(rng.choice, (TEXTS, NUMBERS, PARTS))
    if isinstance(old, int | float):
        near += [old - 1, old + 1, -old, float(old), str(old), *NUMBERS]
    if isinstance(old, str):
        text, block = rng.choice(TEXTS), rng.choice(HOSTILE["blocks"])
        near += [text, block, old + text, old[: len(old) // 2], f"../{old}", f"/{old}"]
    if isinstance(old, list):
        near += [old[:-1], old[::-1], old * 300]
    if isinstance(old, dict):
        near += [list(old.items()), dict(reversed(old.items())), dict.fromkeys(old, old)]
    return rng.choice(near)


def change_json(data: bytes, rng: Random) -> bytes:
    """Change a value or a key of a document, or of one of its lines, at any depth."""
    lines = data.splitlines() if data.count(b"\n{") else [data]
    documents = list(map(json.loads, lines))
    parent = documents if len(documents) > 1 else documents[0]
    while True:
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        inner = parent[key]
        if not inner or not isinstance(inner, dict | list) or rng.random() < 0.3:
            break
        parent = inner

    how = rng.choice(["value", "value", "value", "absent", "often", "key"])
    if how == "absent":
        del parent[key]
    elif how == "often" and isinstance(parent, list):
        parent[key : key + 1] = [inner] * 10_000
    elif how == "key" and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = parent.pop(key)
    else:
        parent[key] = value_near(inner, rng)
    return "\n".join(map(json.dumps, documents)).encode()


def change_text(data: bytes, rng: Random) -> bytes:
    """Put something into a text: into a template a block between two tags."""
    text, puts = data.decode(), TEXTS
    at = rng.randrange(len(text) + 1)
    if tags := [match.end() for match in re.finditer(r"[%}]}", text)]:
        puts, at = HOSTILE["blocks"], rng.choice(tags)
    put = text[:at] + rng.choice(puts) + text[at:]
    return rng.choice([put.encode(), put.encode(), text.encode("utf-16"), data * 200])


def change_bytes(data: bytes, rng: Random) -> bytes:
    """Change bytes: flip a bit, cut, take out, zero, grow, or replace all."""
    at, size = rng.randrange(len(data) + 1), rng.choice([1, 8, 100, 10_000])
    before, cut, after = data[:at], data[at : at + size], data[at + size :]
    flipped = before + bytes(x ^ 1 << rng.randrange(8) for x in data[at : at + 1]) + data[at + 1 :]
    parts = [before, data[at:], before + after, before + bytes(len(cut)) + after, data + cut]
    return rng.choice([*[flipped] * 3, b"", *parts, data * 2, rng.randbytes(len(data))])


def change(data: bytes, rng: Random) -> tuple[str, bytes]:
    """Change a file's content. Returns: (what it was taken for, the new content)."""
    for name, kind in {"JSON": change_json, "text": change_text}.items():
        with contextlib.suppress(ValueError, IndexError, TypeError):  # it is of another kind
            if rng.random() < 0.8:
                return name, kind(data, rng)
    return "bytes", change_bytes(data, rng)
