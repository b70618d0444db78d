"""`dsv3 runs`: list the runs in a folder; `check RUN`: compare checkpoints with their checksums."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from dsv3_jax.cli.common import fail, parse, run_subcommand, sentence
from dsv3_jax.host.lock import holder
from dsv3_jax.host.mirror import fetched, mirror_of
from dsv3_jax.report.metrics_files import (
    LOAD_FILE,
    METRICS_FILE,
    describe_bad,
    parse_rows,
    read_rows,
)
from dsv3_jax.report.progress import text_console
from dsv3_jax.report.units import format_bytes, format_duration


@dataclass
class Check:
    """Check a run's checkpoints by checksums, and its metrics; after damage the exit code is 2."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a folder that `dsv3 train` or `dsv3 convert` wrote"""


def check_folder(argv: list[str]) -> int:
    """Print a line for each checkpoint and each file of rows.

    Raises: ValueError if the folder holds no run, or something in it is damaged.
    """
    args = parse(Check, argv, "runs check")
    from dsv3_jax.runs.checkpoint import steps_of
    from dsv3_jax.runs.checksums import find_damage, read_manifest
    from dsv3_jax.runs.folder import read_run

    # Every file of every checkpoint is compared with its checksum.
    args.run = fetched(args.run)
    read_run(args.run)
    damaged = 0
    steps = steps_of(args.run / "checkpoints")
    for step in steps:
        folder = args.run / "checkpoints" / str(step)
        if mirror_of(args.run) is not None:
            print(f"step {step}: in a bucket, where arrays are checked when they are read")
            continue
        damage = find_damage(folder)

        # A run may train while it is checked.
        if not folder.exists():  # a trainer deleted it meanwhile
            continue
        damaged += bool(damage)
        state = "damaged" if damage else "whole" if read_manifest(folder) else "not checked"
        size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
        print(f"step {step}: {state}, {format_bytes(size)}")
        if damage:
            text_console().print(f"  {damage}")
    if not steps:
        print("checkpoints/ holds no checkpoint: training starts at step 0", file=sys.stderr)

    # Rows of metrics have no checksum: a damaged one cannot be read.
    for name in (METRICS_FILE, LOAD_FILE):
        rows, bad = parse_rows(args.run / name)
        damaged += bool(bad)
        fault = describe_bad(args.run / name, bad, len(rows))
        text_console().print(fault or f"{name}: {len(rows)} rows")
    if damaged:
        raise ValueError(
            f"run={str(args.run)!r} has {damaged} damaged checkpoints or files; training passes "
            "over them"
        )
    return 0


@dataclass
class List:
    """List the runs in a folder and its folders: how far each is, its loss and its speed."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """where to look, at most three folders deep"""


def list_runs(argv: list[str]) -> int:
    """Print a table of runs, the last changed first.

    Raises: ValueError if there is no such folder.
    """
    args = parse(List, argv, "runs list")
    if not args.folder.is_dir():
        raise ValueError(
            f"folder={str(args.folder)!r} is no folder; name one with runs: dsv3 runs list FOLDER"
        )
    # A run that cannot be read is named on stderr, and the others are listed.
    found = [line for folder in _run_folders(args.folder) if (line := _line(folder)) is not None]
    if not found:
        text_console().print(f"no run in {args.folder}")
        return 0

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "step", "state", "loss", "held out", "tokens/s", "changed"):
        table.add_column(
            name, justify="left" if name in ("run", "state") else "right", overflow="fold"
        )
    for changed, cells in sorted(found, reverse=True):
        table.add_row(*cells, f"{format_duration(max(time.time() - changed, 1))} ago")

    console = text_console()
    if not console.is_terminal:
        console.width = 1000  # nothing is folded for another program
    console.print(table)
    return 0


def _run_folders(root: Path, depth: int = 3) -> Iterator[Path]:
    from dsv3_jax.runs.folder import RUN_FILE

    if (root / RUN_FILE).is_file():
        yield root
    elif depth:
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith("."):
                yield from _run_folders(folder, depth - 1)


def _line(folder: Path) -> tuple[float, tuple[str, ...]] | None:
    """A run's last change, and its cells.

    None means that it cannot be read; a line on stderr says why.
    """
    from dsv3_jax.runs.checkpoint import steps_of
    from dsv3_jax.runs.folder import RUN_FILE, read_run

    try:
        run = read_run(folder)
        rows = read_rows(folder / METRICS_FILE)
        last_step = max(steps_of(folder / "checkpoints"), default=0)
    except (ValueError, OSError) as error:
        fail(f"passed over: {sentence(error)}")
        return None

    def last(key: str, form: str) -> str:
        return next(
            (form.format(row[key]) for row in reversed(rows) if row.get(key) is not None), ""
        )

    step = max(last_step, max((row["step"] for row in rows), default=0))
    state = "training" if holder(folder) else "finished" if last_step >= run.steps else "stopped"
    files = [path for name in (RUN_FILE, METRICS_FILE) if (path := folder / name).exists()]
    return max(path.stat().st_mtime for path in files), (
        str(folder),
        f"{step:,}/{run.steps:,}",
        state if step else "not begun" if state == "stopped" else state,
        last("loss", "{:.3f}"),
        last("val_loss", "{:.3f}"),
        last("tokens_per_s", "{:,.0f}"),
    )


SUBCOMMANDS = {
    "list": (list_runs, "[FOLDER]", "list the runs in a folder, by default runs/"),
    "check": (check_folder, "RUN", "compare every checkpoint of a run with its checksums"),
}


def run(argv: list[str]) -> int:
    """Run the subcommand that the first argument names; without one, list the runs in runs/."""
    return run_subcommand("runs", SUBCOMMANDS, argv or ["list"])
