"""Damaged runs: the last checkpoint, metrics or run.json changed at random, then loaded by a reader and resumed.

A reader must refuse a damaged checkpoint in a sentence, or load what was saved. Training must end as the undisturbed
run did, from the checkpoint before. Rows that are whole must stay.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.campaign.inputs import change_json_file, change_jsonl, change_kind
from tests.campaign.small_runs import LAST, Base, base, last_json
from tests.campaign.trials import MAX_SENTENCE, Table, report, trials

# Part of a checkpoint: patterns of its files.
PARTS = {
    "array files": ("state/**/d/*",),
    "data position": ("data/*",),
    "manifests": ("checksums.json", "state/**/manifest.ocdbt", "state/_METADATA", "state/_sharding"),
    "metadata": ("_CHECKPOINT_METADATA", "commit_success.txt", "config/*"),
}
ROWS = ("metrics.jsonl", "load.jsonl")
CASES = (*(f"checkpoint: {part}" for part in PARTS), "checkpoint: folder", *ROWS, "run.json")


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(max(len(content), 1))])


def flip_bits(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 8]) if content else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def insert(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    at = rng.randrange(len(content) + 1)
    path.write_bytes(content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:])


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (cut, flip_bits, flip_bits, insert, delete, change_kind)


def damage_folder(folder: Path, rng: random.Random) -> str:
    """Damage a checkpoint as a whole: empty it, delete a folder of it, or exchange it with the one before."""
    kind = rng.choice(["empty", "part", "mixed"])
    inside = rng.choice(["state", "data", "config"])
    if kind == "mixed":
        other = folder.with_name(str(LAST // 2)) / inside
        shutil.rmtree(folder / inside)
        shutil.copytree(other, folder / inside)
    else:
        shutil.rmtree(folder if kind == "empty" else folder / inside)
        folder.mkdir(exist_ok=True)
    return f"{kind} {inside}"


def damage(case: str, folder: Path, rng: random.Random) -> str:
    """Damage a part of a run; return what was done."""
    checkpoint = folder / "checkpoints" / str(LAST)
    if case == "checkpoint: folder":
        return damage_folder(checkpoint, rng)
    if case == "run.json":
        change_json_file(folder / case, rng)
        return case
    if case in ROWS and rng.random() < 0.5:
        change_jsonl(folder / case, rng)
        return case
    if case in ROWS:
        path = folder / case
    else:
        found = [path for pattern in PARTS[case.partition(": ")[2]] for path in checkpoint.glob(pattern)]
        path = rng.choice(sorted(path for path in found if path.is_file()))
    change = rng.choice(DAMAGES)
    change(path, rng)
    return f"{change.__name__} {path.relative_to(folder)}"


def lines_of(path: Path) -> list[str]:
    """Lines of a file; none if it is no regular file."""
    return (
        path.read_bytes().decode(errors="replace").splitlines() if path.is_file() and path.stat().st_size < 1e7 else []
    )


def early_rows(path: Path) -> set[str]:
    """Lines of a whole file that a run resumed from `LAST` keeps."""
    return {line for line in lines_of(path) if json.loads(line)["step"] <= LAST}


def faults_of(case: str, made: Base, folder: Path) -> tuple[list[str], str]:
    """(What fell short, what was said)."""
    answers = [made.ready.run(["load", str(folder)])]
    faults = [answers[0].fault] if answers[0].fault else []
    if answers[0].code == 0 and last_json(answers[0].out) != made.loaded:
        faults.append("silent")
    kept = {name: early_rows(made.stopped / name) & set(lines_of(folder / name)) for name in ROWS}
    answers.append(made.ready.run(["resume", str(folder), made.text]))
    if answers[1].fault:
        faults.append(answers[1].fault)
    elif answers[1].code == 2:
        refused = case == "run.json" or any(not is_regular(folder / name) for name in ROWS)
        faults += [] if refused else ["not resumed"]
    else:
        faults += compare(case, made, last_json(answers[1].out), folder, kept)
    sentences = [line for answer in answers if answer.code == 2 for line in answer.err.splitlines()]
    if any(len(line) > MAX_SENTENCE for line in sentences):
        faults.append("sentences")
    return faults, "\n".join(answer.err[-1000:] for answer in answers)


def is_regular(path: Path) -> bool:
    return path.is_file() or not (path.exists() or path.is_symlink())


def compare(case: str, made: Base, found: dict, folder: Path, kept: dict[str, set[str]]) -> list[str]:
    """Name what differs from the undisturbed run: in rows, only lines that were not damaged must be there."""
    same = all(found[key] == made.digest[key] for key in ("state", "place"))
    if case not in ROWS:
        return [] if same and found == made.digest else ["silent"]
    lost = any(kept[name] - set(lines_of(folder / name)) for name in ROWS)
    return [] if same and not lost else ["silent"]


def run(until: float, seed: int, table: Table, least: int) -> None:
    """Damage copies of a small run until a time."""
    made = base()
    for number, rng in trials("damage", until, seed, least):
        folder, case = made.root / "damaged", CASES[number % len(CASES)]
        shutil.copytree(made.stopped, folder)
        what = damage(case, folder, rng)
        faults, said = faults_of(case, made, folder)
        table.add(f"damaged {case}", faults)
        report("damage", seed, number, what, faults, said)
        shutil.rmtree(folder)
