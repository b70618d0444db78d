"""How near is this GPU or TPU to its bounds? One command of ten minutes at most gives a table.

python experiments/accel/run.py                           # all parts; results/<device>.json
python experiments/accel/run.py --parts attention loss    # some, and `bounds` if not measured yet
python experiments/accel/run.py --resume                  # only what is not done yet

Exit code: 0; 1 where a bar is missed or a part fails; 2 for bad input.
"""

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from dsv3_jax.cli.main import take_gpu_memory
from dsv3_jax.config import ConfigError, did_you_mean
from dsv3_jax.host.files import write_atomic
from experiments.accel.table import report, write_cards

# Parts by value, and seconds below which one is not begun: it would not come far.
PARTS = {
    "bounds": 10, "right": 60, "layer": 25, "attention": 40, "grouped": 30, "step": 40,
    "decode": 30, "exact": 40, "few_rows": 20, "more_decode": 40, "more_grouped": 40,
    "drafts": 60, "loss": 20, "eight_bits": 30,
}  # fmt: skip
# of each part: programs, and CPU seconds that compiling them takes
COMPILING = HERE / "compile_seconds.json"
# of the worker's environment: a later run does not compile again
SETTINGS = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / "runs" / "accel-cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# parts that need a process of their own: the most memory used is counted from its start
FRESH = ("step",)


class Failed(RuntimeError):
    """A part did not end; the message is one sentence."""


class Worker:
    """The process that measures: `worker.py`. One that has failed is replaced at the next part."""

    def __init__(self) -> None:
        take_gpu_memory()
        os.environ.update({**SETTINGS, **os.environ})
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        self._command = sys.executable, str(HERE / "worker.py")
        self.start()

    def start(self) -> None:
        """Begin with a new process. Raises: Failed where it finds no device."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        hello = self._reply()
        if "failed" in hello:
            self.close()
            raise Failed(hello["failed"])
        self.card, self.toy = hello["card"], hello["toy"]

    def measure(self, part: str, seconds: float) -> Iterator[dict]:
        """Yield what the worker says of a part. Raises: Failed, also after `seconds`."""
        if part == "right":
            self.close()  # the processes that check need the device
            yield from right_figures(seconds)
            return
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), self._process.kill()))
        try:
            if self._process.poll() is not None or part in FRESH:
                self.close()
                self.start()
            timer.start()
            assert self._process.stdin
            print(part, file=self._process.stdin, flush=True)
            while "done" not in (reply := self._reply()):
                if "failed" in reply:
                    raise Failed(reply["failed"])
                yield reply
        except (Failed, OSError) as error:
            self.close()
            raise Failed(
                f"the time was over, after {seconds:.0f} s" if late.is_set() else str(error)
            ) from None
        finally:
            timer.cancel()

    def _reply(self) -> dict:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise Failed(
                f"the process ended with code {self._process.returncode}; its last words are above"
            )
        return json.loads(line)

    def close(self) -> None:
        """End the process: it holds nothing that must be saved."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe
                pipe.close()


def right_figures(seconds: float) -> Iterator[dict]:
    """The part `right`, as the worker says a part. Raises: Failed."""
    from experiments.accel.right import right  # here: it imports kernels

    end = time.perf_counter() + seconds
    try:
        for figure in right():
            yield {"figure": asdict(figure)}
            yield {"doing": f"what comes after {figure.name.split(',')[0]}"}
            if time.perf_counter() > end:
                raise Failed(f"the time was over, after {seconds:.0f} s")
    except ConfigError as error:
        raise Failed(str(error)) from None


def measure(names: list[str], results: dict, path: Path, worker: Worker, deadline: float) -> None:
    """Measure parts in order; the file is written after each figure."""
    start = time.perf_counter()
    for name in names:
        left = deadline - time.perf_counter()
        if not results["toy"] and left < PARTS[name]:
            text = f"skipped: {max(left, 0):.0f} s are left, and it takes {PARTS[name]} s or more"
            results["parts"][name] = {"state": "skipped", "why": text, "figures": []}
            say(start, f"{name}: {text}")
        else:
            part: dict[str, Any] = {"state": "stopped", "why": "", "figures": []}
            results["parts"][name], doing, began = part, name, time.perf_counter()
            say(start, f"{name}: {compiling(name)}")
            try:
                for reply in worker.measure(name, max(left, 1.0)):
                    if "doing" in reply:
                        doing = reply["doing"]
                        say(start, f"{name}: {doing}")
                    else:
                        part["figures"].append(checked(reply["figure"]))
                        save(results, path)
                part["state"] = "done"
            except Failed as error:
                part |= {"state": "failed", "why": f"failed at {doing}: {error}"}
                say(start, f"{name}: {part['why']}")
            part["seconds"] = round(time.perf_counter() - began, 1)
        save(results, path)


def compiling(name: str) -> str:
    """The programs that a part compiles, by COMPILING."""
    found = json.loads(COMPILING.read_text())["parts"].get(name)
    if found is None:
        return "not known how long it compiles"
    return (
        f"{found['programs']} programs take {found['seconds']:.0f} CPU s to compile, "
        "if none is kept"
    )


def checked(figure: dict) -> dict:
    """A figure without what it does not have; a value that is no number is a failure."""
    value = figure["value"]
    if value is not None and not math.isfinite(value):
        figure |= {"value": None, "why": f"failed: the value is {value}"}
    return {key: item for key, item in figure.items() if key in ("name", "value") or item}


def save(results: dict, path: Path) -> None:
    write_atomic(path, json.dumps(results, indent=1) + "\n")


def say(start: float, text: str) -> None:
    """Print progress on stderr."""
    print(f"[{time.perf_counter() - start:4.0f} s] {text}", file=sys.stderr, flush=True)


def default_path(card: dict, toy: bool) -> Path:
    """Name the file for a device's results; toy sizes give no results."""
    name = re.sub(r"[^a-z0-9]+", "-", card["kind"].lower()).strip("-")
    return ROOT / "runs" / f"accel-toy-{name}.json" if toy else HERE / "results" / f"{name}.json"


def begin(path: Path, worker: Worker, resume: bool) -> dict:
    """The results so far, if they are of this device, sizes and versions; else none.

    Raises: ValueError, with `resume`, for results of another device, other sizes or versions.
    """
    fresh: dict[str, Any] = {"card": worker.card, "toy": worker.toy, "parts": {}}
    if not path.exists():
        return fresh
    try:
        found = json.loads(path.read_text())
        same = found["toy"] == worker.toy
        same = same and all(found["card"][x] == worker.card[x] for x in ("kind", "versions"))
        same = same and found["parts"].keys() <= PARTS.keys()
    except (ValueError, KeyError, AttributeError, TypeError):
        if resume:
            raise ValueError(
                f"out={str(path)!r} holds no results of this command; name another file"
            ) from None
        return fresh
    if not same and resume:
        raise ValueError(
            f"out={str(path)!r} is of another device, other sizes or versions; run without --resume"
        )
    return found if same else fresh


def options(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the arguments. Raises: ValueError, one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", metavar="PART", help=f"of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="time for all parts; default: 9.5"
    )
    parser.add_argument("--resume", action="store_true", help="keep the parts that are done")
    parser.add_argument(
        "--out", type=Path, help="file of the results; default: results/<device>.json"
    )
    args = parser.parse_args(argv)
    for name in args.parts or ():
        if name not in PARTS:
            raise ValueError(
                f"part {name!r} is not one of {', '.join(PARTS)}{did_you_mean(name, PARTS)}"
            )
    if not 0 < args.minutes < math.inf:
        raise ValueError(f"minutes={args.minutes:g} is not a positive number")
    if 60 * args.minutes < (shortest := min(PARTS[name] for name in args.parts or PARTS)):
        raise ValueError(
            f"minutes={args.minutes:g} is too short for every part: one takes {shortest} s or more"
        )
    if args.out is not None and args.out.is_dir():
        raise ValueError(f"out={str(args.out)!r} is a folder; name a file")
    return args


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    worker = None
    try:
        args = options(argv)
        say(start, "starting the device")
        worker = Worker()
        path = args.out or default_path(worker.card, worker.toy)
        results = begin(path, worker, args.resume)
        kept = {name for name, part in results["parts"].items() if part["state"] == "done"}
        names = [name for name in PARTS if name in (args.parts or PARTS)]
        if args.resume:
            names = [name for name in names if name not in kept]
        if names and "bounds" not in kept | set(names):  # ratios need them
            names.insert(0, "bounds")
        results["parts"] = {  # in order; those that are measured now start empty
            name: {"state": "stopped", "why": "", "figures": []}
            if name in names
            else results["parts"][name]
            for name in PARTS
            if name in names or name in results["parts"]
        }
        measure(names, results, path, worker, start + 60 * args.minutes)
        if args.out is None and not worker.toy:
            write_cards(results)
        return report(results, path)
    except (ValueError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"run.py: no device can be used: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if worker is not None:
            worker.close()


if __name__ == "__main__":
    sys.exit(main())
