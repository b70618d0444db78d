"""Shared by all campaigns: numbered trials, the table that they fill, and processes that are watched."""

import random
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MAX_SENTENCE = 500
# Column: what it counts. All but the first are to be 0.
COLUMNS = {
    "tried": "inputs, or events such as a kill",
    "tracebacks": "an error that is no sentence, or a crash",
    "hangs": "no answer within the limit",
    "memory": "more memory than the limit",
    "silent": "accepted, although it is known to be wrong",
    "half-written": "a failure that leaves files, or a part of a result at its place",
    "not resumed": "training that ends, although a checkpoint is whole",
    "sentences": "a message over 500 characters, or with control codes",
}


class Table:
    """Counts by kind of trial.

    Example:
        >>> table = Table()
        >>> table.add("config.json", [])
        >>> table.add("config.json", ["hangs"])
        >>> table.tried, table.fell_short
        (2, 1)
    """

    def __init__(self) -> None:
        self.rows: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, name: str, faults: Sequence[str], count: int = 1) -> None:
        """Count the trials of one name, and their faults."""
        self.rows[name].update({"tried": count})
        self.rows[name].update(faults)

    @property
    def tried(self) -> int:
        return sum(row["tried"] for row in self.rows.values())

    @property
    def fell_short(self) -> int:
        return sum(row.total() for row in self.rows.values()) - self.tried

    def __str__(self) -> str:
        total: Counter[str] = Counter()
        for row in self.rows.values():
            total.update(row)
        lines = ["| campaign | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
        for name, row in [*self.rows.items(), ("all", total)]:
            lines.append(f"| {name} | " + " | ".join(f"{row[column]:,}" for column in COLUMNS) + " |")
        return "\n".join(lines)


def trials(name: str, until: float, seed: int, least: int) -> Iterator[tuple[int, random.Random]]:
    """Yield numbers and their generators until a time of the monotonic clock, and `least` of them in any case."""
    number = 0
    while number < least or time.monotonic() < until:
        yield number, random.Random(f"{name} {seed} {number}")
        number += 1


def report(name: str, seed: int, number: int, what: str, faults: Sequence[str], said: str) -> None:
    """Print a fault and what repeats it."""
    if faults:
        end = said.strip()[-2500:]
        print(f"{name}: seed {seed}, trial {number}, {what}: {', '.join(faults)}\n  {end}", flush=True)


class Ended(NamedTuple):
    """The end of a process."""

    code: int | None  # None: it was killed, because it hung
    err: str
    seconds: float


def watch(process: subprocess.Popen, limit: float) -> Ended:
    """Wait for a process; kill it after `limit` seconds."""
    begin = time.monotonic()
    try:
        err, code = process.communicate(timeout=limit)[1], process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        err, code = process.communicate()[1], None
    return Ended(code, err, time.monotonic() - begin)


def faults_of(ended: Ended, allowed: Sequence[int] = (0,)) -> list[str]:
    """Name what fell short: exit code 2 must come with one sentence, and others must be allowed."""
    if ended.code is None:
        return ["hangs"]
    if ended.code not in allowed:
        return ["not resumed" if ended.code == 2 else "tracebacks"]
    if "Traceback (most recent call last)" in ended.err:  # beside the sentence, or before a good end
        return ["tracebacks"]
    sentences = [line for line in ended.err.splitlines() if line.startswith("dsv3: ")]
    return ["sentences"] if ended.code == 2 and (len(sentences) != 1 or len(sentences[0]) > MAX_SENTENCE) else []
