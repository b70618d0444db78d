"use strict";
/* Numbers, state, colours and small tools. All text goes into the page as text, never as markup. */

const data = JSON.parse(document.getElementById("data").textContent);
const L = data.layers.length,
  E = data.experts,
  K = data.experts_per_token;

/* packing.py: codes of 8, 16 or 32 bits in base64; the last code of real numbers is "missing". */
function codes(packed) {
  const bytes = Uint8Array.from(atob(packed.codes), c => c.charCodeAt(0));
  return packed.bits === 8 ? bytes : packed.bits === 16 ? new Uint16Array(bytes.buffer) : new Uint32Array(bytes.buffer);
}
function indexer(shape) {
  const strides = shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1));
  return indices => indices.reduce((sum, index, axis) => sum + index * strides[axis], 0);
}
/* A function of indices: at(layer, expert) → number, NaN where it is missing. */
function reals(packed) {
  if (!packed) return null;
  const values = codes(packed),
    last = 2 ** packed.bits - 1,
    index = indexer(packed.shape);
  const size = (packed.high - packed.low) / (last - 1);
  const at = (...i) => {
    const code = values[index(i)];
    return code === last ? NaN : packed.low + code * size;
  };
  at.shape = packed.shape;
  return at;
}
function ids(packed) {
  if (!packed) return null;
  const values = codes(packed),
    index = indexer(packed.shape);
  const at = (...i) => values[index(i)];
  at.shape = packed.shape;
  return at;
}
const range = n => Array.from({length: n}, (_, i) => i);
const row = (at, ...before) => range(at.shape[before.length]).map(i => at(...before, i));
const known = values => values.filter(Number.isFinite);
const most = values => values.reduce((a, b) => (b > a ? b : a), -Infinity);
const least = values => values.reduce((a, b) => (b < a ? b : a), Infinity);
const mean = values => known(values).reduce((a, b) => a + b, 0) / known(values).length;
function quantile(values, q) {
  const sorted = known(values).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : NaN;
}

const load = reals(data.load),
  maxVio = reals(data.max_vio); // [1 + domains][L][E] over the layer's mean; [..][L]
const bias = data.bias && reals(data.bias.value),
  worth = data.worth && reals(data.worth.delta);
const worthLow = data.worth && reals(data.worth.low),
  worthHigh = data.worth && reals(data.worth.high);

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

const otherRun = data.against ? `${data.against.run}, step ${data.against.step}` : "";

/* Elements: el("td", {class: "text", onclick: f}, "words", child, …). */
function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value !== false && value !== null && value !== undefined)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined));
  return node;
}
const el = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
const drawn = (tag, properties, ...children) =>
  fill(document.createElementNS("http" + ":/" + "/www.w3.org/2000/svg", tag), properties, children);
const byId = id => document.getElementById(id);
const button = (text, onclick, properties) => el("button", {type: "button", onclick, ...properties}, text);
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

const channels = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
/* 257 colours of each theme, between the stops that the page has. */
const tables = Object.fromEntries(
  Object.entries(data.colours.diverging).map(([theme, stops]) => [
    theme,
    range(257).map(code => {
      const place = (code / 256) * (stops.length - 1),
        i = Math.min(Math.floor(place), stops.length - 2);
      const [from, to] = [channels(stops[i]), channels(stops[i + 1])];
      return `rgb(${from.map((c, j) => Math.round(c + (to[j] - c) * (place - i))).join(" ")})`;
    }),
  ]),
);
/* −1 … 1 → a colour: below even, even, above even. */
function diverging(x) {
  if (!Number.isFinite(x)) return colourOf("none");
  return tables[isDark() ? "dark" : "light"][Math.round((Math.min(Math.max(x, -1), 1) + 1) * 128)];
}
/* Dark ink on a pale cell, or the reverse. */
function inkOn(colour) {
  const [r, g, b] = colour.startsWith("#") ? channels(colour) : colour.match(/\d+/g).map(Number);
  return 0.3 * r + 0.59 * g + 0.11 * b > 140 ? "#1c1e21" : "#ffffff";
}
const expertColour = e => data.colours.experts[isDark() ? "dark" : "light"][e];
/* Ratios on a logarithmic scale: half is as blue as twice is red; `end` is the ratio of full colour. */
const logScale = end => x => (Number.isNaN(x) ? NaN : Math.log2(Math.max(x, 1e-6)) / Math.log2(end));
const loadScale = x => (x <= 1 ? x - 1 : (x - 1) / (data.load_end - 1));
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
