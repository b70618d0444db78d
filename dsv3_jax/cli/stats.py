"""`dsv3 stats RUN`: its options, and what it prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import tyro
from rich.console import Console

from dsv3_jax.ops import balance
from dsv3_jax.report.progress import counted
from dsv3_jax.stats.reporting import PAGE, report


@dataclass
class Stats:
    """Routing statistics of a run's checkpoint on held-out text: stats.json, pictures, and index.html."""

    run: Annotated[Path, tyro.conf.Positional]
    """a folder that `dsv3 train` made"""
    out: Path | None = None
    """the folder to write, or to write anew; none: stats in the run's folder"""
    paths: tuple[str, ...] = ()
    """other text to read; none: the run's own validation text"""
    step: int | None = None
    """of the checkpoint; none: the last"""
    batches: int = 16
    """batches read, at most"""
    draws: int = 200
    """shuffles of the documents' domains, for what chance says of experts and domains"""
    seed: int = 0
    """of the shuffles"""


def stats(args: Stats) -> int:
    """Write them, say the least; returns the exit code."""

    def follow(batches, total):
        return counted(batches, total, "batches")

    out, counts, found = report(
        args.run,
        args.out,
        paths=args.paths,
        step=args.step,
        batches=args.batches,
        draws=args.draws,
        seed=args.seed,
        follow=follow,
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{counts.tokens.max():,} tokens of {len(counts.document_domains)} documents")
    uneven = balance.max_vio(jnp.asarray(counts.load, jnp.float32)).tolist()
    for name, vio, bits, chance in zip(counts.layers, uneven, found.bits, found.shuffled_95, strict=True):
        said = f"I(expert; domain) {bits:.4f} bits, by chance below {chance:.4f}" if len(counts.domains) > 1 else ""
        console.print(f"{name:10s} MaxVio {vio:.2f}  {said}".rstrip())
    console.print(f"the page: {out / PAGE}", markup=False)
    return 0
