"""One HTML page of all statistics: opens in any browser, with nothing else beside it and nothing from elsewhere."""

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.report.run_plots import DPI, load_norm, load_over_mean
from dsv3_jax.stats.page_parts import SCRIPT, STYLE, colour_bar, load_map
from dsv3_jax.stats.plots import preference

PARTNERS = 6  # others that an expert is chosen with, in its section


def page(found: dict[str, Any], pictures: str | Path) -> str:
    """The page of what stands in stats.json (see `reporting.KEYS`).

    Args: pictures: the folder of reporting.PICTURES; the page holds those that are there.
    """
    folder = Path(pictures)
    title = f"Where tokens go: {found['run']}, step {found['step']}"
    sections = [_header(title, found), _load(found), _layers(found)]
    for name, heading, picture, said in SECTIONS:
        if (folder / picture).exists():
            sections.append(_section(name, heading, said, folder / picture))
    sections.append(_experts(found))
    links = "".join(f'<a href="#{name}">{word}</a>' for name, word in _contents(folder))
    body = "\n".join([sections[0], f"<nav>{links}</nav>", *sections[1:]])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{_data(found)}</script>\n<script>{SCRIPT}</script>\n'
        "</body>\n</html>\n"
    )


# Sections of a picture each: id, heading, file, what it says.
SECTIONS = (
    (
        "over-time",
        "Load over training",
        "load_over_time.png",
        "Load of each expert in single batches of training, over the mean of the layer, and how uneven they were.",
    ),
    (
        "domains",
        "Experts and domains",
        "domains.png",
        "An expert's share of a domain's assignments over its share of all assignments: red experts are preferred by "
        "the domain, blue ones avoided.",
    ),
    (
        "information",
        "How much an expert says of the domain",
        "information.png",
        "I(expert; domain) is how many bits one chosen expert tells of the text's domain. What shuffling the domains "
        "among the documents gives is chance: documents differ whatever their domain, so it is not zero.",
    ),
    (
        "coactivation",
        "Experts chosen together",
        "coactivation.png",
        "How often two experts are chosen for the same token, over what their loads alone would give. With groups of "
        "experts, a token's experts come from a few groups, and squares along the diagonal stand out.",
    ),
    (
        "entropy",
        "Entropy of gates",
        "entropy.png",
        "How evenly a token weighs its chosen experts (left), and how evenly the router scores all of them (right); "
        "1 is even, 0 is one expert alone. Means over tokens, in all and by domain.",
    ),
)


def _contents(folder: Path) -> list[tuple[str, str]]:
    shown = [(name, heading) for name, heading, picture, _ in SECTIONS if (folder / picture).exists()]
    return [("load", "Load"), ("layers", "Layers"), *shown, ("experts", "Single experts")]


def _header(title: str, found: dict[str, Any]) -> str:
    documents = ", ".join(f"{escape(name)} {count}" for name, count in found["documents"].items())
    facts = (
        f"{max(found['tokens']):,} tokens of {sum(found['documents'].values())} documents ({documents}); "
        f"{found['experts_per_token']} of {found['experts']} experts a token in {len(found['layers'])} layers"
    )
    return (
        f"<header><h1>{escape(title)}</h1>\n<p>Read: {escape(found['data'])}.</p>\n"
        f'<p class="facts">{facts}.</p></header>'
    )


def _section(name: str, heading: str, said: str, picture: Path) -> str:
    png = picture.read_bytes()
    width = int.from_bytes(png[16:20]) * 96 // DPI  # a browser's inch is 96 pixels
    source = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{escape(heading)}" width="{width}" src="data:image/png;base64,{source}">'
    return f'<section id="{name}"><h2>{heading}</h2>\n<p>{said}</p>\n<figure>{image}</figure></section>'


def _load(found: dict[str, Any]) -> str:
    loads = {"all": found["load"]}
    if len(found["domains"]) > 1:
        loads |= found["load_by_domain"]
    ratios = {name: load_over_mean(load, name) for name, load in loads.items()}
    norm, _ = load_norm(np.stack(list(ratios.values())))
    maps, buttons = [], []
    # By number, for a domain may have any name, "all" too.
    for i, (name, ratio) in enumerate(ratios.items()):
        hidden, pressed = (" hidden", "false") if i else ("", "true")
        picture = load_map(ratio, found["layers"], norm, f"load of each expert, {name}")
        maps.append(f'<div class="scroll" data-domain="{i}"{hidden}>{picture}</div>')
        buttons.append(f'<button data-map="{i}" aria-pressed="{pressed}">{escape(name)}</button>')
    chooser = f"<p>Domain: {' '.join(buttons)}</p>" if len(ratios) > 1 else ""
    return (
        '<section id="load"><h2>Load by layer and expert</h2>\n<p>Assignments of an expert over the mean of its layer; '
        "layers are counted from the first that has experts, MTP are multi-token heads. "
        f"A click on a cell goes to that expert.</p>\n{chooser}\n<figure>{''.join(maps)}{colour_bar(norm)}</figure>"
        "</section>"
    )


def _layers(found: dict[str, Any]) -> str:
    told = found["specialisation"]
    columns = {
        "layer": found["layers"],
        "tokens": [f"{n:,}" for n in found["tokens"]],
        "MaxVio": _fixed(found["max_vio"], 2),
        "entropy of load": _fixed(found["load_entropy"], 4),
        "Gini of load": _fixed(found["load_gini"], 3),
        "entropy of gates": _fixed(found["gate_entropy"], 3),
        "entropy of scores": _fixed(found["score_entropy"], 3),
    }
    if len(found["domains"]) > 1:
        columns |= {
            "I(expert; domain), bits": _fixed(told["bits"], 4),
            "shuffled: mean": _fixed(told["shuffled_mean"], 4),
            "shuffled: 95 %": _fixed(told["shuffled_95"], 4),
            "share of H(domain)": [f"{x:.1%}" for x in told["share"]],
            "p of chance": _fixed(told["p_value"], 3),
        }
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for cells in zip(*columns.values(), strict=True)
    )
    return (
        '<section id="layers"><h2>Layer by layer</h2>\n<p>MaxVio: (largest load − mean) / mean. Entropies are over the '
        f"largest possible: 1 is even. Shuffled: the domains of documents, {told['draws']} times.</p>\n"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div></section>'
    )


def _experts(found: dict[str, Any]) -> str:
    def options(names: Sequence[str]) -> str:
        return "".join(f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(names))

    experts = [f"expert {e}" for e in range(found["experts"])]
    return (
        '<section id="experts"><h2>Single experts</h2>\n<p>Tokens that it likes best, of the frequent ones: how often '
        "it got them, and how much more often than another token. Places of its largest gates, the routed token "
        "marked; ↵ is a line end.</p>\n"
        f'<p><select id="layer" aria-label="layer">{options(found["layers"])}</select> '
        f'<select id="expert" aria-label="expert">{options(experts)}</select></p>\n'
        "<noscript><p>A browser with scripts shows one expert here; all of them stand in stats.json.</p></noscript>\n"
        '<h3 id="said"></h3>\n<div class="columns">'
        '<div><h3>Tokens: count, lift</h3><table id="tokens-of"></table></div>'
        '<div><h3>Domains</h3><table id="domains-of"></table><h3>Chosen with</h3><table id="partners"></table></div>'
        '<div class="contexts"><h3>Largest gates</h3><table id="contexts-of"></table></div>'
        "</div></section>"
    )


def _data(found: dict[str, Any]) -> str:
    """What the script needs, as JSON that cannot end the element it stands in."""
    ratio = load_over_mean(found["load"], "all")
    liked = preference(np.array([found["load_by_domain"][name] for name in found["domains"]]))
    experts = [
        [
            {
                "load": _round(ratio[layer, e]),
                "domains": [_round(x) for x in liked[:, layer, e]],
                "partners": _partners(found["coactivation_lift"][layer][e]),
                "favourites": [{k: f[k] for k in ("text", "times", "lift")} for f in found["favourites"][layer][e]],
                "contexts": found["contexts"][layer][e],
            }
            for e in range(found["experts"])
        ]
        for layer in range(len(found["layers"]))
    ]
    data = {"layers": found["layers"], "domains": found["domains"], "experts": experts}
    return json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")


def _partners(lifts: Sequence[float | None]) -> list[tuple[int, float]]:
    known = [(other, round(x, 2)) for other, x in enumerate(lifts) if x is not None]
    return sorted(known, key=lambda pair: -pair[1])[:PARTNERS]


def _fixed(values: Sequence[float | None], digits: int) -> list[str]:
    return ["–" if x is None else f"{x:.{digits}f}" for x in values]


def _round(x: float) -> float | None:
    return None if np.isnan(x) else round(float(x), 3)
