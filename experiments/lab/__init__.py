"""The lab: a question, a few variants of one recipe, some seeds, and the table and picture that answer it.

A study is a folder of `experiments/` with a `run.py`, which lists its variants as diffs of a base recipe. Running it
trains what is missing, measures it, and writes results.json, the picture and the table of README.md.
"""

from experiments.lab.results import ABOVE, Column, Results
from experiments.lab.study import RUNS, After, Study
from experiments.lab.work import Trained

__all__ = ["ABOVE", "RUNS", "After", "Column", "Results", "Study", "Trained"]
