"""Shared by all campaigns: trials by number, processes that are watched, and faults that are printed."""

import argparse
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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
    if "Traceback (most recent call last)" in ended.err:  # beside the sentence, or before a good end
        return ["tracebacks"]
    sentences = [line for line in ended.err.splitlines() if line.startswith("dsv3: ")]
    return ["sentences"] if ended.code == 2 and (len(sentences) != 1 or len(sentences[0]) > MAX_SENTENCE) else []


# Trials


def trials(name: str, until: float, seed: int, table: Table, least: int = 1) -> Iterator[tuple[int, random.Random]]:
    """Yield numbers and their generators until a time of the monotonic clock, and `least` of them in any case."""
    first = number = table.first(name)
    while number < first + least or time.monotonic() < until:
        table.begin(name, number)
        yield number, random.Random(f"{name} {seed} {number}")
        number += 1


def report(name: str, seed: int, number: int, what: str, faults: list[str], said: str) -> None:
    """Print a fault and what repeats it."""
    if faults:
        end = said.strip()[-2500:]
        print(f"{name}: seed {seed}, trial {number}, {what}: {', '.join(faults)}\n  {end}", flush=True)


def main(name: str, run: Callable[[float, int, Table, int], None]) -> int:
    """Run a campaign alone, and print its table; 1 if it fell short or tried nothing."""
    parser = argparse.ArgumentParser(description=name)
    parser.add_argument("--minutes", type=float, default=2.0, help="with what is done before the first trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=int, default=1, help="trials, however long they take")
    parser.add_argument("--record", type=Path, help="file of the trials, which another call resumes from")
    args = parser.parse_args()
    print(f"{name}: seed {args.seed}, {args.minutes:g} minutes", flush=True)
    table = Table(args.record, args.seed)
    run(args.minutes * 60, args.seed, table, args.least)
    print(table)
    return int(table.fell_short > 0 or table.tried == 0)
