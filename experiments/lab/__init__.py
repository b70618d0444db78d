"""The lab: train variants of a recipe from several seeds, then write their table and picture.

A study is a folder of `experiments/` with a `study.py` that lists its variants as changes of a base
recipe. Running it trains the missing runs, measures them, and writes results.json, the picture and
the table in README.md.
"""

from experiments.lab.bases import RUNS_FOLDER
from experiments.lab.claims import Claim, Stake, ln, logit
from experiments.lab.results import Number, Results, write_figure
from experiments.lab.study import MeasuredWith, OnTask, Study
from experiments.lab.tables import Column
from experiments.lab.trained import TrainedRun

__all__ = [
    "RUNS_FOLDER",
    "Claim",
    "Column",
    "MeasuredWith",
    "Number",
    "OnTask",
    "Results",
    "Stake",
    "Study",
    "TrainedRun",
    "ln",
    "logit",
    "write_figure",
]
