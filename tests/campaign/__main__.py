"""Run campaigns, and print one table: python -m tests.campaign --minutes 10 --seed 0 --only damage kills"""

import argparse
import sys
import time

from tests.campaign import damage, disks, fuzz, inputs, kills, sanitizers
from tests.campaign.trials import Table

# Name: a function `run(until, seed, table, least)`, which prints each fault and counts all trials in the table.
CAMPAIGNS = {
    "inputs": inputs.run, "fuzz": fuzz.run, "damage": damage.run, "kills": kills.run, "disks": disks.run,
    "sanitizers": sanitizers.run,
}  # fmt: skip


def main() -> int:
    """Share the time among the campaigns; 1 if any fell short or tried nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS), help="these campaigns")
    parser.add_argument("--least", type=int, default=1, help="trials of each campaign, however long they take")
    args = parser.parse_args()
    table = Table()
    try:
        for name in args.only:
            seconds = 60 * args.minutes / len(args.only)
            print(f"{name}: seed {args.seed}, {seconds / 60:.1f} minutes", flush=True)
            CAMPAIGNS[name](time.monotonic() + seconds, args.seed, table, args.least)
    except KeyboardInterrupt:
        print("stopped")
    print(table)
    return int(table.fell_short > 0 or table.tried == 0)


if __name__ == "__main__":
    sys.exit(main())
