"""Run every study of `experiments/`, one after the other, or begin a new one.

python -m experiments.lab [OPTIONS]
python -m experiments.lab new NAME
"""

import subprocess
import sys
import time
from pathlib import Path

from experiments.lab import new, overview
from experiments.lab.options import make_parser

EXPERIMENTS = Path(__file__).resolve().parents[1]
PROG = "python -m experiments.lab"


def main(argv: list[str], experiments: Path = EXPERIMENTS) -> int:
    """Run all studies with the same options, then print the overview. Returns the largest exit code.

    With --fresh it first deletes all results and runs. So it trains a run that several studies need only once. After a
    stop, the same command without --fresh makes what is still missing.
    """
    if argv[:1] == ["new"]:
        return _new(argv[1:], experiments)
    description = (
        f"Run every study: train and measure missing runs, then write tables and pictures. Or: {PROG} new NAME"
    )
    options = make_parser(PROG, description).parse_args(argv)
    scripts, begun = overview.scripts(experiments), time.monotonic()
    rest = [word for word in argv if word not in ("--fresh", "--remeasure")]
    if options.fresh:
        worst = _each(scripts, [*rest, "--forget"], quiet=True)
        if worst:
            return worst
        argv = rest
        print("deleted all results and runs; if you stop, run the same command without --fresh to resume", flush=True)
    before = [_stored(script) for script in scripts]
    worst = _each(scripts, argv)
    if worst == STOPPED:
        return worst
    if before != [_stored(script) for script in scripts] and not options.redraw:
        print("== all tables and pictures again, with the noise of all runs", flush=True)
        worst = max(worst, _each(scripts, [*rest, "--redraw"], quiet=True))
    print(f"\n{overview.overview_table(experiments)}\n{(time.monotonic() - begun) / 60:.0f} minutes")
    return worst


STOPPED = 130  # the exit code after Ctrl-C


def _each(scripts: list[Path], argv: list[str], *, quiet: bool = False) -> int:
    """Run all studies, until one is stopped. Returns the largest exit code, or that of a stop."""
    worst = 0
    for script in scripts:
        begun = time.monotonic()
        if not quiet:
            print(f"== {script.parent.name}", flush=True)
        out = subprocess.DEVNULL if quiet else None
        code = subprocess.run([sys.executable, str(script), *argv], stdout=out).returncode
        if code == STOPPED:
            return code
        if not quiet:
            print(f"{script.parent.name}: {(time.monotonic() - begun) / 60:.1f} minutes", flush=True)
        worst = max(worst, code)
    return worst


def _stored(script: Path) -> bytes:
    """A study's results as they are stored."""
    path = script.with_name("results.json")
    return path.read_bytes() if path.exists() else b""


def _new(argv: list[str], experiments: Path) -> int:
    try:
        if len(argv) != 1 or argv[0].startswith("-"):
            raise ValueError(f"new takes one name, not {' '.join(argv)!r}; write {PROG} new my_question")
        folder = new.make(argv[0], experiments)
    except (ValueError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder}; try: python {folder / 'run.py'} --short")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
