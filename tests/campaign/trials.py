"""What campaigns share: trials by number, processes that are watched, and faults that are printed."""

import argparse
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tests.campaign.table import Table

MAX_SENTENCE = 500


# Processes


class Ended(NamedTuple):
    """The end of a process."""

    code: int | None  # None: it was killed, because it hung
    out: str
    err: str
    seconds: float


def watch(process: subprocess.Popen, limit: float) -> Ended:
    """Wait for a process; kill it after `limit` seconds."""
    begin = time.monotonic()
    try:
        out, err = process.communicate(timeout=limit)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        (out, err), code = process.communicate(), None
    return Ended(code, out, err, time.monotonic() - begin)


def faults_of(ended: Ended, allowed: Sequence[int] = (0,)) -> list[str]:
    """Name what fell short: exit code 2 must come with one sentence, and others must be allowed."""
    if ended.code is None:
        return ["hangs"]
    if ended.code not in allowed:
        return ["not resumed" if ended.code == 2 else "tracebacks"]
    sentences = [line for line in ended.err.splitlines() if line.startswith("dsv3: ")]
    return ["sentences"] if ended.code == 2 and (len(sentences) != 1 or len(sentences[0]) > MAX_SENTENCE) else []


# Trials


def trials(name: str, seconds: float, seed: int, least: int = 1) -> Iterator[tuple[int, random.Random]]:
    """Yield numbers and their generators for so long, and `least` of them however long they take."""
    until, number = time.monotonic() + seconds, 0
    while number < least or time.monotonic() < until:
        yield number, random.Random(f"{name} {seed} {number}")
        number += 1


def report(name: str, seed: int, number: int, what: str, faults: list[str], said: str) -> None:
    """Print a fault and what repeats it."""
    if faults:
        end = said.strip()[-2500:]
        print(f"{name}: seed {seed}, trial {number}, {what}: {', '.join(faults)}\n  {end}", flush=True)


def main(name: str, run: Callable[[float, int, Table, int], None]) -> int:
    """Run a campaign alone, and print its table."""
    parser = argparse.ArgumentParser(description=name)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=int, default=1, help="trials, however long they take")
    args = parser.parse_args()
    print(f"{name}: seed {args.seed}, {args.minutes:g} minutes", flush=True)
    table = Table()
    run(args.minutes * 60, args.seed, table, args.least)
    print(table)
    return int(table.fell_short > 0)
