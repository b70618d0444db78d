"""Hostile inputs: files and options changed at random, each read by a command.

    python -m tests.campaign.inputs --minutes 5 --seed 0

Case number n of a seed is the same in every run. `--only n` runs one case and prints its end.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from dsv3_jax.cli import convert, generate, info, stats, tokenizer, train
from dsv3_jax.config import replace
from dsv3_jax.data.tokenizer import train_bpe
from dsv3_jax.hf import files
from dsv3_jax.hf.config_json import config_to_dict
from dsv3_jax.hf.conversion import convert as convert_folder
from dsv3_jax.hf.table import tensor_table
from dsv3_jax.presets import preset
from tests.campaign.table import Table
from tests.campaign.trials import MAX_SENTENCE, trials
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
    kind = rng.randrange(11)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + b"\xff\xfe\x00" + data[at:]
    if kind == 3:
        return data[:at] + b"[" * 200_000 + data[at:]
    if kind == 4:
        return b"[" * 200_000 + b"]" * 200_000
    if kind == 5:
        return b"\xef\xbb\xbf" + data
    if kind == 6:
        return re.sub(rb"\d+", lambda m: b"9" * 5000, data, count=1)
    if kind == 7:
        return b""
    if kind == 8:
        return data[:at] + data[at:] * 2
    if kind == 9:
        names = ",".join(f'"k{i}":1' for i in range(40_000))
        return ("{" + names + ',"k39999":2}').encode()
    return b" " * 1_000_000 + data


def change_kind(path: Path, rng: random.Random) -> None:
    """Put something else than a file in a file's place."""
    path.unlink(missing_ok=True)
    kind = rng.randrange(8)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        with socket.socket(socket.AF_UNIX) as made:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path has a hundred bytes at most
            made.bind(path.name)
            os.chdir(here)
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.symlink_to("nowhere")
    elif kind == 5:
        path.symlink_to("/dev/zero")
    elif kind == 6:
        path.symlink_to("/dev/stdin")
    else:
        with path.open("wb") as file:
            file.truncate(20 << 30)  # a hole of 20 GiB


def change_json_file(path: Path, rng: random.Random) -> None:
    chance = rng.random()
    if chance < 0.75:
        path.write_text(json.dumps(change_document(json.loads(path.read_text()), rng)))
    elif chance < 0.92:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
    else:
        change_kind(path, rng)


def change_header(path: Path, rng: random.Random) -> None:
    """Change a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    chance = rng.random()
    if chance < 0.5:
        header = json.dumps(change_document(json.loads(header), rng)).encode()
    elif chance < 0.75:
        header = change_bytes(header, rng)
    elif chance < 0.9:
        path.write_bytes(change_bytes(raw, rng))
        return
    elif chance < 0.95:
        change_kind(path, rng)
        return
    length = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2**32, 2**63, 2**64 - 1, max(len(header) - 1, 0)])
    path.write_bytes(length.to_bytes(8, "little") + header + data)


def change_text(path: Path, rng: random.Random) -> None:
    """Change a chat template, a tiktoken.model or a text."""
    if rng.random() < 0.9:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
    else:
        change_kind(path, rng)


def change_jsonl(path: Path, rng: random.Random) -> None:
    chance = rng.random()
    if chance < 0.6:
        lines = path.read_text().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(change_document(json.loads(lines[at]), rng))
        path.write_text("\n".join(lines))
    elif chance < 0.9:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
    else:
        change_kind(path, rng)


# The base: good folders, which every case copies


def make_base(root: Path) -> None:
    """Write a released folder, a run and a folder of texts."""
    cfg = replace(
        preset("tiny"), dim=16, num_layers=2, num_dense_layers=1, dense_dim=16, num_heads=2, q_latent_dim=None,
        kv_latent_dim=8, nope_head_dim=4, rope_head_dim=4, v_head_dim=4, num_experts=4, experts_per_token=2,
        expert_dim=8, num_groups=1, groups_per_token=1, mtp_depth=1, vocab_size=300, max_positions=128,
    )  # fmt: skip
    released = root / "released"
    released.mkdir(parents=True)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
    config = config_to_dict(cfg) | {"eos_token_id": 0, "rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}}
    files.write_json(released / files.CONFIG, config)
    values = np.random.default_rng(0)

    table = tensor_table(cfg)
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    table = {name: row for name, row in table.items() if not (name.endswith(copies) and ".layers." in name)}
    tensors = (values.normal(size=shape).astype(dtype) for shape, dtype in table.values())
    files.write_shards(released, table, 20_000, tensors)
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
    file: str | None  # in the folder; it may be a pattern
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
OPTIONS = {
    ("info", "tiny"): info.Info,
    ("options", "tiny", "--out", "{out}"): train.Train,
    ("convert", "{in}", "{out}"): convert.Convert,
    ("generate", "{in}"): generate.Generate,
    ("stats", "{in}"): stats.Stats,
    ("tokenizer", "{out}/t.json", "--paths", "{in}"): tokenizer.TokenizerArgs,
}
VALUES = [*map(str, NUMBERS), *(text for text in TEXTS if "\0" not in text and "\ud800" not in text), "1e999", "0x10",
          "１", "--seed", "None", "true", "data=0", "data=99999999999", "a" * 1000]  # fmt: skip


def options_of(kind: type) -> dict[str, bool]:
    """The options of a dataclass, nested ones too: name → whether it is a switch, which takes no value."""
    return dict(_options(kind, ""))


def _options(kind: Any, prefix: str) -> Iterator[tuple[str, bool]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    for item in dataclasses.fields(kind):
        hint, name = hints[item.name], item.name.replace("_", "-")
        marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
        if tyro.conf.Positional in marks:
            continue
        if marks:
            hint = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(hint):
            flat = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _options(hint, prefix if flat else f"{prefix}{name}.")
            continue
        yield f"--{prefix}{name}", hint is bool
        if hint is bool:
            yield f"--{prefix}no-{name}", True


def make_case(base: Path, folder: Path, seed: int, number: int) -> tuple[str, list[str]]:
    """Write a case's input into an empty folder.

    Returns: (name of its campaign, the command's arguments).
    """
    rng = random.Random(f"{seed} {number}")
    name = [*TARGETS, "options"][number % (len(TARGETS) + 1)]
    if name == "options":
        start, kind = rng.choice(list(OPTIONS.items()))
        argv = [*start]
        for option, switch in rng.sample(sorted(options_of(kind).items()), rng.choice([1, 1, 2])):
            # To generate or count would compile a model: the folder is none, so the commands end before.
            argv += [option] if switch else [option, rng.choice(VALUES)]
        shutil.copytree(base / ("released" if start[0] == "convert" else "texts"), folder / "in")
    else:
        target = TARGETS[name]
        shutil.copytree(base / target.source, folder / "in", symlinks=True)
        argv = [*rng.choice(target.commands)]
        target.change(rng.choice(sorted((folder / "in").glob(target.file or "*"))), rng)
    return name, [word.format(**{"in": folder / "in", "out": folder / "out"}) for word in argv]


def is_broken(path: Path) -> bool:
    """Whether a command that ended well wrote NaN, infinity or no JSON."""

    def refuse(text: str) -> float:
        if not np.isfinite(float(text)):
            raise ValueError(text)
        return float(text)

    try:
        json.loads(path.read_text(), parse_constant=refuse, parse_float=refuse)
    except ValueError:
        return True
    return False


def faults_of(answer: Answer, folder: Path) -> list[str]:
    """Name what fell short in a case."""
    faults = [answer.fault] if answer.fault else []
    left = [path.name for path in folder.iterdir() if path.name not in ("in", "out")]
    if answer.code not in (0, None) and (left or (folder / "out").exists()):
        faults.append("half-written")
    if answer.code == 0 and any(name.endswith(HALF_WRITTEN) for name in left):
        faults.append("half-written")
    if answer.code == 2:
        sentences = [line for line in answer.err.splitlines() if line.startswith(("dsv3: ", "╭", "+-"))]
        if len(sentences) != 1 or len(sentences[0]) > MAX_SENTENCE or CONTROL.search(answer.err + answer.out):
            faults.append("sentences")
    elif answer.code not in (0, None):
        faults.append("tracebacks")
    if answer.code == 0 and any(map(is_broken, (folder / "out").rglob("*.json"))):
        faults.append("silent")
    return faults


def run(seconds: float, seed: int, table: Table, least: int = 1, only: int | None = None) -> None:
    """Run cases for so long, or one of them, and count them in the table."""
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as root, Worker() as worker:
        base, folder = Path(root, "base"), Path(root, "case")
        make_base(base)
        numbers = [only] if only is not None else (number for number, _ in trials("inputs", until, seed, table, least))
        for number in numbers:
            folder.mkdir()
            name, argv = make_case(base, folder, seed, number)
            answer = worker.run(argv)
            faults = faults_of(answer, folder)
            table.add(name, faults)
            if faults or only is not None:
                end = answer.err.strip()[-1500 if only is not None else -400 :]
                print(f"inputs: seed {seed}, case {number}, {name}: {', '.join(faults)} in {answer.seconds:.1f} s")
                print(f"  {' '.join(argv)[:300]!r}\n  {end!r}", flush=True)
            shutil.rmtree(folder)


def main() -> int:
    """Run this campaign alone, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None, help="number of a case")
    args = parser.parse_args()
    print(f"hostile inputs: seed {args.seed}, {args.minutes:g} minutes", flush=True)
    table = Table()
    run(args.minutes * 60, args.seed, table, only=args.only)
    print(table)
    return int(table.fell_short > 0)


if __name__ == "__main__":
    sys.exit(main())
