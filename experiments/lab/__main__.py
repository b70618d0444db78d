"""Run every study of `experiments/`, one after the other, or begin a new one.

python -m experiments.lab [OPTIONS]
python -m experiments.lab new NAME
"""

import subprocess
import sys
from pathlib import Path

from experiments.lab import new, overview
from experiments.lab.options import make_parser

EXPERIMENTS = Path(__file__).resolve().parents[1]
PROG = "python -m experiments.lab"


def main(argv: list[str], experiments: Path = EXPERIMENTS) -> int:
    """Run all studies with the same options, then print the overview. Returns the largest exit code."""
    if argv[:1] == ["new"]:
        return _new(argv[1:], experiments)
    description = (
        f"Run every study: train and measure missing runs, then write tables and pictures. Or: {PROG} new NAME"
    )
    make_parser(PROG, description).parse_args(argv)
    worst = 0
    for script in overview.scripts(experiments):
        print(f"== {script.parent.name}", flush=True)
        code = subprocess.run([sys.executable, str(script), *argv]).returncode
        if code == 130:  # Ctrl-C
            return code
        worst = max(worst, code)
    print(f"\n{overview.overview_table(experiments)}")
    return worst


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
