"""Hostile inputs: files and options changed at random, each read by a command.

Trial number n of a seed is the same in every run.
"""

import json
import os
import random
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from models import random_model

from dsv3_jax import hf
from dsv3_jax.config import replace
from dsv3_jax.data.tokenizer import train_bpe
from dsv3_jax.hf import files
from dsv3_jax.hf.config_json import config_to_dict
from dsv3_jax.hf.conversion import convert as convert_folder
from dsv3_jax.hf.open_model import load_text
from dsv3_jax.presets import preset
from tests.campaign.trials import MAX_SENTENCE, Table, report, trials
from tests.campaign.watch import Answer, Worker

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
HALF_WRITTEN = (".part", ".part.old")
NAN, INF = float("nan"), float("inf")
BIG_INTEGERS = [2**31, 2**32, 2**63, 2**64, 10**9, 10**18, 10**399]
NUMBERS = [NAN, INF, -INF, 1e308, -1e308, 1e-320, 0, -1, 1, 2, 0.5, -0.0, *BIG_INTEGERS]
TEXTS = ["", "a" * 10_000, "\x1b[31mred", "\ud800", "[/]", "[slug]", "$x^$", "../x", "a\0b", "a\nb", "\u202e", "bytes"]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def hostile_value(rng: random.Random) -> Any:
    """A value to put in another's place."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice([None, True, False, [], {}, [[]], {"a": 1}, nested(300), [1] * 1000, {"": None}])
    return rng.choice([rng.randrange(-3, 300), rng.uniform(-2, 2), 10.0 ** rng.uniform(-40, 40)])


# Changes of a JSON document


def places(document: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value in a document."""
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def change_document(document: Any, rng: random.Random) -> Any:
    """Change some values of a document in place, and return it."""
    if rng.random() < 0.03:
        return hostile_value(rng)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        found = list(places(document))
        if not found:
            break
        top = [path for path in found if len(path) == 1]
        *parents, key = rng.choice(top if rng.random() < 0.5 else found)
        parent = document
        for step in parents:
            parent = parent[step]
        action = rng.random()
        if action < 0.7:
            parent[key] = hostile_value(rng)
        elif action < 0.85:
            del parent[key]
        elif isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = parent[key]
        else:
            parent.append(parent[key])
    return document


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change a file without regard to what it holds."""
    at = rng.randrange(len(data) + 1)
    names = ",".join(f'"k{i}":1' for i in range(40_000))
    return rng.choice([
        data[:at],
        data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        data[:at] + b"\xff\xfe\x00" + data[at:],
        data[:at] + b"[" * 200_000 + data[at:],
        *(b"[" * depth + b"]" * depth for depth in (500, 200_000)),
        b"\xef\xbb\xbf" + data,
        re.sub(rb"\d+", lambda match: b"9" * 5000, data, count=1),
        b"",
        data[:at] + data[at:] * 2,
        ("{" + names + ',"k39999":2}').encode(),
        b" " * 1_000_000 + data,
    ])  # fmt: skip


def change_kind(path: Path, rng: random.Random) -> None:
    """Put something else than a file in a file's place."""
    path.unlink(missing_ok=True)
    kind = rng.choice(["pipe", "socket", "folder", path.name, "nowhere", "/dev/zero", "/dev/stdin", "hole"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path has a hundred bytes at most
            made.bind(path.name)
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    elif kind == "hole":
        with path.open("wb") as file:
            file.truncate(20 << 30)  # 20 GiB
    else:
        path.symlink_to(kind)


def change_json_file(path: Path, rng: random.Random) -> None:
    """Change a JSON document, or its bytes, or what kind of file it is."""
    chance = rng.random()
    if chance < 0.75:
        path.write_text(json.dumps(change_document(json.loads(path.read_text()), rng)))
    else:
        change_text(path, rng)


def change_header(path: Path, rng: random.Random) -> None:
    """Change a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    if rng.random() < 0.3:
        change_text(path, rng)
        return
    changed = json.dumps(change_document(json.loads(header), rng)).encode()
    header = changed if rng.random() < 0.7 else change_bytes(header, rng)
    length = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2**32, 2**63, 2**64 - 1, max(len(header) - 1, 0)])
    path.write_bytes(length.to_bytes(8, "little") + header + data)


def change_text(path: Path, rng: random.Random) -> None:
    """Change a file's bytes, or what kind of file it is."""
    if rng.random() < 0.8:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
    else:
        change_kind(path, rng)


def change_jsonl(path: Path, rng: random.Random) -> None:
    """Change a line, or the file's bytes, or its kind."""
    if rng.random() < 0.4:
        change_text(path, rng)
        return
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(change_document(json.loads(lines[at]), rng))
    path.write_text("\n".join(lines))


# The base: good folders, which every case copies


def make_base(root: Path) -> None:
    """Write a released folder, a run and a folder of texts."""
    cfg = replace(
        preset("tiny"), dim=16, num_layers=2, num_dense_layers=1, dense_dim=16, num_heads=2, q_latent_dim=None,
        kv_latent_dim=8, nope_head_dim=4, rope_head_dim=4, v_head_dim=4, num_experts=4, experts_per_token=2,
        expert_dim=8, num_groups=1, groups_per_token=1, mtp_depth=1, vocab_size=300, max_positions=128,
    )  # fmt: skip
    released = root / "released"
    root.mkdir()
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
    more = {"eos_token_id": 0, "rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}}
    hf.save(random_model(cfg), released, shard_bytes=20_000, quiet=True)
    files.write_json(released / files.CONFIG, config_to_dict(cfg) | more)
    texts = ["to be or not to be, that is the question", "x = 1\ny = x + 2", "une île était là", "[1, 2, 3]"] * 4
    train_bpe(texts, 300, str(released / "tokenizer.json"))
    special = {"content": "<eos>", "special": True}
    files.write_json(
        released / "tokenizer_config.json",
        {"eos_token": "<eos>", "bos_token": special, "add_bos_token": True, "model_max_length": 128},
    )
    files.write_json(released / "special_tokens_map.json", {"eos_token": "<eos>", "bos_token": special})
    files.write_json(
        released / "generation_config.json",
        {"temperature": 0.6, "top_p": 0.95, "top_k": 40, "do_sample": True, "eos_token_id": [0], "bos_token_id": 0},
    )
    (released / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    convert_folder(released, root / "run", quiet=True)
    (root / "texts" / "prose").mkdir(parents=True)
    for i, text in enumerate(texts):
        (root / "texts" / "prose" / f"{i}.txt").write_text(text + f" {i}")
    rows = [{"text": text + f" {i}", "domain": f"d{i % 3}", "id": i} for i, text in enumerate(texts)]
    (root / "texts" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


# Cases


@dataclass(frozen=True)
class Target:
    """A kind of input, how it is changed, and the commands that read it."""

    source: str  # folder of the base
    file: str  # in the folder; it may be a pattern
    change: Callable[[Path, random.Random], None]
    commands: tuple[tuple[str, ...], ...]  # {in} and {out} are the changed folder and a new one


TO_HF, TO_RUN = ("convert", "{in}", "{out}", "--dtype", "float32"), ("convert", "{in}", "{out}")
ENCODE = ("encode", "{in}", "to be <eos> or é")
LEARN = ("tokenizer", "{out}/t.json", "--vocab-size", "262", "--paths", "{in}")
TARGETS = {
    "config.json": Target("released", files.CONFIG, change_json_file, (TO_HF, TO_HF, TO_RUN)),
    "index": Target("released", files.INDEX, change_json_file, (TO_HF,)),
    "safetensors": Target("released", "*.safetensors", change_header, (TO_HF,)),
    "tokenizer.json": Target("released", "tokenizer.json", change_json_file, (ENCODE, TO_HF, TO_RUN)),
    "other text files": Target("released", "*_*.json", change_json_file, (ENCODE, TO_HF, TO_RUN)),
    "chat template": Target("released", "*.jinja", change_text, (ENCODE,)),
    "run.json": Target("run", "run.json", change_json_file, (("convert", "{in}", "{out}"), ENCODE)),
    "JSONL": Target("texts", "rows.jsonl", change_jsonl, (LEARN,)),
    "texts": Target("texts", "prose/*.txt", change_text, (LEARN,)),
}
STARTS = (
    ("info", "tiny"), ("train", "tiny", "--data.paths", "nowhere", "--out", "{out}"), ("convert", "nowhere", "{out}"),
    ("generate", "{in}"), ("chat", "{in}"), ("eval", "{in}"), ("stats", "{in}"), ("bench", "decode", "{in}"),
    ("tokenizer", "{out}/t.json", "--paths", "{in}"), ("data", "tokenize", "nowhere", "--out", "{out}"),
    ("runs", "list", "{in}"),
)  # fmt: skip
VALUES = [*map(str, NUMBERS), *(text for text in TEXTS if "\0" not in text and "\ud800" not in text), "1e999", "0x10",
          "１", "--seed", "None", "true", "data=0", "data=99999999999", "a" * 1000]  # fmt: skip


def encode(folder: str, text: str) -> int:
    load_text(folder).encode(text)
    return 0


COMMANDS = {"encode": encode}  # of the worker: it ends before a model is compiled


@cache
def options_of(worker: Worker, start: tuple[str, ...]) -> tuple[str, ...]:
    """The options that a command's own help names."""
    return tuple(sorted({*re.findall(r"--[a-z][\w.-]*", worker.run([*start, "--help"]).out)} - {"--help"}))


def make_case(base: Path, folder: Path, number: int, rng: random.Random, worker: Worker) -> tuple[str, list[str]]:
    """Write a case's input into an empty folder.

    Returns: (its name in the table, the command's arguments).
    """
    name = [*TARGETS, "options"][number % (len(TARGETS) + 1)]
    if name == "options":
        start = rng.choice(STARTS)
        argv = [*start]
        for option in rng.sample(options_of(worker, start), rng.choice([1, 1, 2]) if len(start) < 4 else 1):
            argv += [option, rng.choice(VALUES)] if rng.random() < 0.8 else [option]
        shutil.copytree(base / "texts", folder / "in")  # no model: nothing is compiled
    else:
        target = TARGETS[name]
        shutil.copytree(base / target.source, folder / "in", symlinks=True)
        argv = [*rng.choice(target.commands)]
        target.change(rng.choice(sorted((folder / "in").glob(target.file))), rng)
    return name, [word.format(**{"in": folder / "in", "out": folder / "out"}) for word in argv]


def is_broken(path: Path) -> bool:
    """Whether a command that ended well wrote NaN, infinity or no JSON."""
    try:
        json.loads(path.read_text(), parse_constant=lambda text: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return True
    return False


def faults_of(name: str, answer: Answer, folder: Path) -> list[str]:
    """Name what fell short in a case."""
    faults = [answer.fault] if answer.fault else []
    left = [path.name for path in folder.iterdir() if path.name not in ("in", "out")]
    if answer.code not in (0, None) and (left or (folder / "out").exists()):
        faults.append("half-written")
    if answer.code == 0 and any(name.endswith(HALF_WRITTEN) for name in left):
        faults.append("half-written")
    if answer.code == 2 and name == "options" and "For full helptext" in answer.err:  # tyro's words
        return faults
    if answer.code == 2:
        sentences = [line for line in answer.err.splitlines() if line.startswith("dsv3: ")]
        if len(sentences) != 1 or len(sentences[0]) > MAX_SENTENCE or CONTROL.search(answer.err + answer.out):
            faults.append("sentences")
    elif answer.code not in (0, None):
        faults.append("tracebacks")
    if answer.code == 0 and any(map(is_broken, (folder / "out").rglob("*.json"))):
        faults.append("silent")
    return faults


def run(until: float, seed: int, table: Table, least: int) -> None:
    """Run cases until a time, and count them in the table."""
    with tempfile.TemporaryDirectory() as root, Worker(__name__) as worker:
        base, folder = Path(root, "base"), Path(root, "case")
        make_base(base)
        for number, rng in trials("inputs", until, seed, least):
            folder.mkdir()
            name, argv = make_case(base, folder, number, rng, worker)
            answer = worker.run(argv)
            faults = faults_of(name, answer, folder)
            table.add(name, faults)
            report("inputs", seed, number, f"{name}, {' '.join(argv)[:300]!r}", faults, answer.err)
            shutil.rmtree(folder)
