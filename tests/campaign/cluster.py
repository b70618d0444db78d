"""Two processes of one run over the loopback address, of which one is killed, stopped for a while, or set up wrongly.

    python -m tests.campaign.cluster --minutes 5 --seed 0

Each process is a supervisor and its worker. After the kill of either, or a stop longer than supervisor.PEER_TIMEOUT,
the other process ends in one sentence. After a shorter stop both finish. After a wrong setting both end in a sentence
and write nothing. No process may outlive its limit, checkpoints are whole, and one process then trains to the end.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import pairs
import runs

from dsv3_jax.cluster import supervisor
from dsv3_jax.config import RunConfig
from tests.campaign.small_runs import half_written
from tests.campaign.table import Table
from tests.campaign.trials import Ended, faults_of, main, report, trials, watch
from tests.campaign.watch import LIMIT_S

CASES = ("other settings", "worker killed", "stopped", "supervisor killed", "stopped", "stopped for long")
STOP_S = 15.0
# After a loss: PEER_TIMEOUT to notice it, GRACE to end, and the interpreter's own end on a busy machine.
END_S = supervisor.PEER_TIMEOUT + supervisor.GRACE + LIMIT_S
WRONG = (("--data.batch-size", "3"), ("--model.num-layers", "2"), ("--seed", "9"), ("--execution.layout.fsdp",))


def family(pid: int) -> list[int]:
    """A supervisor and its worker; the supervisor alone where there is no /proc."""
    try:
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except OSError:
        return [pid]


def signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def after_fault(ended: Ended) -> list[str]:
    """Faults of a process whose peer is lost, or that was itself the victim of a signal."""
    if ended.code is None:
        return ["hangs"]
    own = [line for line in ended.err.splitlines() if line.startswith("dsv3: ")]
    if "Traceback" in ended.err:
        return ["tracebacks"]
    return [] if ended.code in (0, -signal.SIGKILL) or len(own) == 1 else ["sentences"]


@cache
def seconds_of_a_pair(root: Path, run: RunConfig) -> float:
    """Seconds that an undisturbed pair takes here. It compiles what others find."""
    begin = time.monotonic()
    with pairs.pair(root, root / "warm", run) as both:
        assert [watch(process, 600).code for process in both] == [0, 0]
    shutil.rmtree(root / "warm")
    return time.monotonic() - begin


def trial(case: str, root: Path, folder: Path, run: RunConfig, rng: random.Random) -> tuple[list[str], str]:
    """Start two processes, disturb one, and wait for both."""
    slow = 10.0 if case == "other settings" else seconds_of_a_pair(root, run)  # the former do not compile
    victim = rng.randrange(2)
    more: list[tuple[str, ...]] = [(), ()]
    if case == "other settings":
        more[victim] = rng.choice(WRONG)
    with pairs.pair(root, folder, run, more=more) as both:
        what = f"process {victim}"
        if case != "other settings":
            what = disturb(case, both[victim], both[1 - victim], folder, rng)
        limit = LIMIT_S + 6 * slow if case in ("stopped", "other settings") else END_S + 6 * slow
        ended = [watch(process, limit) for process in both]
        signal_all([pid for process in both for pid in family(process.pid)], signal.SIGCONT)
    said = f"{what}, {more}:\n" + "\n".join(f"exit code {one.code}: {one.err[-600:]}" for one in ended)
    if case == "other settings":
        faults = [fault for one in ended for fault in faults_of(one, (2,))]
        return faults + (["half-written"] if folder.exists() else []), said
    if case == "stopped":
        faults = [fault for one in ended for fault in faults_of(one)]
    else:
        faults = [fault for one in ended for fault in after_fault(one)]
        if ended[1 - victim].code not in (0, supervisor.LOST, None):
            faults.append("not resumed")  # no scheduler would start it again
    return faults + half_written(folder) + finish(root, folder, run, LIMIT_S + 6 * slow), said


def disturb(case: str, victim, other, folder: Path, rng: random.Random) -> str:
    """Wait for some steps, then kill or stop the victim's supervisor, its worker, or both."""
    try:
        pairs.wait_for_step(folder, rng.randrange(1, 9), other)
    except AssertionError as error:
        return f"it does not begin to train: {error}"
    time.sleep(rng.uniform(0, 0.3))
    members = family(victim.pid)
    killed = {"supervisor killed": members[:1], "worker killed": members[-1:]}.get(case)
    chosen = killed or (members if rng.random() < 0.5 else [rng.choice(members)])
    signal_all(chosen, signal.SIGKILL if killed else signal.SIGSTOP)
    if not killed:
        time.sleep(STOP_S if case == "stopped" else supervisor.PEER_TIMEOUT + 5)
        signal_all(chosen, signal.SIGCONT)
    names = ["supervisor" if pid == victim.pid else "worker" for pid in chosen]
    return f"{case}: {' and '.join(names)} of process {victim.args[victim.args.index('--process-id') + 1]}"


def finish(root: Path, folder: Path, run: RunConfig, limit: float) -> list[str]:
    """Train to the end in one process, and look for every step's row."""
    ended = watch(runs.start(["train", "tiny", "--out", str(folder), *runs.flags(run)], root), limit)
    if faults := faults_of(ended):
        print(ended.err[-600:])
        return faults
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    return half_written(folder) + ([] if steps == list(range(1, run.steps + 1)) else ["silent"])


def run(seconds: float, seed: int, table: Table, least: int = 1) -> None:
    """Disturb clusters for so long."""
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        root = Path(name)
        made = pairs.pair_run(root / "text")
        for number, rng in trials("cluster", until, seed, table, least):
            case = CASES[number % len(CASES)]
            faults, said = trial(case, root, root / "run", made, rng)
            table.add(f"cluster: {case}", faults)
            report("cluster", seed, number, case, faults, said)
            shutil.rmtree(root / "run", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main("cluster", run))
