"""Changes of a file by what it is: JSON's tree, lines, templates, tables, weights, records, bytes.

The kind is found in the content, so a new file of a known kind needs nothing here.
"""

import contextlib
import functools
import io
import json
import operator
import re
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from pyarrow import parquet

NAN, INF = float("nan"), float("inf")
NUMBERS = [
    0, -1, 1, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**18, 10**101, 10**399,
    NAN, INF, -INF, 1e308, 5e-324, 0.5, -0.0,
]  # fmt: skip
ESCAPES = [
    "\x1b]52;c;QUJD\x07", "\x1b]0;t\x07", "\x1b[2J\x1b[H", "\x9b2J", "\u202egpj", "a\rb",
    "a\nb\x0bc\u2028d",
]  # fmt: skip
TEXTS = [
    "", " ", "\0", "\ud800", "../x", "/abs/x", "[/]", "[bold]", "{{ 1 }}", "%s{0}", "é" * 300, "١",
    *ESCAPES,
]  # fmt: skip
DEPTHS = [64, 300, 490, 600, 800, 930, 1000, 200_000]  # Python's recursion ends at some hundreds
LENGTHS, COUNTS = [1_000, 100_000, 2_000_000], [0, 1, 2, 300, 10_000]
HOSTILE = tomllib.loads(Path(__file__).with_name("hostile.toml").read_text())
NAMES = [*HOSTILE["names"], *ESCAPES, "\udcff", "\udce9t\udce9"]  # of files; not all are UTF-8
LONG_NAMES = ["n" * 200, "n" * 255, "é" * 128, "/".join(["d"] * 400), "/".join(["n" * 200] * 19)]
GROWN = [f"{grown}{{{{ {use} }}}}" for grown in HOSTILE["grown"] for use in HOSTILE["uses"]]
BLOCKS = [*HOSTILE["blocks"], *(block.replace(" v =", " w =") + block for block in GROWN)]
DOUBLE = {"type": "Replace", "pattern": {"Regex": "."}, "content": "ee"}
PARTS = [  # of a tokenizer
    *(
        {"type": "Replace", "pattern": {"String": text}, "content": "a" * 10**6}
        for text in ("a", "e", " ", "")
    ),
    *({"type": "Replace", "pattern": {"Regex": x}, "content": "$0$0"} for x in HOSTILE["patterns"]),
    *(
        {"type": "Split", "pattern": {"Regex": x}, "behavior": "Isolated", "invert": False}
        for x in HOSTILE["patterns"]
    ),
    {"type": "Sequence", "normalizers": [DOUBLE] * 40},
    {"type": "Prepend", "prepend": "\x1b[2J" * 10**4},
    {"type": "Sequence", "normalizers": [], "pretokenizers": []},
]
COLUMNS = {  # types of a table, and values at their limits
    pa.timestamp("s"): [2**62, 0],
    pa.timestamp("us"): [2**62, 0],
    pa.timestamp("ns", "Mars/Base"): [0, 1],
    pa.date32(): [2**31 - 1],
    pa.date64(): [2**62],
    pa.duration("s"): [2**62],
    pa.time64("ns"): [1, 7],
    pa.binary(): [b"\xff"],
    pa.large_string(): ["x" * 10**5],
    pa.float64(): [NAN],
    pa.bool_(): [True],
    pa.uint64(): [2**64 - 1],
    pa.null(): [None],
    pa.decimal256(76): [10**75],
    pa.list_(pa.int8()): [[], [1], None],
    pa.struct({"a": pa.int8()}): [{"a": 1}, None],
    pa.string(): ["", None, "\0", "x y" * 999, "\u202e"],
    pa.map_(pa.string(), pa.int8()): [[("a", 1), ("a", 2)]],
    pa.dictionary(pa.int8(), pa.string()): ["a", None],
    pa.list_(pa.string()): [["a"], [None]],
}
# what is changed
HOWS = "near near near text text nested nested absent absent key more twin all".split()


def dumps(document: Any, **words: Any) -> bytes:
    """Write JSON; json.dumps itself can neither nest deep nor write a key twice."""
    text = json.dumps(document, **words).replace('"@twin ', '"')
    return re.sub(r'"@nested (\d+)@"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), text).encode()


def value_near(old: Any, rng: Any) -> Any:
    """A value in another's place: of its type near or at a limit, or of another type."""
    if rng.random() < 0.4 or isinstance(old, bool | None):
        return rng.choice(
            [None, True, False, [], {}, "x", 1, [old], {"a": old}, rng.choice(TEXTS + NUMBERS)]
        )
    if isinstance(old, int | float):
        return rng.choice(
            [old - 1, old + 1, -old, old * 2, float(old), str(old), rng.choice(NUMBERS)]
        )
    if isinstance(old, str):
        grown = rng.choice(["a", "é ", "\n", old or "b"]) * rng.choice(LENGTHS)
        half = old[: len(old) // 2]
        texts = [rng.choice(BLOCKS), *rng.sample(TEXTS, 3), old + rng.choice(TEXTS)]
        return rng.choice([half, grown, "../" + old, "/" + old, old.upper(), *texts])
    if isinstance(old, list):
        return rng.choice(
            [old[:-1], old[::-1], old * rng.choice(COUNTS), [*old, old], dict(enumerate(old))]
        )
    return rng.choice([list(old.items()), {}, dict(reversed(old.items())), dict.fromkeys(old, old)])


def places(document: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value in a document, the whole last."""
    lists = enumerate(document) if isinstance(document, list) else ()
    for key, value in document.items() if isinstance(document, dict) else lists:
        yield from places(value, (*path, key))
    yield path


def change_json(document: Any, rng: Any) -> Any:
    """Change a document's value, key or order."""
    value_at = functools.partial(functools.reduce, operator.getitem)
    found = list(places(document))
    parts = [path for path in found if str(value_at(path, document)).startswith("{'type'")]
    if (how := rng.turn(HOWS + ["part"] * min(len(parts), 3))) == "part":  # also where none is yet
        found = parts + [path for path in found if value_at(path, document) is None]
    depth = rng.choice(sorted({len(path) for path in found}))
    path = rng.choice([path for path in found if len(path) == depth])
    if not path:
        return value_near(document, rng)
    parent, key, name = value_at(path[:-1], document), path[-1], rng.choice([*TEXTS, "x" * 10_000])
    new = value_near(parent[key], rng)
    others = {"text": name, "part": rng.choice(PARTS), "nested": f"@nested {rng.choice(DEPTHS)}@"}
    new = others.get(how, new)
    if how == "absent":
        del parent[key]
    elif how == "all":
        for one in parent if isinstance(parent, dict) else range(len(parent)):
            parent[one] = new
    elif how not in ("key", "more", "twin"):
        parent[key] = new
    elif isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), new)
    else:
        parent[f"@twin {key}" if how == "twin" else name] = parent.pop(key) if how == "key" else new
    return document


def change_lines(data: bytes, rng: Any) -> bytes:
    """Change lines of JSON: one of them, or how many there are."""
    lines = data.splitlines()
    documents = [json.loads(line) for line in lines]
    at = rng.randrange(len(lines))
    how = rng.turn(["one", "one", "one", "many", "every"])
    if how == "every":  # each answer may be empty
        text = rng.choice(re.findall(rb'(?<=: )"[^"]*"', data))
        return data.replace(text, dumps(value_near(json.loads(text), rng)))
    if how == "one":
        lines[at] = dumps(change_json(documents[at], rng))
    else:
        lines[at : at + 1] = rng.choice(
            [[], [b""], [b"{}"], [lines[at]] * rng.choice(COUNTS), [lines[at][:-3]]]
        )
    return rng.choice([b"\n", b"\n", b"\r\n"]).join(lines) + rng.choice([b"\n", b""])


def change_text(data: bytes, rng: Any) -> bytes:
    """Change text: in a template, mostly by a block between two tags."""
    at = rng.randrange(len(data) + 1)
    how = rng.turn(
        [*(BLOCKS if b"{%" in data else ()), "put", "put", "cut", "long", "lines", "code", "many"]
    )
    if how in BLOCKS:
        at = rng.choice([0, *(match.end() for match in re.finditer(rb"[%}]}", data))])
        return data[:at] + how.encode() + data[at:]
    if how == "put":
        texts = [
            *ESCAPES,
            "\ufeff",
            "a" * 10**6,
            "a b\n" * 10**6,
            "\0",
            "9" * 5000,
            "e\u0301" * 10**5,
        ]
        return data[:at] + rng.choice(texts).encode() + data[at:]
    if how == "code":
        return rng.choice(
            [b"\xff\xc3" + data, data.decode().encode("utf-16"), data.replace(b"\n", b"\r\n")]
        )
    return {
        "cut": data[: rng.choice([0, at])],
        "long": b"a" * 2**26,
        "lines": b"a\n" * 10**6,
        "many": data * 200,
    }[how]


def change_table(data: bytes, rng: Any) -> bytes:
    """Change a table's column, also within a list of objects, to another type or storage."""
    table = parquet.read_table(io.BytesIO(data))
    kind, at = rng.turn(COLUMNS), rng.randrange(table.num_columns)
    column = pa.array([rng.choice(COLUMNS[kind]) for _ in range(len(table))], kind)
    if kind == pa.binary() and rng.random() < 0.5:
        column = column.view(pa.string())  # text that is not UTF-8
    if rng.random() < 0.5:
        objects = pa.StructArray.from_arrays(
            [pa.array(["user"] * len(table)), column], ["role", "content"]
        )
        column = pa.ListArray.from_arrays(list(range(len(table) + 1)), objects)
    if rng.random() < 0.8:
        table = table.set_column(at, table.column_names[at], column)
    file, rows = io.BytesIO(), rng.choice([1, 7, 10**6])
    parquet.write_table(
        table, file, row_group_size=rows, compression=rng.choice(["none", "zstd", "gzip", "brotli"])
    )
    return file.getvalue()


def change_weights(data: bytes, rng: Any) -> bytes:
    """Change an array of weights, or one of its numbers."""
    arrays = safetensors.numpy.load(data)
    factor = rng.turn([0, -1, 1e4, 1e20, 1e38, -INF, NAN, 1e-30])
    name = rng.choice([*arrays, *2 * [name for name in arrays if "gate." in name]])
    arrays[name] = arrays[name].copy()
    arrays[name][rng.choice([..., 0, -1])] *= factor
    return safetensors.numpy.save(arrays, {"format": "pt"})


def change_records(data: bytes, rng: Any) -> bytes:
    """Change a record of a shard, and what the format itself adds to find such changes."""
    assert data and len(data) % 2**16 == 0  # else it is no shard
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        reader = ArrayRecordReader(file.name)
        records = reader.read(list(range(reader.num_records())))
        at = rng.randrange(len(records))
        records[at] = change_bytes(records[at], rng)
        writer = ArrayRecordWriter(file.name, "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        return Path(file.name).read_bytes()


def change_mood(data: bytes, rng: Any) -> bytes:
    """Let a reward function do something else when it is imported, or in a call."""
    assert data.startswith(b"# mood")
    when = rng.choice(["== -1", "== 0", "== 5", ">= 5", ">= 0"])
    return f"if n {when}:\n    {rng.turn(HOSTILE['moods'])}\n".encode()


def change_slightly(data: bytes, rng: Any) -> bytes:
    """Let two different letters or digits change places, or two bytes where there are none."""
    found = (
        [m.start() for m in re.finditer(rb"[a-z0-9](?=[a-z0-9])", data[: 10**6])]
        if b"\0" not in data
        else []
    )
    at = rng.choice(
        [i for i in found or range(len(data) // 2, len(data) - 1) if data[i] != data[i + 1]]
    )
    return data[:at] + data[at : at + 2][::-1] + data[at + 2 :]


def change_bytes(data: bytes, rng: Any) -> bytes:
    """Change bytes: flip bits, cut, take out, zero, grow, or replace all."""
    at = rng.randrange(len(data) + 1)
    size = rng.choice([1, 8, 100, 10_000])
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 3]) if data else 0):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    before, after = data[:at], data[at + size :]
    parts = [before, data[at:], before + after, before + bytes(min(size, len(data) - at)) + after]
    return rng.choice(
        [*[bytes(flipped)] * 3, b"", *parts, data + bytes(size), data * 2, rng.randbytes(len(data))]
    )


CHANGES = {
    "mood": change_mood,
    "weights": change_weights,
    "table": change_table,
    "records": change_records,
    "json": lambda data, rng: dumps(
        change_json(json.loads(data), rng), indent=rng.choice([None, 1])
    ),
    "lines": lambda data, rng: change_lines(data, rng) if data.strip() else b"{",
    "text": lambda data, rng: change_text(data.decode().encode(), rng),
    "bytes": change_bytes,
}


def change(data: bytes, rng: Any) -> tuple[str, bytes]:
    """Change a file's content. Returns: (what it was taken for, the new content)."""
    for kind in ["bytes"] if rng.random() < 0.2 else CHANGES:
        with contextlib.suppress(Exception):  # it is of another kind
            return kind, CHANGES[kind](data, rng)
    return "bytes", change_bytes(data, rng)
