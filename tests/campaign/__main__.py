"""Run campaigns: a line a trial, what fell short, and one table."""

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.campaign.home import Home
from tests.campaign.trials import KINDS, attempt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--minutes", type=float, default=10.0, help="beside the making of good files")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--commands", nargs="+", default=[""], help="which begin with these texts")
parser.add_argument("--trial", nargs="+", type=int, help="this trial, or those from one to another")
args = parser.parse_args()
table = Counter[tuple[str, str]]()
with tempfile.TemporaryDirectory(prefix="campaign-") as root:
    home, begin = Home(Path(root).resolve(), tuple(args.commands)), time.monotonic()
    for number in range(args.trial[0], args.trial[-1] + 1) if args.trial else itertools.count():
        if not args.trial and time.monotonic() > begin + 60 * args.minutes:
            break
        rng = random.Random(f"{args.seed} {number}")
        (command,) = rng.choices(home.commands, [command.weight for command in home.commands])
        home.usual(command)
        home.copy()
        trial = KINDS[number % len(KINDS)](home, rng, command)
        if trial is None:
            continue
        answer, faults = attempt(home, trial, command)
        said = ", ".join(sorted(faults)) or "as it must"
        table[trial.name, said] += 1
        print(f"{number}: {said}: {trial.name}: dsv3 {' '.join(trial.argv)[:400]!r}", flush=True)
        if faults:
            print(f"  --seed {args.seed} --trial {number}: {trial.path or trial.kills or ''}")
            print(f"  exit code {answer.code}: {answer.err.strip()[-1500:]}", flush=True)
for (name, said), count in sorted(table.items()):
    print(f"{name:24} {said:14} {count:7,}")
sys.exit(any(said != "as it must" for _, said in table))  # 1 if any fell short
