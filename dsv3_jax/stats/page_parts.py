"""The page's style, its script, and its load maps: what `page` puts together, and nothing of it from elsewhere."""

from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float
from matplotlib.colors import Normalize, to_hex

from dsv3_jax.report.colours import DIVERGING

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1c1e21; --dim: #5f6670; --line: #d9dce1; --soft: #f4f5f7;
  --mark: #ffe08a; --mark-text: #1c1e21; --link: #2257a8; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #e6e8eb; --dim: #a0a7b2; --line: #3a3f47;
  --soft: #20242a; --mark: #806000; --mark-text: #ffffff; --link: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 1120px; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { max-width: 46rem; margin: .4rem 0; }
.dim, figcaption, .facts { color: var(--dim); }
figure { margin: 1rem 0; }
figcaption { font-size: .9rem; max-width: 46rem; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: 6px; }
nav a { margin-right: 1rem; color: var(--link); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
thead th { vertical-align: bottom; white-space: normal; max-width: 8.5rem; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; }
svg { display: block; min-width: 560px; width: 100%; height: auto; }
svg text { fill: var(--text); font: 11px system-ui, sans-serif; }
svg .cell { stroke: var(--back); stroke-width: 1; cursor: pointer; }
svg .cell:hover { stroke: var(--text); stroke-width: 2; }
svg .value { pointer-events: none; font-size: 10px; }
button, select { font: inherit; padding: .2rem .7rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--soft); color: var(--text); }
button[aria-pressed="true"] { border-color: var(--text); font-weight: 600; }
code, .text { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .88rem; }
.columns { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; }
.columns > div { min-width: 0; }
.contexts { flex: 1 1 30rem; }
.contexts td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
.contexts td:first-child { white-space: nowrap; vertical-align: top; }
mark { background: var(--mark); color: var(--mark-text); border-radius: 3px; padding: 0 1px; }
"""

# Fills the section of one expert from the page's own data, and switches the load map's domain.
SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const layerOf = document.getElementById("layer"), expertOf = document.getElementById("expert");
const times = x => x === null ? "–" : "×" + x.toFixed(2);
function row(table, cells) {
  const tr = table.insertRow();
  for (const cell of cells) {
    const td = tr.insertCell();
    if (cell instanceof Node) td.append(cell); else td.textContent = cell;
  }
}
function text(said) {
  const span = document.createElement("span");
  span.className = "text";
  span.textContent = said;
  return span;
}
function fill(id, rows, none) {
  const table = document.getElementById(id);
  table.replaceChildren();
  for (const cells of rows) row(table, cells);
  if (!rows.length) row(table, [none]);
}
function show() {
  const l = +layerOf.value, e = +expertOf.value, mine = data.experts[l][e];
  document.getElementById("said").textContent =
    `${data.layers[l]}, expert ${e}: ${times(mine.load)} the mean load`;
  fill("domains-of", mine.domains.map((x, i) => [data.domains[i], times(x)]), "no domain");
  fill("partners", mine.partners.map(([other, x]) => [`expert ${other}`, times(x)]), "none: one expert a token");
  fill("tokens-of", mine.favourites.map(f => [text(f.text), f.times, times(f.lift)]), "no token is frequent enough");
  fill("contexts-of", mine.contexts.map(c => {
    const line = text(c.before), mark = document.createElement("mark");
    mark.textContent = c.token;
    line.append(mark, c.after);
    return [c.gate.toFixed(2), line];
  }), "it got no token");
}
layerOf.addEventListener("change", show);
expertOf.addEventListener("change", show);
for (const cell of document.querySelectorAll("svg .cell")) cell.addEventListener("click", () => {
  layerOf.value = cell.dataset.l;
  expertOf.value = cell.dataset.e;
  show();
  document.getElementById("experts").scrollIntoView({behavior: "smooth"});
});
for (const button of document.querySelectorAll("button[data-map]")) button.addEventListener("click", () => {
  for (const other of document.querySelectorAll("button[data-map]"))
    other.setAttribute("aria-pressed", other === button);
  for (const map of document.querySelectorAll("[data-domain]"))
    map.hidden = map.dataset.domain !== button.dataset.map;
});
show();
"""

LEFT, TOP, RIGHT, HEIGHT = 64, 34, 64, 26  # of a load map: margins, and a row's height


def load_map(ratio: Float[np.ndarray, "L E"], layers: Sequence[str], norm: Normalize, label: str) -> str:
    """Load over mean load as an SVG: layers × experts, the value in each cell where there is room, MaxVio beside.

    Args: norm: of the colours; label: what the picture is, for those who cannot see it.
    """
    num_experts = ratio.shape[1]
    cell = min(max(936 / num_experts, 5.0), 58.0)
    width, height = LEFT + num_experts * cell + RIGHT, TOP + len(layers) * HEIGHT + 4
    each = -(-num_experts // 32)
    parts = [
        f'<svg viewBox="0 0 {width:.0f} {height}" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="{escape(label)}">',
        f'<text x="{LEFT + num_experts * cell / 2:.1f}" y="11" text-anchor="middle">expert</text>',
        f'<text x="{width - RIGHT + 6:.1f}" y="{TOP - 7}">MaxVio</text>',
    ]
    for e in range(0, num_experts, each):
        parts.append(f'<text x="{LEFT + (e + 0.5) * cell:.1f}" y="{TOP - 7}" text-anchor="middle">{e}</text>')
    for i, (name, row) in enumerate(zip(layers, ratio, strict=True)):
        y = TOP + i * HEIGHT
        parts.append(f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        for e, value in enumerate(row):
            parts.append(_cell(LEFT + e * cell, y, cell, float(value), norm, i, e, name))
        said = "no load" if np.isnan(row).any() else f"{row.max() - 1:.2f}"
        parts.append(f'<text x="{width - RIGHT + 6:.1f}" y="{y + 17}">{said}</text>')
    return "\n".join([*parts, "</svg>"])


def _cell(x: float, y: int, width: float, value: float, norm: Normalize, layer: int, expert: int, name: str) -> str:
    colour = "#888888" if np.isnan(value) else to_hex(DIVERGING(norm(value)))
    said = "no load" if np.isnan(value) else f"{value:.2f} × mean load"
    rect = (
        f'<rect class="cell" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{HEIGHT}" fill="{colour}" '
        f'data-l="{layer}" data-e="{expert}"><title>{escape(name)}, expert {expert}: {said}</title></rect>'
    )
    if width < 26 or np.isnan(value):
        return rect
    ink = "#1c1e21" if abs(norm(value) - 0.5) < 0.28 else "#ffffff"
    return rect + (
        f'<text class="value" x="{x + width / 2:.1f}" y="{y + 17}" text-anchor="middle" style="fill:{ink}">'
        f"{value:.2f}</text>"
    )


def colour_bar(norm: Normalize) -> str:
    """The load map's colours from 0 to the last, even in the middle."""
    stops = "".join(f'<stop offset="{i / 16:.4f}" stop-color="{to_hex(DIVERGING(i / 16))}"/>' for i in range(17))
    return (
        '<svg viewBox="0 0 300 34" style="max-width:300px;min-width:0" role="img" aria-label="colours of load">'
        f'<defs><linearGradient id="bar">{stops}</linearGradient></defs>'
        '<rect x="10" y="2" width="240" height="12" fill="url(#bar)"/>'
        '<text x="10" y="29" text-anchor="middle">0</text><text x="130" y="29" text-anchor="middle">1 (even)</text>'
        f'<text x="250" y="29" text-anchor="middle">{norm.vmax:.3g}</text></svg>'
    )
