"""Run every study of `experiments/`, one after the other: `python -m experiments.lab [OPTIONS]`."""

import subprocess
import sys
from pathlib import Path

from experiments.lab import overview
from experiments.lab.study import make_parser

EXPERIMENTS = Path(__file__).resolve().parents[1]


def main(argv: list[str], experiments: Path = EXPERIMENTS) -> int:
    """Run all studies with the same options, then print the overview. Returns the largest exit code."""
    description = "Run every study: train and measure missing runs, then write tables and pictures."
    make_parser("python -m experiments.lab", description).parse_args(argv)
    worst = 0
    for script in sorted(experiments.glob("[0-9][0-9]_*/run.py")):
        print(f"== {script.parent.name}", flush=True)
        code = subprocess.run([sys.executable, str(script), *argv]).returncode
        if code == 130:  # Ctrl-C
            return code
        worst = max(worst, code)
    print(f"\n{overview.overview_table(experiments)}")
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
