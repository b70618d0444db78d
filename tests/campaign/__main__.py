"""Run campaigns, and print one table: python -m tests.campaign --minutes 10 --seed 0 --only files kills"""

import argparse
import sys
from collections import Counter

from tests.campaign import fuzz


def main() -> int:
    """Run trials for so long; 1 if any fell short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="beside the making of good files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=fuzz.KINDS, default=list(fuzz.KINDS), help="kinds of trials")
    parser.add_argument("--least", type=int, default=1, help="trials, however long they take")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--trial", type=int, help="repeat this trial")
    args = parser.parse_args()
    if args.trial is not None:
        args.minutes, args.least, args.first = 0, 1, args.trial
    table = Counter[tuple[str, str]]()
    fuzz.run(args.only, 60 * args.minutes, args.seed, table, args.least, args.first)
    for (name, what), count in sorted(table.items()):
        print(f"{name:24} {what:14} {count:7,}")
    return int(any(what != "trials" for _, what in table))


if __name__ == "__main__":
    sys.exit(main())
