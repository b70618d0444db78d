"""Run all campaigns, and print one table: python -m tests.campaign --minutes 10 --seed 0"""

import argparse
import sys

from tests.campaign import inputs
from tests.campaign.table import Table

# Name: a function `run(seconds, seed, table)`, which prints each fault and counts all trials in the table.
CAMPAIGNS = {"inputs": inputs.run}


def main() -> int:
    """Share the time among the campaigns; 1 if any fell short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table = Table()
    for name, run in CAMPAIGNS.items():
        print(f"{name}: seed {args.seed}, {args.minutes / len(CAMPAIGNS):g} minutes", flush=True)
        run(args.minutes * 60 / len(CAMPAIGNS), args.seed, table)
    print(table)
    return int(table.fell_short > 0)


if __name__ == "__main__":
    sys.exit(main())
