"""`python -m experiments.lab`: every study of `experiments/`, one after the other; what is there already is kept."""

import subprocess
import sys
from pathlib import Path

from experiments.lab import overview


def main(words: list[str]) -> int:
    """Run all studies of the folder `experiments`; `words` are handed to each. Returns the exit code of the worst."""
    experiments = Path("experiments")
    scripts = sorted(experiments.glob("[0-9][0-9]_*/run.py"))
    if not scripts:
        print("there is no experiments/NN_name/run.py here: call it from the repository", file=sys.stderr)
        return 2
    worst = 0
    for script in scripts:
        print(f"== {script.parent.name}", flush=True)
        code = subprocess.run([sys.executable, str(script), *words]).returncode
        if code == 130:
            return code
        worst = max(worst, code)
    print(f"\n{overview.table(experiments)}")
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
