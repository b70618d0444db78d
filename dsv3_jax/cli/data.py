"""`dsv3 data tokenize PATHS --out FOLDER` writes shards of token ids; `check` compares hashes.

`example` writes chats and tasks to try fine-tuning with.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dsv3_jax.cli.common import parse, run_subcommand, with_variables
from dsv3_jax.report.progress import text_console


def tokenize(argv: list[str]) -> int:
    """Write the shards.

    Raises: ValueError as `tokenize.tokenize`.
    """
    from dsv3_jax.cli import tokenize as work

    job = parse(work.Tokenize, with_variables(argv, "--template"), "data tokenize")
    if not job.paths:
        raise ValueError("argument PATHS is missing: name files or folders of documents")
    manifest = work.tokenize(job)
    how = f"train on it by --data.format shards --data.paths {shlex.quote(str(job.out))}"
    text_console().print(f"{job.out}: {', '.join(manifest.domains)}; {how}")
    return 0


@dataclass
class CheckArgs:
    """Compare a folder's shards with its manifest's hashes; after damage the exit code is 2."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """a folder that `dsv3 data tokenize` wrote"""


def check_shards(argv: list[str]) -> int:
    """Read every byte of the shards.

    Raises: ValueError for a folder without a manifest, or with a shard that is missing or damaged.
    """
    args = parse(CheckArgs, argv, "data check")
    from dsv3_jax.data.manifest import read_manifest
    from dsv3_jax.data.shards import check_files
    from dsv3_jax.data.tokenizing import counted

    manifest = read_manifest(args.folder)
    damages = list(check_files(manifest, wholly=True))
    for damage in damages:
        text_console().print(damage)
    if damages:
        found = counted(len(damages), "damaged shard")
        raise ValueError(f"shards={str(args.folder)!r} has {found}; tokenize again")
    text_console().print(f"{args.folder}: {len(manifest.files):,} shards are whole")
    return 0


@dataclass
class ExampleArgs:
    """Write fifty chats to fine-tune on, chats.jsonl, and tasks for GRPO, tasks.jsonl."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """folder to write them into; it may be there"""


def example(argv: list[str]) -> int:
    """Write the files. Raises: ValueError as `made_chats.write_chats`."""
    args = parse(ExampleArgs, argv, "data example")
    from dsv3_jax.scores.made_chats import write_chats

    for file in write_chats(args.folder):
        text_console().print(str(file))
    return 0


SUBCOMMANDS = {
    "tokenize": (tokenize, "PATHS --out FOLDER", "write shards of token ids"),
    "check": (check_shards, "FOLDER", "compare every shard with its hash"),
    "example": (example, "FOLDER", "write chats and tasks to fine-tune with"),
}


def run(argv: list[str]) -> int:
    """Run the subcommand that the first argument names."""
    return run_subcommand("data", SUBCOMMANDS, argv)
