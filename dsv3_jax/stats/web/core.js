"use strict";
/* Numbers, state, colours and small tools. All text goes into the page as text, never as markup. */

const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent); // stats.json, and the colours
const L = data.layers.length,
  E = data.experts,
  K = data.experts_per_token;
const domains = data.domains.length > 1 ? data.domains : [];

/* A function of indices: at(layer, expert) → number, NaN where it is missing; null of a table that is missing. */
const reals = table => table && ((...indices) => indices.reduce((part, i) => part?.[i], table) ?? NaN);
const range = n => Array.from({length: n}, (_, i) => i);
const known = values => values.filter(Number.isFinite);
const most = values => values.reduce((a, b) => (b > a ? b : a), -Infinity);
const least = values => values.reduce((a, b) => (b < a ? b : a), Infinity);
const mean = values => known(values).reduce((a, b) => a + b, 0) / known(values).length;
function quantile(values, q) {
  const sorted = known(values).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : NaN;
}

const overMean = rows =>
  rows.map(row => {
    const even = mean(row);
    return row.map(x => (even > 0 ? x / even : NaN));
  });
const loads = [data.load, ...domains.map(name => data.load_by_domain[name])].map(overMean);
const load = reals(loads), // (0 for all text, or 1 + domain; layer; expert) over the layer's mean
  maxVio = reals([data.max_vio, ...domains.map(name => data.max_vio_by_domain[name])]);
const loadEnd = Math.max(2, quantile(loads.flat(2), 0.99));
const bias = data.bias && reals(data.bias.value);
const without = data.worth && reals(data.worth.without),
  worth = data.worth && ((l, e) => without(l, e) - data.worth.loss);
const worthLow = data.worth && reals(data.worth.low),
  worthHigh = data.worth && reals(data.worth.high);
/* p(expert | domain) / p(expert). */
const preference = (d, l, e) => load(d + 1, l, e) / load(0, l, e);

/* Numbers as text. */
const fixed = (x, digits = 2) => {
  if (!Number.isFinite(x)) return "–";
  const text = x.toFixed(digits);
  return text.replace("-", Number(text) ? "−" : ""); // no minus before 0.00
};
const signed = (x, digits = 3) => (Number.isFinite(x) ? (x > 0 ? "+" : "") + fixed(x, digits) : "–");
const times = x => (Number.isFinite(x) ? "× " + fixed(x, x < 10 ? 2 : 1) : "–");
const percent = x => (Number.isFinite(x) ? fixed(100 * x, 1) + " %" : "–");
const whole = x => Math.round(x).toLocaleString("en");
const nameOf = (l, e) => `${data.layers[l]}, expert ${e}`;

const match = data.against && reals(data.against.match);
const otherRun = data.against ? `${data.against.run}, step ${data.against.step}` : "";

/* Elements: el("td", {class: "text", onclick: f}, "words", child, …). */
function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value !== false && value !== null && value !== undefined)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined && child !== false));
  return node;
}
const el = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
const drawn = (tag, properties, ...children) =>
  fill(document.createElementNS("http" + ":/" + "/www.w3.org/2000/svg", tag), properties, children);
const button = (text, onclick, properties) => el("button", {type: "button", onclick, ...properties}, text);
const table = (heads, rows, properties) =>
  el(
    "table",
    properties,
    heads && el("thead", {}, el("tr", {}, heads.map(name => el("th", {scope: "col"}, name)))),
    el("tbody", {}, rows.map(cells => el("tr", {}, cells.map(cell => (cell.tagName === "TD" ? cell : el("td", {}, cell)))))),
  );
const scrolled = (label, child) =>
  el("div", {class: "scroll tall", tabindex: 0, role: "region", "aria-label": label}, child);
const expertButton = (l, e, text) =>
  button(text || `expert ${e}`, () => choose({layer: l, expert: e}), {class: "plain"});

/* State: the chosen layer, expert (−1: none), text and domain (0: all). Each view hears of each change. */
const state = {layer: 0, expert: -1, text: 0, domain: 0};
const views = [];
function choose(change) {
  const before = {...state};
  Object.assign(state, change);
  for (const view of views) view(before);
}

/* Draw once before the next frame, however often the state changes until then: a slider is dragged fast. */
function later(draw) {
  let waits = false;
  return () => {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => {
      waits = false;
      draw();
    });
  };
}

/* Theme: as the system has it, until the button says otherwise. */
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (systemDark.matches ? "dark" : "light")) === "dark";
const colourOf = name =>
  getComputedStyle(document.documentElement)
    .getPropertyValue("--" + name)
    .trim();
const redraws = [];
const redraw = () => redraws.forEach(draw => draw());

/* −1 … 1 → a colour: below even, even, above even. Lightness and chroma change evenly in OKLab (report/colours.py). */
function mixed(x) {
  const [[middle], below, above] = data.colours[isDark() ? "dark" : "light"],
    [lightness, chroma, hue] = x < 0 ? below : above,
    part = Math.min(Math.abs(x), 1);
  return [middle + part * (lightness - middle), part * chroma, hue];
}
const diverging = x =>
  Number.isFinite(x) ? `oklch(${mixed(x).map(part => part.toFixed(4)).join(" ")})` : colourOf("none");
/* Dark ink on a pale cell, or the reverse. */
const inkOn = x => (!Number.isFinite(x) ? colourOf("text") : mixed(x)[0] > 0.62 ? "#1c1e21" : "#ffffff");
/* Hues in equal steps; neighbours differ in lightness too. */
const expertColour = e =>
  isDark()
    ? `oklch(${e % 2 ? 0.46 : 0.36} 0.08 ${(360 * e) / E})`
    : `oklch(${e % 2 ? 0.83 : 0.91} 0.075 ${(360 * e) / E})`;
/* Ratios on a logarithmic scale: half is as blue as twice is red; `end` is the ratio of full colour. */
const logScale = end => x => (Number.isNaN(x) ? NaN : Math.log2(Math.max(x, 1e-6)) / Math.log2(end));
const loadScale = x => (x <= 1 ? x - 1 : (x - 1) / (loadEnd - 1));
/* Layers from the first to the last. */
const layerColour = l => {
  const t = L > 1 ? l / (L - 1) : 0;
  return isDark()
    ? `hsl(${205 - 165 * t} ${60 + 10 * t}% ${46 + 26 * t}%)`
    : `hsl(${222 - 190 * t} ${60 + 25 * t}% ${24 + 22 * t}%)`;
};
const isHead = l => data.layers[l].startsWith("MTP");

/* The tip follows the pointer or the keyboard; a screen reader hears it. */
const tip = byId("tip");
function showTip(x, y, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect(),
    wide = document.documentElement.clientWidth;
  tip.style.left = Math.max(4, Math.min(x + 14, wide - box.width - 6)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18) + "px";
}
const hideTip = () => {
  tip.hidden = true;
};

/* A place for a chart in a section: heading, the chart, and a function that draws it again. */
function place(section, heading, properties) {
  const host = el("div", {class: "chart", ...properties}, heading ? el("h3", {}, heading) : null);
  byId(section + "-charts").append(host);
  return host;
}
function legend(entries) {
  return el(
    "div",
    {class: "legend"},
    entries.map(([name, colour, style]) => el("span", {}, mark(colour, style), name)),
  );
}
function mark(colour, style = {}) {
  const svg = drawn("svg", {viewBox: "0 0 26 14", "aria-hidden": "true"});
  if (!style.points)
    svg.append(
      drawn("line", {x1: 0, x2: 26, y1: 7, y2: 7, stroke: colour, "stroke-width": 2, "stroke-dasharray": style.dash}),
    );
  if (style.marker) svg.append(marker(style.marker, 13, 7, colour));
  return svg;
}
/* Shapes tell apart what colour alone may not. */
function marker(shape, x, y, colour, size = 4) {
  if (shape === "square")
    return drawn("rect", {x: x - size, y: y - size, width: 2 * size, height: 2 * size, fill: colour});
  if (shape === "diamond")
    return drawn("path", {
      d: `M${x} ${y - size - 1}L${x + size + 1} ${y}L${x} ${y + size + 1}L${x - size - 1} ${y}Z`,
      fill: colour,
    });
  if (shape === "ring")
    return drawn("circle", {cx: x, cy: y, r: size, fill: "var(--back)", stroke: colour, "stroke-width": 2});
  return drawn("circle", {cx: x, cy: y, r: size, fill: colour});
}
