"""What the cases share: sides that take turns in processes of their own, and the stored figures.

results.json has rows of figures by case and name.
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.hf.config_writing import config_to_dict
from experiments import apart
from experiments.markdown import markdown_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
CELLS = ("1024x1", "1024x8", "4096x1", "4096x8", "16384x1", "16384x8")  # cached tokens × sequences
Rows = Iterator[tuple[str, dict]]  # what a case yields: figures with their name
# Gives the peer our side's memory settings (dsv3_jax/kernels/cpu/memory.py): its best case.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def shape_of(cell: str) -> tuple[int, int]:
    """Return (cached tokens, sequences).

    >>> shape_of("1024x8")
    (1024, 8)
    """
    context, _, batch = cell.partition("x")
    return int(context), int(batch)


def start(
    side: str,
    options: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
    python: str | None = None,
    tree: Path = ROOT,
) -> apart.Worker:
    """Start a side of worker.py.

    Args:
        options: of the side's function.
        env: added to its environment.
        python: the interpreter; None means this one.
        tree: a folder with the package, of this or another commit.
    """
    command = [python or sys.executable, str(HERE / "worker.py"), side, json.dumps(options)]
    return apart.Worker(command, {"PYTHONPATH": f"{tree}{os.pathsep}{ROOT}"} | dict(env or {}))


def start_peer(
    cfg: ModelConfig, python: str | None, env: Mapping[str, str] | None = None, **options: Any
) -> apart.Worker:
    """Start transformers on two cores.

    Args:
        python: an interpreter with torch and transformers; None means this one.
        options: of `worker.peer`.
    """
    options |= {"config": config_to_dict(cfg, dtype="float32"), "threads": 2}
    return start("peer", options, {"OMP_NUM_THREADS": "2"} | dict(env or {}), python)


def in_turns(sides: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list]:
    """Call each side once a round; a first round, which compiles, does not count.

    Every second round has the other order: who comes first may have it easier.

    Returns: what each returned, by name and round.
    """
    for side in sides.values():
        side()
    found: dict[Any, list] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            found[name].append(sides[name]())
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the rounds' own ratios."""
    return median(a / b for a, b in zip(times, others, strict=True))


def load() -> dict[str, dict[str, dict]]:
    """Return the stored rows by case and name."""
    return json.loads(RESULTS.read_text())


def save(case: str, name: str, row: dict) -> None:
    """Store a row, with the machine, in place of one with the same name."""
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, jax {version('jax')}"
    )
    everything = load()
    everything.setdefault(case, {})[name] = row | {"machine": machine}
    RESULTS.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")


def table(rows: dict[str, dict]) -> str:
    """Return a Markdown table.

    >>> print(table({"ours": {"ms": 12.34567, "tokens": 5120}, "theirs": {"ms": 1234.5}}))
    |  | ms | tokens |
    | --- | --- | --- |
    | ours | 12.3 | 5,120 |
    | theirs | 1,234 |  |
    """
    head = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [[name, *(_text(row.get(key, "")) for key in head)] for name, row in rows.items()]
    return markdown_table(["", *head], cells)


def _text(value: Any) -> str:
    """Format a number with three digits or, from 100 on, without a fraction."""
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
