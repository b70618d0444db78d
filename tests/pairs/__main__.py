"""Do all rows, one after another: python -m tests.pairs --out runs/pairs

Each row's verdict is appended to OUT/verdicts.jsonl at once. The same command resumes: it skips
rows that have a verdict, but repeats faults. The exit code is 1 if a fault is left. Several
processes share the work by --part 1/2 and 2/2; the command without it counts what all have done.
"""

import argparse
import json
import math
import sys
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import jax

from tests.pairs import decoding, training
from tests.pairs.covering import Row, cover, pairs_of, refusal

AREAS = {"training": training, "decoding": decoding}


def said(area: str, row: Row) -> str:
    """What is not usual in a row."""
    usual = {name: next(iter(values)) for name, values in AREAS[area].FACTORS.items()}
    unusual = [f"{name}={value!r}" for name, value in row.items() if value != usual[name]]
    return ", ".join(unusual) or "all usual"


def verdict_of(area: str, row: Row, scratch: Path) -> str:
    try:
        return AREAS[area].check_row(row, scratch)
    except Exception as error:  # whatever it is, it is a fault
        traceback.print_exc()
        return f"FAULT: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    finally:
        jax.clear_caches()


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--only", choices=list(AREAS), nargs="+", default=list(AREAS))
    parser.add_argument("--having", default="", help="only rows whose line has this text")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after them")
    parser.add_argument("--part", default="1/1", help="2/3: every third row, from the second on")
    args, begun = parser.parse_args(), time.monotonic()
    part, parts = map(int, args.part.split("/"))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "verdicts.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    done = {(line["area"], json.dumps(line["row"])): line["verdict"] for line in lines}
    faults = 0
    for area in args.only:
        module, scratch = AREAS[area], (args.out / f"scratch-{part}").absolute()
        module.write_data(scratch)
        refused_by = partial(refusal, partial(module.Plan, scratch=scratch))
        accepted, refused = cover(module.FACTORS, module.BASES, refused_by)
        for row in (accepted + refused)[part - 1 :: parts]:
            key, text = (area, json.dumps(row)), said(area, row)
            if args.having not in text or not done.get(key, "FAULT").startswith("FAULT"):
                continue
            if time.monotonic() - begun > 60 * args.minutes:
                break
            start = time.monotonic()
            done[key] = verdict_of(area, row, scratch)
            with file.open("a") as out:
                out.write(json.dumps({"area": area, "row": row, "verdict": done[key]}) + "\n")
            print(f"{time.monotonic() - start:5.1f} s  {done[key]}  [{text}]", flush=True)
        verdicts = [(row, done.get((area, json.dumps(row)), "to do")) for row in accepted + refused]
        count = Counter(verdict.split(":")[0] for _, verdict in verdicts)
        met = pairs_of(row for row, verdict in verdicts if verdict == module.DONE)
        here = set(pairs_of(accepted))
        print(f"{area}: {dict(count)}; of {len(here)} pairs that may meet, {len(met & here)} have")
        for row, verdict in verdicts[: len(accepted)]:
            if verdict.startswith("refused"):
                print(f"  refused later than it was expected: {said(area, row)}")
        faults += count["FAULT"]
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
