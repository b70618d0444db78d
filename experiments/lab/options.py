"""Options that all studies share."""

import argparse


def make_parser(prog: str | None, description: str) -> argparse.ArgumentParser:
    """Return the parser of the options that all studies share."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--base", help="the recipe that the variants change: lab, tiny, mini, …; default: the study's")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the base, as steps=5000")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the study's own, 0 1 2 or more")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="run these variants; default: all")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one per core, or 1 on an accelerator")
    parser.add_argument("--short", action="store_true", help="run a few steps in a temporary folder, as a check")
    only_one = parser.add_mutually_exclusive_group()
    only_one.add_argument("--fresh", action="store_true", help="delete results and runs, then train and measure again")
    only_one.add_argument("--forget", action="store_true", help="delete results and runs, and run nothing")
    only_one.add_argument(
        "--remeasure", action="store_true", help="delete results, then measure the existing runs again"
    )
    only_one.add_argument(
        "--check", action="store_true", help="train one finished run again; print by how much it moves"
    )
    only_one.add_argument("--redraw", action="store_true", help="run nothing; rewrite the table and the picture")
    only_one.add_argument("--list", action="store_true", help="run nothing; list which runs are done or missing")
    return parser
