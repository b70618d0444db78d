"""`dsv3 stats RUN`: count which experts held-out text is routed to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dsv3_jax.cli.common import parse, prepare_process


@dataclass
class Stats:
    """Count how a run's checkpoint routes held-out text; write stats.json, pictures, and index.html."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a folder that `dsv3 train` or `dsv3 convert` wrote"""
    out: Path | None = None
    """folder to write; None means stats in the run's folder. An earlier report there is replaced"""
    paths: tuple[str, ...] = ()
    """other text to read; empty means the run's own validation text"""
    step: int | None = None
    """step of the checkpoint; None means the last"""
    batches: int = 16
    """number of batches to read, at most"""
    draws: int = 200
    """number of shuffles of the documents' domains, which estimate chance for I(expert; domain)"""
    seed: int = 0
    """seed of the shuffles"""
    kernels: str | None = None
    """kernels to compute with: auto, xla, or a name from `dsv3 info PRESET --kernels`; None means the run's own"""


def run(argv: list[str]) -> int:
    """Write the report, and print a line for each layer."""
    args = parse(Stats, argv, "stats")
    prepare_process()
    import jax.numpy as jnp

    from dsv3_jax.ops import balance
    from dsv3_jax.report.progress import text_console, track
    from dsv3_jax.stats.reporting import PAGE, report

    def follow(batches, total):
        return track(batches, total, "batches")

    out, counts, special = report(
        args.run,
        args.out,
        paths=args.paths,
        step=args.step,
        batches=args.batches,
        draws=args.draws,
        seed=args.seed,
        kernels=args.kernels,
        follow=follow,
    )
    console = text_console()
    console.print(f"{counts.tokens.max():,} tokens of {len(counts.document_domains)} documents")
    max_vio = balance.max_vio(jnp.asarray(counts.load, jnp.float32)).tolist()
    apart = balance.max_vio(jnp.asarray(counts.load_by_domain, jnp.float32)).tolist()  # [N][L]
    for i, (layer, vio, bits, chance) in enumerate(
        zip(counts.layers, max_vio, special.bits, special.shuffled_95, strict=True)
    ):
        line = f"{layer:10s} MaxVio {vio:.2f}"
        if 1 < len(counts.domains) <= 8:
            line += f" ({', '.join(f'{name} {of[i]:.2f}' for name, of in zip(counts.domains, apart, strict=True))})"
        if len(counts.domains) > 1:
            line += f"  I(expert; domain) {bits:.4f} bits, by chance below {chance:.4f}"
        console.print(line)
    console.print(f"the page: {out / PAGE}")
    return 0
