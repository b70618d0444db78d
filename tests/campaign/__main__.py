"""Run all campaigns, and print one table: python -m tests.campaign --minutes 10 --seed 0"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

from tests.campaign import damage, disks, fuzz, inputs, kills, models, sanitizers, writers
from tests.campaign.table import Table

# Name: a function `run(seconds, seed, table, least)`, which prints each fault and counts all trials in the table.
CAMPAIGNS = {
    "inputs": inputs.run,
    "fuzz": fuzz.run,
    "damage": damage.run,
    "kills": kills.run,
    "writers": writers.run,
    "disks": disks.run,
    "models": models.run,
    "sanitizers": sanitizers.run,
}
SHARES = {"models": 3}  # of the time, where others have 1: 200 configurations in two hours
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- The table of --readme. -->\n", "<!-- Its end. -->\n"


def main() -> int:
    """Share the time among the campaigns; 1 if any fell short or tried nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="in all, with those of the record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS), help="these campaigns")
    parser.add_argument("--least", type=int, default=1, help="trials of each campaign, however long they take")
    parser.add_argument("--record", type=Path, help="file of the trials: a stopped run resumes from it")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md, too")
    args = parser.parse_args()
    if args.record is not None:
        args.record.parent.mkdir(parents=True, exist_ok=True)
    table = Table(args.record, args.seed)
    begun = table.tried
    try:
        for name in args.only:
            begin = time.monotonic()
            share = args.minutes * SHARES.get(name, 1) / sum(SHARES.get(other, 1) for other in args.only)
            left = share * 60 - table.seconds(name)
            if left <= 0 and begun:
                continue
            print(f"{name}: seed {args.seed}, {max(left, 0) / 60:.1f} minutes", flush=True)
            CAMPAIGNS[name](left, args.seed, table, args.least)
            print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("stopped; the same command resumes" if args.record is not None else "stopped")
    print(table)
    only = "" if args.only == list(CAMPAIGNS) else f" --only {' '.join(args.only)}"
    words = f"`python -m tests.campaign --minutes {args.minutes:g} --seed {args.seed}{only}`"
    load = f", at a load of {os.getloadavg()[0]:.0f} at its end" if hasattr(os, "getloadavg") else ""
    text = f"{words}: {table.spent / 60:.0f} minutes of trials on {os.cpu_count()} CPU cores{load}.\n\n{table}\n"
    if args.record is not None:
        args.record.with_suffix(".md").write_text(text)
    if args.readme:
        pattern = re.escape(BEGIN) + ".*" + re.escape(END)
        new = re.sub(pattern, lambda _: BEGIN + text + "\n" + END, README.read_text(), flags=re.DOTALL)
        README.write_text(new)
    return int(table.fell_short > 0 or table.tried == 0)


if __name__ == "__main__":
    sys.exit(main())
