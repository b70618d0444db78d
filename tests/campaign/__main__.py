"""Run all campaigns, and print one table: python -m tests.campaign --minutes 10 --seed 0"""

import argparse
import sys

from tests.campaign import cluster, damage, disks, fuzz, inputs, kills, models, sanitizers, writers
from tests.campaign.table import Table

# Name: a function `run(seconds, seed, table)`, which prints each fault and counts all trials in the table.
CAMPAIGNS = {
    "inputs": inputs.run,
    "fuzz": fuzz.run,
    "damage": damage.run,
    "kills": kills.run,
    "writers": writers.run,
    "cluster": cluster.run,
    "disks": disks.run,
    "models": models.run,
    "sanitizers": sanitizers.run,
}
SHARES = {"models": 3}  # of the time, where others have 1: 200 configurations in two hours


def main() -> int:
    """Share the time among the campaigns; 1 if any fell short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS), help="these campaigns")
    args = parser.parse_args()
    table = Table()
    for name in args.only:
        minutes = args.minutes * SHARES.get(name, 1) / sum(SHARES.get(other, 1) for other in args.only)
        print(f"{name}: seed {args.seed}, {minutes:g} minutes", flush=True)
        CAMPAIGNS[name](minutes * 60, args.seed, table)
    print(table)
    return int(table.fell_short > 0)


if __name__ == "__main__":
    sys.exit(main())
