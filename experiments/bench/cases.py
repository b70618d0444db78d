"""The benchmarks on the CPU by name.

python experiments/bench/cases.py                              # lists the cases
python experiments/bench/cases.py step                         # measures one, and stores its rows
python experiments/bench/cases.py caches 'cells=["1024x1"]'    # with another setting
python experiments/bench/cases.py --table                      # prints all that is stored

Settings are the arguments of a case's function, in JSON. The sides of a case take turns, after an
uncounted run of each, so that a machine that slows down slows all of them.
"""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from experiments.bench import commits, decode, harness, train_step
from experiments.bench.harness import Rows

CASES: dict[str, Callable[..., Rows]] = {
    "step": train_step.against_peer,
    "caches": decode.caches,
    "commits": commits.commits,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="NAME | SETTING=JSON")
    parser.add_argument("--table", action="store_true", help="print all that is stored")
    args = parser.parse_args()
    settings = {k: json.loads(v) for k, _, v in (w.partition("=") for w in args.words if "=" in w)}
    names = [word for word in args.words if "=" not in word]
    for name in names:
        if name not in CASES:
            parser.error(f"case={name!r} is not one of {', '.join(CASES)}")
        if unknown := set(settings) - set(inspect.signature(CASES[name]).parameters):
            parser.error(f"{min(unknown)!r} is not a setting of {name}")
    for name in names:
        for row_name, row in CASES[name](**settings):
            print(f"{name}, {row_name}: {row}", flush=True)
            harness.save(name, row_name, row)
    stored = harness.load()
    for name in stored if args.table else names:
        print(f"\n{name}\n\n{harness.table(stored[name])}")
    if not names and not args.table:
        for name, measure in CASES.items():
            question = (measure.__doc__ or "").splitlines()[0]
            defaults = inspect.signature(measure).parameters.values()
            print(f"{name}: {question}")
            print("   ", *(f"{setting.name}={json.dumps(setting.default)}" for setting in defaults))


if __name__ == "__main__":
    main()
