"""Costs of taking parts away, as study 14 measures them: manipulation checks of other studies."""

from pathlib import Path

import numpy as np

from experiments.lab.claims import Stake
from experiments.lab.results import Results

PATH = Path(__file__).resolve().parents[1] / "14_parts" / "results.json"


def part(text: str, name: str) -> Stake:
    """Return the manipulation check that takes a part away from the trained base model.

    Args: name: of a cost in study 14.
    """

    def cost(_results: Results) -> np.ndarray:
        return Results(PATH).values("base", f"cost/{name}")

    return Stake(f"{text} (study 14)", cost=cost)
