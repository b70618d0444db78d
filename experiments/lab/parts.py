"""The cost of taking context away, as study 14 measures it: a manipulation check of others."""

from pathlib import Path

import numpy as np

from experiments.lab.claims import Stake
from experiments.lab.results import Results

PATH = Path(__file__).resolve().parents[1] / "14_parts" / "results.json"


def _cost(_results: Results) -> np.ndarray:
    return Results(PATH).values("base", "cost/context of 2 tokens at most")


CONTEXT = Stake("no context but the token before (study 14)", cost=_cost)
