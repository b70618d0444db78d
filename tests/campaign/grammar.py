"""Changes of a file by what it is: JSON's tree, lines, text, tables of Parquet, weights, bytes.

The kind is found in the content, so a new file of a known kind needs nothing here.
"""

import contextlib
import io
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import safetensors.numpy
from pyarrow import parquet

HOSTILE = tomllib.loads(Path(__file__).with_name("hostile.toml").read_text())
NUMBERS = [json.loads(text) for text in HOSTILE["values"]]
TEXTS = [*HOSTILE["texts"], *HOSTILE["escapes"], "\ud800", "é" * 300, "x" * 10_000]
LONG = ["a" * 10**6, "a b\n" * 10**6, "9" * 5000, "e\u0301" * 10**5]
GROWN = [f"{grown}{{{{ {use} }}}}" for grown in HOSTILE["grown"] for use in HOSTILE["uses"]]
BLOCKS = [*HOSTILE["blocks"], *(block.replace(" v =", " w =") + block for block in GROWN)]
DEPTHS = [64, 300, 600, 930, 1000, 200_000]  # Python's recursion ends at some hundreds
PARTS = [json.loads(part) for part in HOSTILE["parts"]]  # of a tokenizer
PARTS += [
    {"type": kind, "pattern": {"Regex": pattern}, "content": "$0$0", "behavior": "Isolated"}
    for kind in ("Replace", "Split")
    for pattern in HOSTILE["patterns"]
]
COLUMNS = {  # types of a table, and a value at their limits
    pa.timestamp("s"): 2**62,
    pa.date64(): 2**62,
    pa.binary(): b"\xff",
    pa.large_string(): "x" * 10**5,
    pa.float64(): float("nan"),
    pa.uint64(): 2**64 - 1,
    pa.null(): None,
    pa.decimal256(76): 10**75,
    pa.map_(pa.string(), pa.int8()): [("a", 1), ("a", 2)],
    pa.list_(pa.string()): [None],
}


def value_near(old: Any, rng: Any) -> Any:
    """A value in another's place: of its type near or at a limit, or of another type."""
    near = [None, True, [], {}, "x", [old], {"a": old}, rng.choice(TEXTS), rng.choice(NUMBERS)]
    if rng.random() < 0.4 or isinstance(old, bool | None):
        return rng.choice(near)
    if isinstance(old, int | float):
        near = [old - 1, old + 1, -old, float(old), str(old), rng.choice(NUMBERS)]
    elif isinstance(old, str):
        texts = [old + rng.choice(TEXTS), rng.choice(TEXTS), rng.choice(BLOCKS), rng.choice(LONG)]
        near = [old[: len(old) // 2], f"../{old}", f"/{old}", *texts]
    elif isinstance(old, list):
        near = [old[:-1], old[::-1], old * 300, dict(enumerate(old))]
    else:
        near = [list(old.items()), dict(reversed(old.items())), dict.fromkeys(old, old)]
    return rng.choice(near)


def slots(value: Any, depth: int = 0) -> Iterator[tuple[int, Any, Any]]:
    """Yield (depth, list or dictionary, its index or key) of every value in a document."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield depth, value, key
            yield from slots(value[key], depth + 1)


def change_json(data: bytes, rng: Any) -> bytes:
    """Change a document's value or key; json.dumps can neither nest deep nor write a key twice."""
    document = json.loads(data)
    found = list(slots(document))
    how = rng.turn("near near near text nested absent absent key twin all part".split())
    if how == "part":  # of a tokenizer, also where none is yet
        parts = [x for x in found if x[1][x[2]] is None or "'type'" in str(x[1][x[2]])[:7]]
        found = parts or found
    depth = rng.choice(sorted({depth for depth, _, _ in found}))
    _, parent, key = rng.choice([slot for slot in found if slot[0] == depth])
    special = {"part": PARTS, "text": TEXTS, "nested": [f"@nested {n}@" for n in DEPTHS]}
    new = rng.choice(special[how]) if how in special else value_near(parent[key], rng)
    if how == "absent":
        del parent[key]
    elif how in ("key", "twin") and isinstance(parent, dict):
        name, value = (rng.choice(TEXTS), parent.pop(key)) if how == "key" else (key, new)
        parent[f"@twin {name}"] = value
    else:
        for one in [key] if how != "all" else parent if isinstance(parent, dict) else [0, -1]:
            parent[one] = new
    text = json.dumps(document, indent=rng.choice([None, 1])).replace('"@twin ', '"')
    return re.sub(r'"@nested (\d+)@"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), text).encode()


def change_lines(data: bytes, rng: Any) -> bytes:
    """Change lines of JSON: one of them, or how many there are."""
    lines = data.splitlines()
    assert all(map(json.loads, lines))
    at = rng.randrange(len(lines))
    one = change_json(lines[at], rng).replace(b"\n", b"")
    lines[at : at + 1] = rng.choice([*[[one]] * 5, [], [b""], [b"{}"], [one] * 10_000, [one[:-3]]])
    return rng.choice([b"\n", b"\n", b"\r\n"]).join(lines) + rng.choice([b"\n", b""])


def change_text(data: bytes, rng: Any) -> bytes:
    """Change text: in a template, mostly by a block between two tags."""
    text, puts = data.decode(), [*TEXTS[:-3], *LONG, "\ufeff"]
    at = rng.randrange(len(text) + 1)
    if "{%" in text and rng.random() < 0.8:
        puts, at = BLOCKS, rng.choice([0, *(m.end() for m in re.finditer(r"[%}]}", text))])
    put = (text[:at] + rng.choice(puts) + text[at:]).encode()
    windows, others = data.replace(b"\n", b"\r\n"), [data[:at], b"", b"a" * 2**26, data * 200]
    return rng.choice([*[put] * 7, *others, windows, text.encode("utf-16"), b"\xff" + data])


def change_table(data: bytes, rng: Any) -> bytes:
    """Change a table's column, also within a list of objects, to another type or storage."""
    table = parquet.read_table(io.BytesIO(data))
    kind, at = rng.turn(COLUMNS), rng.randrange(table.num_columns)
    column = pa.array([COLUMNS[kind]] * len(table), kind)
    if rng.random() < 0.5:
        column = pa.array([[{"role": "user", "content": x}] for x in column.to_pylist()])
    table, file = table.set_column(at, table.column_names[at], column), io.BytesIO()
    parquet.write_table(table, file, row_group_size=rng.choice([1, 7]))
    return file.getvalue()


def change_weights(data: bytes, rng: Any) -> bytes:
    """Change an array of weights, or one of its numbers."""
    arrays = safetensors.numpy.load(data)
    factor = rng.turn([0, -1, 1e4, 1e20, 1e38, float("-inf"), float("nan"), 1e-30])
    name = rng.choice([*arrays, *2 * [name for name in arrays if "gate." in name]])
    arrays[name] = arrays[name].copy()
    arrays[name][rng.choice([..., 0, -1])] *= factor
    return safetensors.numpy.save(arrays, {"format": "pt"})


def change_bytes(data: bytes, rng: Any) -> bytes:
    """Change bytes: flip bits, cut, take out, zero, grow, or replace all."""
    at, size = rng.randrange(len(data) + 1), rng.choice([1, 8, 100, 10_000])
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 3]) if data else 0):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    before, after = data[:at], data[at + size :]
    parts = [before, data[at:], before + after, before + bytes(min(size, len(data) - at)) + after]
    grown = [data + bytes(size), data * 2, rng.randbytes(len(data))]
    return rng.choice([*[bytes(flipped)] * 3, b"", *parts, *grown])


def change_slightly(data: bytes, rng: Any) -> bytes:
    """Let two different letters or digits change places, or two bytes where there are none."""
    letters = [m.start() for m in re.finditer(rb"[a-z0-9](?=[a-z0-9])", data[: 10**6])]
    found = range(len(data) // 2, len(data) - 1) if b"\0" in data or not letters else letters
    at = rng.choice([i for i in found if data[i] != data[i + 1]])
    return data[:at] + data[at : at + 2][::-1] + data[at + 2 :]


def change(data: bytes, rng: Any) -> tuple[str, bytes]:
    """Change a file's content. Returns: (the name of the change, the new content)."""
    # a change of another kind of file fails
    kinds = [change_weights, change_table, change_json, change_lines, change_text]
    for kind in kinds if rng.random() < 0.8 else ():
        with contextlib.suppress(Exception):
            return kind.__name__, kind(data, rng)
    return "change_bytes", change_bytes(data, rng)
