"""Damaged runs: the last checkpoint, metrics or run.json changed at random, then loaded by a reader and resumed.

A reader must refuse a damaged checkpoint in a sentence, or load what was saved. Training must end as the undisturbed
run did, from the checkpoint before. Rows that are whole must stay.
"""

import json
import os
import random
import shutil
from pathlib import Path

from tests.campaign.inputs import change_json_file, change_jsonl, change_text
from tests.campaign.small_runs import LAST, Base, base, last_json
from tests.campaign.trials import MAX_SENTENCE, Table, report, trials

ROWS = ("metrics.jsonl", "load.jsonl")
CASES = ("file of a checkpoint", "folder of a checkpoint", *ROWS, "file of a checkpoint", "run.json")


def flip_bits(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 8]) if content else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def damage(case: str, folder: Path, rng: random.Random) -> str:
    """Damage a part of a run; return what was done."""
    checkpoint, path = folder / "checkpoints" / str(LAST), folder / case
    changes = [flip_bits, change_text, delete]
    if case == "folder of a checkpoint":  # absent, or that of the checkpoint before
        inside, instead = rng.choice(["state", "data", "config"]), rng.random() < 0.5
        shutil.rmtree(checkpoint / inside)
        if instead:
            shutil.copytree(checkpoint.with_name(str(LAST // 2)) / inside, checkpoint / inside)
        return f"{inside}, {instead=}"
    if case == "file of a checkpoint":
        kind = rng.choice(["*", "config/*", "data/*", "state/**/*", "state/**/d/*"])
        path = rng.choice(sorted(path for path in checkpoint.glob(kind) if path.is_file()))
    elif case in ROWS:
        changes.append(change_jsonl)
    else:
        changes = [change_json_file]
    change = rng.choice(changes)
    change(path, rng)
    return f"{change.__name__} {path.relative_to(folder)}"


def lines_of(path: Path) -> list[str]:
    """Lines of a file; none if it is no regular file."""
    small = path.is_file() and path.stat().st_size < 1e7
    return path.read_bytes().decode(errors="replace").splitlines() if small else []


def faults_of(case: str, made: Base, folder: Path) -> tuple[list[str], str]:
    """(What fell short, what was said)."""
    answers = [made.ready.run(["load", str(folder)])]
    faults = [answers[0].fault] if answers[0].fault else []
    if answers[0].code == 0 and last_json(answers[0].out) != made.loaded:
        faults.append("silent")
    early = {name: [x for x in lines_of(made.stopped / name) if json.loads(x)["step"] <= LAST] for name in ROWS}
    kept = {name: set(lines) & set(lines_of(folder / name)) for name, lines in early.items()}
    answers.append(made.ready.run(["resume", str(folder), made.text]))
    if answers[1].fault:
        faults.append(answers[1].fault)
    elif answers[1].code == 2:
        others = [path for path in map(folder.joinpath, ROWS) if os.path.lexists(path) and not path.is_file()]
        refused = case == "run.json" or others
        faults += [] if refused else ["not resumed"]
    else:
        faults += compare(case, made, last_json(answers[1].out), folder, kept)
    sentences = [line for answer in answers if answer.code == 2 for line in answer.err.splitlines()]
    if any(len(line) > MAX_SENTENCE for line in sentences):
        faults.append("sentences")
    return faults, "\n".join(answer.err[-1000:] for answer in answers)


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
