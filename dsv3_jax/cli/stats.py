"""`dsv3 stats RUN`: count which experts held-out text is routed to."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dsv3_jax.cli.common import parse, prepare_process

MOST_LAYERS = 8  # in a sentence


@dataclass
class Stats:
    """Count how a run's checkpoint routes held-out text; write stats.json, pictures, and index.html."""

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
    """Write the report, and print a line for each layer."""
    args = parse(Stats, argv, "stats")
    prepare_process()
    import jax.numpy as jnp

    from dsv3_jax.ops import balance
    from dsv3_jax.report.progress import text_console, track
    from dsv3_jax.stats.reporting import PAGE, report

    made = report(
        args.run,
        args.out,
        paths=args.paths,
        text=args.text,
        step=args.step,
        batches=args.batches,
        draws=args.draws,
        seed=args.seed,
        devices=args.devices,
        worth=args.worth,
        worth_tokens=args.worth_tokens,
        against=args.against,
        tokens=args.tokens,
        kernels=args.kernels,
        follow=track,
    )
    counts, special, numbers = made.stats, made.specialisation, made.numbers
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
    for sentence in _sentences(numbers):
        console.print(sentence)
    if args.tokens is not None:
        console.print(f"tokens: {args.tokens}")
    console.print(f"the page: {made.folder / PAGE}")
    return 0


def _sentences(numbers: dict[str, Any]) -> Iterator[str]:
    """Return a sentence on each measurement of the report beside load and domains."""
    names, bias, information = numbers["layers"], numbers["bias"], numbers["information"]
    if bias is not None and any(bias["changed_choices"]):
        parts = zip(names, bias["changed_choices"], bias["max_vio_without"], strict=True)
        each = _listed(f"{name} {share:.0%} ({vio:.2f})" for name, share, vio in parts)
        yield f"choices that the bias changes (MaxVio without it): {each}"
    if information is not None:
        for name, kind in (("token", "I(expert; token)"), ("domain_given_token", "I(expert; domain | token)")):
            columns = (information[f"{name}{end}"] for end in ("", "_low", "_high"))
            parts = zip(names, *columns, strict=True)
            each = _listed(f"{layer} {bits:.3f} [{low:.3f}, {high:.3f}]" for layer, bits, low, high in parts)
            yield f"{kind}, bits less chance: {each}"
    worth = numbers["worth"]
    if worth is not None:
        rows = enumerate(worth["without"])
        loss, i, e = max((loss, i, e) for i, row in rows for e, loss in enumerate(row) if loss is not None)
        low, high = worth["low"][i][e], worth["high"][i][e]
        more = f"{loss - worth['loss']:+.4f} nats a token [{low:.4f}, {high:.4f}]"
        yield f"without expert {e} of {names[i]}, the most missed: {more}, on {worth['tokens']:,} tokens"
    other = numbers["against"]
    if other is not None:
        of_both = f"{numbers['header']['bits_per_byte']} bits a byte, {other['bits_per_byte']} of {other['run']}"
        yield f"against {other['run']}, step {other['step']}: {of_both}"
        if other["shared"] is not None:
            parts = zip(names, other["shared"], other["by_chance"], strict=True)
            known = (part for part in parts if part[1] is not None)
            each = _listed(f"{name} {share:.0%} (chance {chance:.0%})" for name, share, chance in known)
            yield f"choices that go to the matched expert: {each}"
        if other["note"] is not None:
            yield other["note"]


def _listed(parts: Iterable[str]) -> str:
    """The first parts, and how many more there are."""
    parts = list(parts)
    more = f", and {len(parts) - MOST_LAYERS} more layers on the page" if len(parts) > MOST_LAYERS else ""
    return ", ".join(parts[:MOST_LAYERS]) + more
