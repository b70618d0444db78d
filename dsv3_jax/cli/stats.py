"""`dsv3 stats RUN`: count which experts held-out text is routed to."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from dsv3_jax.cli.common import parse

MOST_DOMAINS = 8  # in a line


@dataclass
class Stats:
    """Count how a run's checkpoint routes held-out text; write stats.json, load.png, and index.html."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a folder that `dsv3 train` or `dsv3 convert` wrote"""
    out: Path | None = None
    """folder to write; an earlier report there is replaced. None means a folder in the run's "stats", named by the step
    and by what is read"""
    paths: tuple[str, ...] = ()
    """other text to read, all of it; empty means the run's own validation text"""
    text: str | None = None
    """a sentence, or the path of a file, that is shown first, token by token; it is counted nowhere"""
    step: int | None = None
    """step of the checkpoint; None means the last"""
    batches: int | None = None
    """number of batches to read, at most; None means 16 of the run's own text, and all of --paths"""
    draws: int = 200
    """number of shuffles of the documents' domains, which estimate chance for I(expert; domain)"""
    seed: int = 0
    """seed of the shuffles"""
    devices: int | None = None
    """number of devices that hold the experts, whose load is added up; None means no such sum"""
    worth: bool = False
    """measure the loss without each expert too: one forward pass an expert"""
    worth_tokens: int = 8192
    """tokens that --worth reads for each expert, at most"""
    against: str | None = None
    """another run to read the same text, RUN or RUN:STEP; its experts are matched to this one's"""
    tokens: Path | None = None
    """Parquet file to write too, a row for each token and layer: experts, gates, margins and nats"""
    kernels: str | None = None
    """kernels to compute with: auto, xla, or a name from `dsv3 info PRESET --kernels`; None means the run's own"""


def run(argv: list[str]) -> int:
    """Write the report, and print a line for each layer and a sentence on each other measurement."""
    args = parse(Stats, argv, "stats")
    from dsv3_jax.report.progress import text_console, track
    from dsv3_jax.stats.page import findings
    from dsv3_jax.stats.reporting import PAGE, ReportOptions, report

    options = ReportOptions(**{field.name: getattr(args, field.name) for field in fields(ReportOptions)})
    folder, numbers = report(args.run, args.out, options, follow=track)
    console = text_console()
    console.print(f"{max(numbers['tokens']):,} tokens of {sum(numbers['documents'].values())} documents")
    special, apart = numbers["specialisation"], numbers["max_vio_by_domain"]
    for i, layer in enumerate(numbers["layers"]):
        line = f"{layer:10s} MaxVio {numbers['max_vio'][i]:.2f}"
        if 1 < len(apart) <= MOST_DOMAINS:
            known = (f"{name} {of[i]:.2f}" for name, of in apart.items() if of[i] is not None)
            line += f" ({', '.join(known)})"
        if len(apart) > 1:
            chance = special["shuffled_95"][i]
            line += f"  I(expert; domain) {special['bits'][i]:.4f} bits, by chance below {chance:.4f}"
        console.print(line)
    for sentence in findings(numbers).values():
        console.print(sentence)
    if args.tokens is not None:
        console.print(f"tokens: {args.tokens}")
    console.print(f"the page: {folder / PAGE}")
    return 0
