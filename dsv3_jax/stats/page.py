"""Fill `page.html`, the page of `dsv3 stats`: one file that needs no other file and no network."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from matplotlib.colors import Normalize, to_hex

from dsv3_jax.report.colours import DIVERGING
from dsv3_jax.report.run_plots import DPI, load_norm, load_over_mean
from dsv3_jax.stats.measures import domain_preference

NUM_PARTNERS = 6  # co-activated experts listed for each expert
BAR_COLOURS = 17
NO_LOAD = "#888888"
DARK, LIGHT = "#1c1e21", "#ffffff"  # text on pale cells and on saturated cells


class Cell(NamedTuple):
    """One expert of one layer in a load map."""

    ratio: float | None  # load / mean load of the layer; None for a layer without load
    fill: str
    ink: str


def render_page(numbers: dict[str, Any], folder: str | Path) -> str:
    """Render the page from the numbers of stats.json (`reporting.KEYS`) and the pictures in a folder.

    Args: folder: holds PNG files of `reporting.PICTURES`; a missing picture leaves its section out.
    Returns: HTML, with the pictures inside and all text escaped.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> from dsv3_jax.stats.measures import specialisation
        >>> from dsv3_jax.stats.reporting import as_json
        >>> from dsv3_jax.stats.routing_stats import RoutingStats
        >>> stats = RoutingStats.from_loads(np.array([[[3, 1]], [[0, 4]]]), np.array([0, 1]), ["code", "prose"])
        >>> numbers = as_json(stats, specialisation(stats, draws=1), ByteTokenizer(), None)
        >>> page = render_page({"run": "demo", "step": 400, "data": "text"} | numbers, "no/pictures")
        >>> page.split("\\n")[0]
        '<!DOCTYPE html>'
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": _fixed, "thousands": "{:,}".format}
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False}
    maps = _load_maps(numbers)
    norm, _ = load_norm(np.stack([ratios for _, ratios in maps]))
    return environment.get_template("page.html").render(
        numbers,
        maps=[{"name": name, "rows": _cells(ratios, norm)} for name, ratios in maps],
        bar={"colours": [to_hex(DIVERGING(x)) for x in np.linspace(0, 1, BAR_COLOURS)], "end": f"{norm.vmax:.3g}"},
        pictures={path.name: _picture(path) for path in Path(folder).glob("*.png")},
        script_data=_script_data(numbers),
    )


def _fixed(value: int | float | None, digits: int) -> str:
    """Write a number with so many decimals, and a missing number as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def _load_maps(numbers: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Divide loads by the mean of their layer: (name, [L, E]) of all text, then of each domain if there are several."""
    loads = [("all", numbers["load"])]
    if len(numbers["domains"]) > 1:
        loads += numbers["load_by_domain"].items()  # a list of pairs, because a domain may be named "all"
    return [(name, load_over_mean(load, name)) for name, load in loads]


def _cells(ratios: np.ndarray, norm: Normalize) -> list[list[Cell]]:
    return [[_cell(float(ratio), norm) for ratio in row] for row in ratios]


def _cell(ratio: float, norm: Normalize) -> Cell:
    if np.isnan(ratio):
        return Cell(None, NO_LOAD, LIGHT)
    return Cell(ratio, to_hex(DIVERGING(norm(ratio))), DARK if abs(norm(ratio) - 0.5) < 0.28 else LIGHT)


def _picture(path: Path) -> dict[str, Any]:
    """Width in CSS pixels, of which an inch has 96, and the file in base64."""
    png = path.read_bytes()
    return {"width": int.from_bytes(png[16:20]) * 96 // DPI, "base64": base64.b64encode(png).decode("ascii")}


def _script_data(numbers: dict[str, Any]) -> dict[str, Any]:
    """Select what the page's script shows of each expert."""
    ratios = load_over_mean(numbers["load"], "all")
    preference = domain_preference(np.array([numbers["load_by_domain"][name] for name in numbers["domains"]]))
    experts = [
        [
            {
                "load": _rounded(ratios[layer, e]),
                "domains": [_rounded(x) for x in preference[:, layer, e]],
                "partners": _partners(numbers["coactivation_lift"][layer][e]),
                "favourites": [
                    {key: token[key] for key in ("text", "num_routed", "lift")}
                    for token in numbers["favourites"][layer][e]
                ],
                "contexts": numbers["contexts"][layer][e],
            }
            for e in range(numbers["experts"])
        ]
        for layer in range(len(numbers["layers"]))
    ]
    return {"layers": numbers["layers"], "domains": numbers["domains"], "experts": experts}


def _partners(lifts: Sequence[float | None]) -> list[tuple[int, float]]:
    """List the experts with the largest co-activation lift: (expert, lift)."""
    known = [(expert, round(lift, 2)) for expert, lift in enumerate(lifts) if lift is not None]
    return sorted(known, key=lambda pair: -pair[1])[:NUM_PARTNERS]


def _rounded(x: float) -> float | None:
    return None if np.isnan(x) else round(float(x), 3)
