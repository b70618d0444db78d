"""Run campaigns, and print one table.

`python -m tests.campaign --minutes 10 --seed 0 --only files kills`
"""

import argparse
import itertools
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.campaign.judging import Draws, Home, attempt
from tests.campaign.rooms import ROOMS

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--minutes", type=float, default=10.0, help="beside the making of good files")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--only", nargs="+", choices=ROOMS, default=list(ROOMS), help="rooms")
parser.add_argument("--commands", nargs="+", default=[""], help="which begin with these texts")
parser.add_argument("--trial", nargs="+", type=int, help="this trial, or those from one to another")
args = parser.parse_args()
table, stopped = Counter[tuple[str, str]](), list[int]()
# SIGTERM ends the trial, then the table is printed
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
# each room once, then the others
order = [room for i in range(10) for room in ROOMS if i < ROOMS[room][0]]
with tempfile.TemporaryDirectory(prefix="campaign-") as root:
    made, begin = Home(Path(root).resolve(), args.commands), time.monotonic()
    for number in range(args.trial[0], args.trial[-1] + 1) if args.trial else itertools.count():
        if stopped or (not args.trial and time.monotonic() > begin + 60 * args.minutes):
            break
        around, at = divmod(number, len(order))
        often, change, needed = ROOMS[room := order[at]]
        if room not in args.only or not any(needed in command.words for command in made.commands):
            continue
        trial = change(made, Draws(args.seed, room, around * often + order[:at].count(room)))
        answer, faults = attempt(made, trial)
        table.update([(trial.name, "trials"), *((trial.name, fault) for fault in faults)])
        if faults:
            argv = " ".join(trial.argv)[:400]
            print(f"{', '.join(sorted(faults))}: {trial.name}: dsv3 {argv!r} | {trial.what}")
            again = f"--seed {args.seed} --trial {number}"
            print(f"  exit code {answer.code}, {answer.cpu:.1f} CPU s; {again}")
            print(f"  {answer.err.strip()[-1500:]}", flush=True)
for (name, what), count in sorted(table.items()):
    print(f"{name:24} {what:14} {count:7,}")
sys.exit(any(what != "trials" for _, what in table))  # 1 if any fell short
