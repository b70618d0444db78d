"""Two writers, dead locks, folders that move, and files of another time.

    python -m tests.campaign.writers --minutes 5 --seed 0

One of two processes in a folder trains, and the other ends in a sentence. The lock of a dead process is taken over. A
process whose folder is moved or deleted ends in a sentence.
"""

import json
import os
import random
import shutil
import socket
import sys
import time
from pathlib import Path

import runs

from dsv3_jax.lock import LOCK_FILE
from tests.campaign.small_runs import Base, base, ends_the_same, half_written, last_json, limit_of
from tests.campaign.table import Table
from tests.campaign.trials import faults_of, main, report, trials, watch

CASES = ("two writers", "locks", "moved", "locks", "clock", "locks")
LONG = {"steps": 100_000, "save_every": 1}  # does not end by itself


def two_writers(made: Base, folder: Path, rng: random.Random) -> tuple[list[str], str]:
    """Start two processes in one folder."""
    first = runs.start(made.train(folder), made.root)
    time.sleep(rng.choice([0, rng.uniform(0, made.seconds)]))
    second = runs.start(made.train(folder), made.root)
    ended = [watch(process, 2 * limit_of(made)) for process in (first, second)]
    faults = [fault for one in ended for fault in faults_of(one, (0, 2))]
    if not faults and all(one.code == 2 for one in ended):
        faults.append("not resumed")
    if any(one.code == 2 and "is in use by process" not in one.err for one in ended):
        faults.append("sentences")
    return faults or ends_the_same(made, folder), "\n".join(one.err[-300:] for one in ended)


def locks(made: Base, folder: Path, rng: random.Random) -> tuple[list[str], str]:
    """Leave a lock file as a dead process, another host or a crash would; then resume."""
    shutil.copytree(made.stopped, folder)
    since = rng.choice(["2001-01-01 00:00:00+00:00", "2101-01-01 00:00:00+00:00", 7, None])
    host = rng.choice([socket.gethostname(), "elsewhere", 7])
    record = {"pid": rng.choice([1, os.getpid(), 2**22 + 9, 10**30]), "host": host, "since": since}
    text = json.dumps(record)
    text = rng.choice([text, text, text[: rng.randrange(len(text))], "[" * 9999, "null", "\x00" * 99])
    (folder / LOCK_FILE).write_text(text)
    answer = made.ready.run(["resume", str(folder), made.text])
    if answer.code != 0:
        return [answer.fault or "not resumed"], answer.err
    return [] if last_json(answer.out) == made.digest else ["silent"], answer.err


def clock(made: Base, folder: Path, rng: random.Random) -> tuple[list[str], str]:
    """Resume a run whose files, metrics and checkpoints are of the future, or of 1970."""
    shutil.copytree(made.stopped, folder)
    when = rng.choice([0, 4_000_000_000, time.time() + rng.uniform(0, 1e6)])
    for path in [folder, *folder.rglob("*")]:
        if rng.random() < 0.8:
            os.utime(path, (when, when))
    metadata = folder / "checkpoints" / "8" / "_CHECKPOINT_METADATA"
    values = json.loads(metadata.read_text())
    values["commit_timestamp_nsecs"] = int(when * 1e9)
    metadata.write_text(json.dumps(values))
    answer = made.ready.run(["runs", "list", str(folder.parent)])
    faults = [answer.fault or "not resumed"] if answer.code != 0 else []
    answer = made.ready.run(["resume", str(folder), made.text])
    if answer.code != 0:
        return [*faults, answer.fault or "not resumed"], answer.err
    return faults if last_json(answer.out) == made.digest else [*faults, "silent"], answer.err


def moved(made: Base, folder: Path, rng: random.Random) -> tuple[list[str], str]:
    """Move or delete the folder under a running process."""
    process = runs.start(made.train(folder, **LONG), made.root)
    until = time.monotonic() + limit_of(made)
    while not (folder / "checkpoints" / "1").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 1))
    away = folder.with_name("away")
    try:
        folder.rename(away)
    except OSError as error:
        process.kill()
        return ["not resumed"], f"{error}: {watch(process, 30).err}"
    faults = half_written(away)
    if rng.random() < 0.5:
        shutil.rmtree(away)
    ended = watch(process, limit_of(made))
    faults += faults_of(ended, (2,))
    if ended.code == 2 and "was moved or deleted" not in ended.err:
        faults.append("sentences")
    return faults, ended.err


def run(seconds: float, seed: int, table: Table, least: int = 1) -> None:
    """Start writers for so long."""
    until = time.monotonic() + seconds
    made = base()
    functions = {"two writers": two_writers, "locks": locks, "moved": moved, "clock": clock}
    for number, rng in trials("writers", until, seed, table, least):
        folder, case = made.root / "writers", CASES[number % len(CASES)]
        folder.mkdir()
        faults, said = functions[case](made, folder / "run", rng)
        table.add(f"writers: {case}", faults)
        report("writers", seed, number, case, faults, said)
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main("writers", run))
