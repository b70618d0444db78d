"""`check.py` in processes of their own: a wrong kernel may never end, or lose the device.

A kernel that is written by hand has a process to itself; plain XLA's implementations share one. The
process that starts them uses no device. It keeps each verdict at once, so nothing is lost if it is
stopped.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError, Execution
from dsv3_jax.kernels import choose, verdicts
from dsv3_jax.kernels.check import Verdict, check, rows_by_op

COMMAND = (sys.executable, "-m", "dsv3_jax.kernels.check_apart")
SECONDS = 60.0  # that an implementation may take for one case, with compiling
STARTING = 600.0  # that a process may take for all else: starting the device, the right numbers
BEGUN = "its check began and did not end"


class Ended(RuntimeError):
    """A process that ended before it was done. The message says how, after "it"."""


def check_and_keep(
    execution: Execution,
    *,
    precisions: Sequence[str] = ("none",),
    also: Sequence[str] = (),
    command: Sequence[str] | None = None,
    seconds: float | None = None,
) -> Iterator[Verdict]:
    """Check what "auto" may choose on JAX's default device. Yield the worst verdict on each.

    Wrong ones are kept for `choose.prepare`. Shapes are a model's too, except on a CPU.

    Args:
        precisions, also: as `check.check`.
        command: the process that checks, which calls `main`. None means COMMAND.
        seconds: that an implementation may take for one case. None means SECONDS.
    Raises: ConfigError if the device or a process cannot be used, or if it does not have the
        kernels of `execution`.
    """
    seconds = SECONDS if seconds is None else seconds
    asked = {
        "execution": {
            name: getattr(execution, name) for name in ("compute_dtype", "kernels", "precision")
        },
        "check": {"precisions": list(precisions), "also": list(also)},
    }
    start = [*(command or COMMAND), json.dumps(asked)]

    # A first process lists the implementations, and ends.
    try:
        (here,) = _replies(start, seconds)
    except Ended as error:
        reason = f"the process that lists them {error}"
        raise ConfigError(f"kernels cannot be checked: {reason}") from None
    if "refused" in here:
        raise ConfigError(here["refused"])

    # One process for each that is written by hand, and one for all others.
    by_hand = here["rows"]  # whether it is, by name
    groups = [[name] for name in by_hand if by_hand[name]]
    groups.append([name for name in by_hand if not by_hand[name]])
    chip = (here["platform"], here["chip"])

    while groups:
        names = groups.pop(0)
        found, lost = _check_together([*start, json.dumps(names)], names, chip, seconds)
        if not lost:
            yield from found.values()
            continue

        # The others again, in a process that this one has not touched.
        yield found[lost]
        others = [name for name in names if name != lost]
        if others:
            groups.insert(0, others)


def _check_together(
    command: Sequence[str], names: list[str], chip: tuple[str, str], seconds: float
) -> tuple[dict[str, Verdict], str]:
    """Check implementations in one process, and keep what is wrong.

    Returns: (the worst verdict on each, the name of the one with which the process ended early or
        "").
    """
    worst: dict[str, Verdict] = {}
    tried = ""

    def keep(found: Verdict) -> None:
        before = worst.get(found.name, found)
        worst[found.name] = max(before, found, key=lambda verdict: verdict.share)
        verdicts.keep(*chip, found.name, worst[found.name].wrong)

    try:
        for reply in _replies(command, seconds):
            if "trying" in reply:
                # Kept before it runs: this process may be stopped as well.
                tried = reply["trying"]
                known = worst[tried].wrong if tried in worst else ""
                verdicts.keep(*chip, tried, known or BEGUN)
                continue

            found = Verdict(*reply["verdict"])
            keep(found)
            if found.share < np.inf:
                tried = ""  # what follows is not its fault
    except Ended as error:
        if not tried:
            reason = f"cannot be checked: the process {error}"
            raise ConfigError(f"{', '.join(names)} {reason}") from None
        keep(Verdict(tried, np.inf, f"it {error}"))
        return worst, tried
    return worst, ""


def _replies(command: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """What a process says, line by line, until it is done.

    Raises: Ended if the process ends early. It is ended if it tries an implementation for more than
        `seconds`.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout
        with process.stdout as said:
            for line in said:
                lines.put(line)
        lines.put("")

    # Reading waits in a thread: a process that hangs in a driver may outlive its end, and so keep
    # the pipe open.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    limit = STARTING
    try:
        while True:
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                raise Ended(f"did not end in {limit:g} s") from None

            # It says what it tries, what it found, and at last that it is done.
            if not line:
                raise Ended(f"ended with code {process.wait()}; its last words are above")
            reply = json.loads(line)
            if reply.get("done"):
                return
            limit = seconds if "trying" in reply else STARTING
            yield reply
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
            reader.join(timeout=10)


def main() -> int:
    """Say which implementations there are, or check those of the second argument: lines of JSON."""
    # Libraries print on descriptor 1 too: the replies get one of their own.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**reply: Any) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    asked, *names = (json.loads(word) for word in sys.argv[1:])
    settings = asked["check"]

    try:
        kernels = choose.prepare(Execution(**asked["execution"]))
    except (ValueError, RuntimeError) as error:  # RuntimeError: JAX finds no device
        say(refused=str(error))
        say(done=True)
        return 0

    target = kernels.target
    if names:
        settings |= {"large": target.platform != "cpu", "names": names[0]}
        for verdict in check(kernels, trying=lambda name: say(trying=name), **settings):
            say(verdict=verdict)
    else:
        by_hand: dict[str, bool] = {}
        for op, _, _, rows in rows_by_op(kernels, **settings):
            by_hand |= {row.of(op): bool(row.dtypes) for row in rows}
        say(platform=target.platform, chip=target.chip, rows=by_hand)

    say(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
