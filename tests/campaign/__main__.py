"""Run campaigns, and print one table: python -m tests.campaign --minutes 10 --seed 0 --only files kills"""

import argparse
import sys

from tests.campaign import fuzz

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--minutes", type=float, default=10.0, help="beside the making of good files")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--only", nargs="+", choices=fuzz.KINDS, default=list(fuzz.KINDS), help="kinds of trials")
parser.add_argument("--commands", nargs="+", default=[""], help="only commands that begin with one of these texts")
parser.add_argument("--trial", nargs="+", type=int, help="repeat this trial, or the trials between two")
table = fuzz.run(parser.parse_args())
for (name, what), count in sorted(table.items()):
    print(f"{name:24} {what:14} {count:7,}")
sys.exit(any(what != "trials" for _, what in table))  # 1 if any fell short
