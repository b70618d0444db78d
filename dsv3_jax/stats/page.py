"""The page of `dsv3 stats`: one file that needs no other file and no network.

The page holds stats.json, and the scripts of the folder `web` draw it. All values are escaped; the
page's policy runs its own script alone and loads nothing.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from dsv3_jax.report.colours import (
    ABOVE,
    BELOW,
    DARK_ABOVE,
    DARK_BELOW,
    DARK_MIDDLE,
    MEANINGS,
    MIDDLE,
)
from dsv3_jax.report.run_plots import load_finding

WEB = Path(__file__).parent / "web"
SCRIPTS = (
    "core.js", "maps.js", "lines.js", "layers.js", "experts.js", "texts.js", "panel.js",
    "table.js", "main.js",
)  # fmt: skip
FEW_DOCUMENTS = 20  # with fewer, percentiles of resamples cover less than 95 %
COLOURS = {"light": (MIDDLE, BELOW, ABOVE), "dark": (DARK_MIDDLE, DARK_BELOW, DARK_ABOVE)}


def render_page(numbers: dict[str, Any]) -> str:
    """Render the page from the numbers of stats.json (`numbers.KEYS`), without parts they lack.

    Returns: HTML, with style, script and numbers inside and all text escaped.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> from dsv3_jax.stats.measures import specialisation
        >>> from dsv3_jax.stats.numbers import as_json
        >>> from dsv3_jax.stats.routing_stats import RoutingStats
        >>> loads = np.array([[[3, 1]], [[0, 4]]])
        >>> stats = RoutingStats.from_loads(loads, np.array([0, 1]), ["code", "prose"])
        >>> numbers = as_json(stats, specialisation(stats, draws=1), ByteTokenizer(), None)
        >>> page = render_page({"run": "demo", "step": 400, "data": "text"} | numbers)
        >>> page.split("\\n")[0]
        '<!DOCTYPE html>'
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {
        "allow_nan": False,
        "ensure_ascii": False,
        "separators": (",", ":"),
    }

    # The page's policy allows this one script, by its hash.
    scripts = "\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = "(() => {\n" + scripts + "})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("page.html").render(
        title=f"Where tokens go: {numbers['run']}, step {numbers['step']}",
        has=partial(_has, numbers),
        findings=findings(numbers),
        meanings=MEANINGS,
        style=Markup((WEB / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
        data=numbers | {"colours": COLOURS},
    )


def _has(numbers: Mapping[str, Any], key: str) -> bool:
    """Whether a part has content: one domain prefers nothing, one expert has no partners."""
    value = numbers.get(key)
    if key == "domains":
        return len(numbers["domains"]) > 1
    return any(map(any, value)) if key == "partners" and value else bool(value)


def findings(numbers: Mapping[str, Any]) -> dict[str, str]:
    """Say in a sentence what each main part shows, by key.

    Means are over the trunk's layers, or over the heads of a trunk without experts.

    Example:
        >>> bias = {"changed_choices": [0.2, 0.4], "max_vio": [0.5, 0.5]}
        >>> bias["max_vio_without"] = [2.0, 3.0]
        >>> numbers = {"layers": ["layer 0", "layer 1"], "load": [[3, 1], [2, 2]], "bias": bias}
        >>> findings(numbers)["bias"]
        'The bias changes 30% of the choices; without it, MaxVio is 2.50 in place of 0.50.'
    """
    layers = numbers["layers"]
    found = {"load": load_finding(numbers["load"], numbers["layers"])}

    def mean(values: Any) -> float:
        """Mean of the known numbers of the trunk, else of the heads; NaN without any."""
        known = [(x, name) for x, name in zip(values, layers, strict=True) if x is not None]
        trunk = [x for x, name in known if not name.startswith("MTP")]
        return float(np.mean(trunk or [x for x, _ in known])) if known else float("nan")

    # A part that was not measured has no sentence.
    if bias := numbers.get("bias"):
        changed, vio, without = (
            mean(bias[key]) for key in ("changed_choices", "max_vio", "max_vio_without")
        )
        found["bias"] = (
            f"The bias changes {changed:.0%} of the choices; without it, MaxVio is {without:.2f} "
            f"in place of {vio:.2f}."
        )

    if known := numbers.get("information"):
        token, domain, given = (
            mean(known[key]) for key in ("token", "domain", "domain_given_token")
        )
        found["information"] = (
            f"The token tells {token:.2f} bits about its expert, the domain {domain:.2f}; once the "
            f"token is known, the domain adds {given:.3f}."
        )

    if worth := numbers.get("worth"):
        found["worth"] = _worth_finding(worth, layers)

    if other := numbers.get("against"):
        found["against"] = _against_finding(other, numbers["header"], mean)
    return found


def _worth_finding(worth: Mapping[str, Any], layers: Sequence[str]) -> str:
    delta = np.array(worth["without"], np.float64) - worth["loss"]  # None becomes NaN
    layer, expert = np.unravel_index(np.nanargmax(delta), delta.shape)

    # An interval around 0 says that the expert may be worth nothing.
    low, high = np.array(worth["low"], np.float64), np.array(worth["high"], np.float64)
    undecided, count = ((low <= 0) & (high >= 0)).sum(), np.isfinite(delta).sum()
    found = (
        f"Without expert {expert} of {layers[int(layer)]} the loss of {worth['loss']:.3f} nats is "
        f"{delta[layer, expert]:.4f} higher, the largest of {count:,} and so partly luck. "
        f"For {undecided:,} of {count:,} experts the interval holds 0; if no expert were worth "
        f"anything, 2.5% ({0.025 * count:,.1f}) would lie above 0 by chance."
    )
    documents = worth.get("documents", FEW_DOCUMENTS)
    if documents < FEW_DOCUMENTS:
        found += f" The intervals are percentiles of {documents} documents, and may be too narrow."
    return found


def _against_finding(
    other: Mapping[str, Any], header: Mapping[str, Any], mean: Callable[[Any], float]
) -> str:
    name = f"{other['run']}, step {other['step']}"
    if other["shared"]:
        found = (
            f"{mean(other['shared']):.0%} of the choices go to the matched expert of {name}; by "
            f"chance {mean(other['by_chance']):.0%}."
        )
    else:
        found = f"The experts of {name} are not matched."

    # Bits a byte compare models whose tokens differ.
    here = header["bits_per_byte"]
    there = other["bits_per_byte"]
    if here is not None and there is not None:
        found += f" Bits a byte: {here:.3f} here, {there:.3f} there."
    if other["note"]:
        found += f" Note: {other['note']}."
    return found
