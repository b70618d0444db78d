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
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import jax

from dsv3_jax.cli.main import take_gpu_memory
from dsv3_jax.host.files import write_atomic
from dsv3_jax.kernels import check_apart, choose, verdicts
from experiments import apart
from experiments.accel import model_parts, op_parts
from experiments.accel.kernels import gpu_latent_attention
from experiments.accel.measuring import TOY, Figure, Part, Sizes
from experiments.accel.table import report, write_cards

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Parts by value, and seconds below which one is not begun: it would not come far.
PARTS: dict[str, tuple[Callable[[Sizes], Part], int]] = {
    "bounds": (op_parts.bounds, 10),
    "right": (op_parts.right, 60),
    "layer": (op_parts.layer, 25),
    "attention": (op_parts.attention, 40),
    "grouped": (partial(op_parts.grouped, models=slice(1)), 30),
    "step": (model_parts.step, 40),
    "decode": (lambda sizes: model_parts.decode(sizes, [sizes.decode_bar]), 30),
    "exact": (model_parts.exact, 40),
    "few_rows": (op_parts.few_rows, 20),
    "more_decode": (lambda sizes: model_parts.decode(sizes, sizes.decode_batches), 40),
    "more_grouped": (partial(op_parts.grouped, models=slice(1, None)), 40),
    "drafts": (model_parts.drafts, 60),
    "loss": (op_parts.loss, 20),
    "eight_bits": (op_parts.eight_bits, 30),
}
# of the parts' processes: a later run does not compile again
SETTINGS = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / "runs" / "accel-cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
DRIVER_FILES = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


# In a part's process


def card() -> dict[str, Any]:
    """The device, its driver and the versions of the packages."""
    device = jax.devices()[0]
    drivers = [
        Path(name).read_text().split("\n")[0] for name in DRIVER_FILES if Path(name).exists()
    ]
    return {
        "kind": device.device_kind,
        "platform": choose.platform_of(),
        "devices": jax.local_device_count(),
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "runtime": " ".join(device.client.platform_version.split()),
        "driver": " ".join(drivers[0].split()) if drivers else None,
        "versions": {"python": platform.python_version(), **verdicts.versions()},
    }


def said_by(name: str) -> Iterator[dict]:
    """What a part says on JAX's default device; of "card" the device."""
    if name == "card":
        yield card()
        return
    gpu_latent_attention.add()
    yield from said(name, TOY if choose.platform_of() == "cpu" else Sizes())


def said(name: str, sizes: Sizes) -> Iterator[dict]:
    for found in PARTS[name][0](sizes):
        yield {"figure": asdict(found)} if isinstance(found, Figure) else {"doing": found}


# In the command's


def replies_of(name: str, seconds: float) -> Iterator[Any]:
    """What a part says, from a process of its own. Raises: Failed, also after `seconds`."""
    if name != "right":
        yield from apart.replies([sys.executable, __file__, "--case", name], seconds)
        return
    # Its own processes check, and need the device.
    end = time.perf_counter() + seconds
    for reply in said(name, Sizes()):
        yield reply
        if time.perf_counter() > end:
            raise apart.Failed(f"the time was over, after {seconds:.0f} s")


def measure(names: list[str], results: dict, path: Path, start: float, end: float) -> None:
    """Measure parts in order, until the time is over; the file is written after each figure."""
    for name in names:
        began, least = time.perf_counter(), PARTS[name][1]
        left = end - began
        part: dict[str, Any] = {"state": "stopped", "why": "", "figures": []}
        results["parts"][name] = part
        if not results["toy"] and left < least:
            why = f"skipped: {max(left, 0):.0f} s are left, and it takes {least} s or more"
            part |= {"state": "skipped", "why": why}
            say(start, f"{name}: {why}")
            save(results, path)
            continue

        say(start, name)
        doing = name
        try:
            for reply in replies_of(name, max(left, 1.0)):
                if "doing" in reply:
                    doing = reply["doing"]
                    say(start, f"{name}: {doing}")
                else:
                    part["figures"].append(checked(reply["figure"]))
                    save(results, path)
            part["state"] = "done"
        except (apart.Failed, ValueError) as error:  # ValueError: kernels that cannot be checked
            part |= {"state": "failed", "why": f"failed at {doing}: {error}"}
            say(start, f"{name}: {part['why']}")
        part["seconds"] = round(time.perf_counter() - began, 1)
        save(results, path)


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


def default_path(kind: str, toy: bool) -> Path:
    """Name the file for a device's results; toy sizes give no results."""
    name = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    return ROOT / "runs" / f"accel-toy-{name}.json" if toy else HERE / "results" / f"{name}.json"


def begin(path: Path, card: dict, resume: bool) -> dict:
    """The results so far, if they are of this device, sizes and versions; else none.

    Raises: ValueError, with `resume`, for results of others.
    """
    toy = card["platform"] == "cpu"
    if path.exists():
        with contextlib.suppress(ValueError, KeyError, AttributeError, TypeError):
            found = json.loads(path.read_text())
            same = found["toy"] == toy and found["parts"].keys() <= PARTS.keys()
            if same and all(found["card"][key] == card[key] for key in ("kind", "versions")):
                return found
        if resume:
            text = "holds no results of this device, these sizes and versions"
            raise ValueError(
                f"out={str(path)!r} {text}; run without --resume, or name another file"
            )
    return {"card": card, "toy": toy, "parts": {}}


def options(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the arguments. Bad ones end the command with code 2."""
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"of {', '.join(PARTS)}; default: all")  # fmt: skip
    add("--minutes", type=float, default=9.5, help="time for all parts; default: 9.5")
    add("--resume", action="store_true", help="keep the parts that are done")
    add("--out", type=Path, help="file of the results; default: results/<device>.json")
    args = parser.parse_args(argv)
    shortest = min(PARTS[name][1] for name in args.parts)
    if not shortest <= 60 * args.minutes < math.inf:
        parser.error(f"--minutes={args.minutes:g}: a part takes {shortest} s or more")
    if args.out is not None and args.out.is_dir():
        parser.error(f"--out={str(args.out)!r} is a folder; name a file")
    return args


def main(argv: list[str] | None = None) -> int:
    start, args = time.perf_counter(), options(argv)
    take_gpu_memory()
    os.environ |= SETTINGS | os.environ
    try:
        say(start, "starting the device")
        found = apart.result([sys.executable, __file__, "--case", "card"])
        path = args.out or default_path(found["kind"], found["platform"] == "cpu")
        results = begin(path, found, args.resume)
        kept = {name for name, part in results["parts"].items() if part["state"] == "done"}
        names = [name for name in PARTS if name in args.parts]
        if args.resume:
            names = [name for name in names if name not in kept]
        if names and "bounds" not in kept | set(names):  # ratios need them
            names.insert(0, "bounds")

        # In order; those that are measured now start empty.
        empty = {name: {"state": "stopped", "why": "", "figures": []} for name in names}
        parts = results["parts"] | empty
        results["parts"] = {name: parts[name] for name in PARTS if name in parts}
        measure(names, results, path, start, start + 60 * args.minutes)
        if args.out is None and not results["toy"]:
            write_cards(results)
        return report(results, path)
    except apart.Failed as error:
        print(f"run.py: no device can be used: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        sys.exit(apart.answer(said_by(sys.argv[2])))
    if sys.argv[1:2] == ["--check"]:  # a process of `right`
        del sys.argv[1]
        gpu_latent_attention.add()
        sys.exit(check_apart.main())
    sys.exit(main())
