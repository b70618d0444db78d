"""Costs of taking parts away, as study 14 measures them: manipulation checks of other studies."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.lab.claims import Stake
from experiments.lab.results import Results

PATH = Path(__file__).resolve().parents[1] / "14_parts" / "results.json"


def part(text: str, name: str) -> Stake:
    """Return the manipulation check that takes a part away from the trained base model.

    Args: name: of a cost in study 14.
    """
    return Stake(f"{text} (study 14)", _cost(name))


def _cost(name: str) -> Callable[[Results], np.ndarray]:
    def cost(_results: Results) -> np.ndarray:
        found = Results(PATH)
        return found.values("base", f"cost/{name}") if "base" in found.variants else np.zeros(0)

    return cost
