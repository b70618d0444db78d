"""How near is this GPU or TPU to its bounds? One command of ten minutes at most gives a table.

python experiments/accel/run.py                           # all parts; results/<device>.json
python experiments/accel/run.py --parts attention ops     # some, and `bounds` if not measured yet

Figures of parts that are not named are kept if they are of this device and these versions.
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
from dsv3_jax.config import replace
from dsv3_jax.host.files import write_atomic
from dsv3_jax.kernels import check_apart, choose, verdicts
from dsv3_jax.presets import preset
from experiments import apart
from experiments.accel import model_parts, op_parts
from experiments.accel.kernels import gpu_latent_attention
from experiments.accel.measuring import Figure, Part
from experiments.accel.table import report, write_cards

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEAST = 30  # seconds that are left when a part begins
PARTS: dict[str, Callable[..., Part]] = {  # by value
    "bounds": op_parts.bounds,
    "right": op_parts.right,
    "layer": op_parts.layer,
    "attention": op_parts.attention,
    "step": model_parts.step,
    "decode": model_parts.decode,
    "exact": model_parts.exact,
    "ops": op_parts.ops,
    "more_decode": partial(model_parts.decode, batches=(1, 32, 128)),
    "drafts": model_parts.drafts,
    "eight_bits": op_parts.eight_bits,
}

HEADED = replace(
    preset("tiny"), num_layers=1, num_dense_layers=0, num_experts=8, experts_per_token=2,
    num_groups=2, groups_per_token=1,
)  # fmt: skip
PLAIN = replace(HEADED, mtp_depth=0)
# Sizes with which a CPU runs every part within a minute: this only shows that the parts work.
TOY: dict[str, dict[str, Any]] = {
    "bounds": dict(n=128, copied=1 << 16),
    "layer": dict(cfg=PLAIN, rows=2, length=64),
    "attention": dict(batch=1, length=64, heads=2, k_dim=24, v_dim=16, documents=2),
    "step": dict(cfg=HEADED, rows=2, length=32),
    "decode": dict(cfg=PLAIN, batches=(2,), context=32, count=4),
    "exact": dict(cfg=HEADED, new=12),
    "more_decode": dict(cfg=PLAIN, batches=(1,), context=32, count=4),
    "drafts": dict(cfg=HEADED, batches=(3,), prompt=30, new=12),
    "eight_bits": dict(tokens=128, dim=128, width=128),
}
# of the parts' processes: a later run does not compile again
SETTINGS = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / "runs" / "accel-cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def card() -> dict[str, Any]:
    """The device and the versions of the packages, in a part's process as `said_by`."""
    device = jax.devices()[0]
    return {
        "kind": device.device_kind,
        "platform": choose.platform_of(),
        "devices": jax.local_device_count(),
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "runtime": " ".join(device.client.platform_version.split()),
        "versions": {"python": platform.python_version(), **verdicts.versions()},
    }


def said_by(name: str) -> Iterator[dict]:
    """What a part says on JAX's default device; of "card" the device."""
    if name == "card":
        yield card()
        return
    gpu_latent_attention.add()
    sizes = TOY.get(name, {}) if choose.platform_of() == "cpu" else {}
    yield from said(PARTS[name](**sizes))


def said(part: Part) -> Iterator[dict]:
    for found in part:
        yield {"figure": asdict(found)} if isinstance(found, Figure) else {"doing": found}


def replies_of(name: str, seconds: float) -> Iterator[Any]:
    """What a part says, from a process of its own. Raises: Failed, also after `seconds`."""
    if name != "right":
        yield from apart.replies([sys.executable, __file__, "--case", name], seconds)
        return
    # Its own processes check, and need the device.
    end = time.perf_counter() + seconds
    for reply in said(PARTS[name]()):
        yield reply
        if time.perf_counter() > end:
            raise apart.Failed(f"the time was over, after {seconds:.0f} s")


def measure(names: list[str], results: dict, path: Path, start: float, end: float) -> None:
    """Measure parts in order, until the time is over; the file is written after each figure."""
    for name in names:
        began = time.perf_counter()
        if end - began < LEAST:
            return
        say(start, name)
        doing = name
        part: dict[str, Any] = {"why": "stopped", "figures": []}
        results["parts"][name] = part
        try:
            for reply in replies_of(name, end - began):
                if "doing" in reply:
                    doing = reply["doing"]
                    say(start, f"{name}: {doing}")
                else:
                    part["figures"].append(checked(reply["figure"]))
                    save(results, path)
            part["why"] = ""
        except (apart.Failed, ValueError) as error:  # ValueError: kernels that cannot be checked
            part["why"] = f"failed at {doing}: {error}"
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


def default_path(card: dict) -> Path:
    """Name the file for a device's results; toy sizes give no results."""
    name = re.sub(r"[^a-z0-9]+", "-", card["kind"].lower()).strip("-")
    if card["platform"] == "cpu":
        return ROOT / "runs" / f"accel-toy-{name}.json"
    return HERE / "results" / f"{name}.json"


def begin(path: Path, card: dict) -> dict:
    """The results so far, if they are of this device, sizes and versions; else none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text())
        if all(found["card"][key] == card[key] for key in ("kind", "versions")):
            return found
    return {"card": card, "toy": card["platform"] == "cpu", "parts": {}}


def options(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the arguments. Bad ones end the command with code 2."""
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"of {', '.join(PARTS)}; default: all")  # fmt: skip
    add("--minutes", type=float, default=9.5, help="time for all parts; default: 9.5")
    add("--out", type=Path, help="file of the results; default: results/<device>.json")
    args = parser.parse_args(argv)
    if not LEAST <= 60 * args.minutes < math.inf:
        parser.error(f"--minutes={args.minutes:g}: a part needs {LEAST} s")
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
        path = args.out or default_path(found)
        results = begin(path, found)
        done = {name for name, part in results["parts"].items() if not part["why"]}
        needed = {*args.parts} | {"bounds"} - done  # ratios need the bounds
        names = [name for name in PARTS if name in needed]
        measure(names, results, path, start, start + 60 * args.minutes)
        if args.out is None and not results["toy"]:
            write_cards(results)
        return report(results, path, names)
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
