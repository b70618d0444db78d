"""`dsv3 runs check RUN`: compare every checkpoint of a run with its checksums."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dsv3_jax.cli.common import parse
from dsv3_jax.config import did_you_mean


@dataclass
class Check:
    """Compare every checkpoint of a run with its checksums, and read its metrics; the exit code is 2 after damage."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a folder that `dsv3 train` or `dsv3 convert` wrote"""


def check(argv: list[str]) -> int:
    """Print a line for each checkpoint and each file of rows.

    Raises: ValueError if the folder holds no run, or something in it is damaged.
    """
    args = parse(Check, argv, "runs check")
    from dsv3_jax.report.metrics import LOAD_FILE, METRICS_FILE, describe_bad, parse_rows
    from dsv3_jax.report.units import format_bytes
    from dsv3_jax.training.checksums import find_damage, has_manifest
    from dsv3_jax.training.run_folder import read_run

    read_run(args.run)
    found = [path for path in (args.run / "checkpoints").glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]
    damaged = 0
    for folder in sorted(found, key=lambda path: int(path.name)):
        damage = find_damage(folder)
        damaged += bool(damage)
        size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
        state = "whole" if has_manifest(folder) else "not checked: an older version wrote it, without checksums"
        print(f"step {folder.name}: {'damaged' if damage else state}, {format_bytes(size)}")
        for sentence in damage:
            print(f"  {sentence}")
    if not found:
        print("no checkpoint")
    for name in (METRICS_FILE, LOAD_FILE):
        rows, bad = parse_rows(args.run / name)
        damaged += bool(bad)
        print(describe_bad(args.run / name, bad, len(rows)) or f"{name}: {len(rows)} rows")
    if damaged:
        raise ValueError(f"run={str(args.run)!r} has {damaged} damaged checkpoints or files; training passes over them")
    return 0


# Subcommand: its function of the arguments, and its line in the help text.
SUBCOMMANDS = {"check": (check, "RUN", "compare every checkpoint of a run with its checksums")}


def run(argv: list[str]) -> int:
    """Run the subcommand that the first argument names."""
    if argv and argv[0] in ("-h", "--help"):
        lines = [f"  {f'{name} {arguments}':<12} {what}" for name, (_, arguments, what) in SUBCOMMANDS.items()]
        print("\n".join(["usage: dsv3 runs SUBCOMMAND …", "", *lines]))
        return 0
    if not argv or argv[0].startswith("-"):
        raise ValueError("the name of a subcommand is missing, as in: dsv3 runs check RUN")
    if argv[0] not in SUBCOMMANDS:
        near = did_you_mean(argv[0], SUBCOMMANDS)
        raise ValueError(f"subcommand {argv[0]!r} is not one of {', '.join(SUBCOMMANDS)}{near}")
    return SUBCOMMANDS[argv[0]][0](argv[1:])
