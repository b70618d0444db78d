"""Two writers, dead locks, folders that move, and clocks that jump.

    python -m tests.campaign.writers --minutes 5 --seed 0

One of two processes in a folder trains, and the other ends in a sentence. The lock of a dead process is taken over. A
process whose folder is moved or deleted ends in a sentence. Training under a clock that jumps
or goes back (jumping_clock.c, compiled here; left out without a compiler) is killed, resumed, and ends as the
undisturbed run.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import runs

from dsv3_jax.cli.main import PATIENCE
from dsv3_jax.lock import LOCK_FILE
from dsv3_jax.training.held_save import HELD_S
from tests.campaign.small_runs import Base, base, ends_the_same, half_written, last_json, limit_of
from tests.campaign.table import Table
from tests.campaign.trials import faults_of, main, report, trials, watch

CASES = (
    "two writers",
    "locks",
    "moved",
    "locks",
    "clock",
    "locks",
    "jumping clock",
    "locks",
    "backward clock",
    "locks",
)
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


@cache
def clock_library(root: Path) -> str:
    """Compile the clock that jumps; "" without a compiler, or where it cannot be loaded first."""
    built = root / "jumping_clock.so"
    words = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    source = str(Path(__file__).with_name("jumping_clock.c"))
    if words is None or subprocess.run([words, "-O1", "-fPIC", "-shared", source, "-o", str(built)]).returncode:
        print("writers: the jumping clock is left out: there is no C compiler")
        return ""
    test = [sys.executable, "-c", "import time; print(time.time() < 1.6e9)"]
    done = subprocess.run(test, env=os.environ | {"LD_PRELOAD": str(built)}, capture_output=True, text=True)
    if done.stdout.strip() != "True":
        print("writers: the jumping clock is left out: this system does not load it")
        return ""
    return str(built)


JUMPING = """
import os, sys
os.execve(sys.executable, [sys.executable, "-m", "dsv3_jax.cli", *sys.argv[3:]],
          os.environ | {"LD_PRELOAD": sys.argv[1], "CLOCK_JUMPS": sys.argv[2]})
"""


def jumping_clock(made: Base, folder: Path, rng: random.Random) -> tuple[list[str], str]:
    """Train while the clock jumps, kill it, and resume it: by such a clock, one of ten years ago, or the right one."""
    library = clock_library(made.root)
    words = [library, str(rng.randrange(1, 1000))]
    first = runs.start([*words, *made.train(folder)], made.root, ("-c", JUMPING))
    time.sleep(rng.uniform(0.5, 1.0) * made.seconds)
    first.kill()
    watch(first, 30)
    faults = half_written(folder)
    words[1] = rng.choice([words[1], "0"])
    program = rng.choice([("-c", JUMPING), ("-m", "dsv3_jax.cli")])
    argv = [*(words if program[0] == "-c" else []), *made.train(folder)]
    ended = watch(runs.start(argv, made.root, program), limit_of(made))
    if ended.code == 2 and program[0] == "-c":  # Orbax limits a save's time by this clock: a jump may end it
        faults += faults_of(ended, (2,)) + half_written(folder)
        ended = watch(runs.start(made.train(folder), made.root), limit_of(made))
    faults += faults_of(ended) or [*half_written(folder), *ends_the_same(made, folder)]
    return faults, ended.err


def backward_clock(made: Base, folder: Path, rng: random.Random) -> tuple[list[str], str]:
    """Train while the clock goes back by an hour a second, kill it once, and let it end.

    It may end in the sentence that such a clock holds a save up; then it must end by the right clock.
    """
    argv = [clock_library(made.root), "back", *made.train(folder)]
    first = runs.start(argv, made.root, ("-c", JUMPING))
    time.sleep(rng.uniform(0.5, 1.0) * made.seconds)
    first.kill()
    watch(first, 30)
    faults = half_written(folder)
    ended = watch(runs.start(argv, made.root, ("-c", JUMPING)), HELD_S + PATIENCE + limit_of(made))
    if ended.code == 2 and "the clock was set back" in ended.err:
        faults += faults_of(ended, (2,)) + half_written(folder)
        ended = watch(runs.start(made.train(folder), made.root), limit_of(made))
    faults += faults_of(ended) or [*half_written(folder), *ends_the_same(made, folder)]
    return faults, ended.err


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
    functions = {
        "two writers": two_writers,
        "locks": locks,
        "moved": moved,
        "clock": clock,
        "jumping clock": jumping_clock,
        "backward clock": backward_clock,
    }
    for number, rng in trials("writers", until, seed, table, least):
        folder, case = made.root / "writers", CASES[number % len(CASES)]
        if case in ("jumping clock", "backward clock") and not clock_library(made.root):
            continue
        folder.mkdir()
        faults, said = functions[case](made, folder / "run", rng)
        table.add(f"writers: {case}", faults)
        report("writers", seed, number, case, faults, said)
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main("writers", run))
