"""The lab's commands: run studies, begin a new one, or let a recipe compete.

python -m experiments.lab run 21 03      # studies by number; all: every study
python -m experiments.lab new my_question
python -m experiments.lab board my_recipe
"""

import argparse
import sys
import time
from pathlib import Path

from experiments.lab import board, new, overview, running
from experiments.lab.study import load

EXPERIMENTS = Path(__file__).resolve().parents[1]


def main(argv: list[str], experiments: Path = EXPERIMENTS) -> int:
    """Do a command.

    Returns: the exit code: 2 for bad input, 130 after Ctrl-C, else the largest of the studies'.
    """
    options = _parser().parse_args(argv)
    try:
        if options.command == "new":
            folder = new.make(options.name, experiments)
            print(f"wrote {folder}; try: python -m experiments.lab run {folder.name[:2]} --short")
            return 0
        if options.command == "board":
            return board.compete(
                options.recipe, experiments, short=options.short, workers=options.workers
            )
        return _run(options, experiments)
    except (ValueError, OSError) as error:
        print(f"lab: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command, without --fresh, to resume", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, experiments: Path) -> int:
    """Run the studies. After several, draw all again: verdicts then have the noise of all runs.

    --fresh and --remeasure first delete the results of all, so that a run which several studies
    need is made once.
    """
    every: dict[str, Path] = {}
    for path in overview.folders(experiments):
        other = every.setdefault(path.name[:2], path)
        if other != path:
            raise ValueError(f"{other.name} and {path.name} have one number; rename one of them")
    begun = time.monotonic()
    if unknown := [
        number for number in options.studies if number.zfill(2) not in every and number != "all"
    ]:
        raise ValueError(f"study={unknown[0]!r} is not one of {', '.join(every)}, or all")
    chosen = every if "all" in options.studies else [number.zfill(2) for number in options.studies]
    studies = [load(every[number]) for number in chosen]
    for study in studies:
        running.check(study, options)
    if options.fresh or options.remeasure:
        for study in studies:
            running.forget(study, options)
    before, worst = [_stored(study) for study in studies], 0
    for study in studies:
        print(f"== {study.folder.name}", flush=True)
        worst = max(worst, running.run(study, options))
    if len(studies) > 1 and not options.short and before != [_stored(study) for study in studies]:
        for study in studies:
            running.run(study, argparse.Namespace(**vars(options) | {"redraw": True}))
    if not (options.short or options.list):
        overview.write(experiments)
    if len(studies) > 1:
        minutes = (time.monotonic() - begun) / 60
        print(f"\n{overview.overview_table(experiments)}\n{minutes:.0f} minutes")
    return worst


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _stored(study) -> bytes:
    path = study.folder / "results.json"
    return path.read_bytes() if path.exists() else b""


def _parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m experiments.lab",
        description="Run studies, begin a new one, or let a recipe compete.",
    )
    commands = root.add_subparsers(dest="command", required=True)
    make = commands.add_parser(
        "new", help="make a folder for a study of your own, which runs as it is"
    )
    make.add_argument("name", help="a short word, as my_question")
    text = "Train experiments/board/RECIPE.py beside the best of each of its tracks."
    race = commands.add_parser("board", help=text, description=text, allow_abbrev=False)
    race.add_argument("recipe", metavar="RECIPE", help="a file's name without .py, as two_of_16")
    text = "Train and measure the runs that results.json lacks, then write tables and pictures."
    parser = commands.add_parser("run", help=text, description=text, allow_abbrev=False)
    parser.add_argument(
        "studies", nargs="+", metavar="STUDY", help="numbers of studies, as 21; or all"
    )
    parser.add_argument(
        "--base",
        help="the recipe that the variants change: lab, tiny, mini, …; default: the study's",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the base, as steps=5000"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="default: the study's own, 0 1 2 or more"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="VARIANT", help="run these variants; default: all"
    )
    for trains in (race, parser):
        trains.add_argument(
            "--workers",
            type=_positive,
            help="runs at a time; default: one per core, or 1 on an accelerator",
        )
        trains.add_argument(
            "--short", action="store_true", help="run a few steps in a temporary folder, as a check"
        )
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--fresh", action="store_true", help="delete results and runs, then train and measure again"
    )
    one.add_argument(
        "--remeasure",
        action="store_true",
        help="delete results, then measure the existing runs again",
    )
    one.add_argument(
        "--redraw", action="store_true", help="run nothing; rewrite the table and the picture"
    )
    one.add_argument(
        "--list", action="store_true", help="run nothing; list which runs are done or missing"
    )
    return root


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
