/* Charts of the experts of one layer: domains, worth, paths to the next layer, pairs. */

function drawDomains() {
  const host = place("domains"),
    heading = host.appendChild(el("h3"));
  const value = (d, e) => preference(d, state.layer, e);
  const {draw} = map(host, {
    rows: () => {
      heading.textContent = data.layers[state.layer];
      return domains.map(name => (name.length > 16 ? name.slice(0, 15) + "…" : name));
    },
    columns: E,
    columnTitle: "expert",
    label: "preference of each domain for each expert of the layer",
    value,
    scale: logScale(2),
    text: x => fixed(x),
    tip: (d, e) => `${domains[d]}, ${nameOf(state.layer, e)}\n${times(value(d, e))} its share of all text`,
    pick: (_, e) => choose({expert: e}),
    chosen: () => null,
  });
  ramp(host, "× 0.5", "× 2", "share of the domain / share of all");
  views.push(before => {
    if (before.layer !== state.layer) draw();
  });
}

function drawWorth() {
  const all = range(L).flatMap(l => range(E).map(e => [l, e])),
    end = scaleEnd(all.map(([l, e]) => worth(l, e)));
  const digits = end < 0.01 ? 4 : 3,
    layers = range(L).filter(l => Number.isFinite(worth(l, 0))); // heads are not taken out
  const unsure = (l, e) => worthLow(l, e) <= 0 && worthHigh(l, e) >= 0;
  const host = place("worth", "Loss without the expert", {class: "chart wide"});
  expertMap(host, {
    label: "loss without each expert",
    value: worth,
    scale: x => x / end,
    text: x => signed(x, digits),
    tip: tellExpert,
    faint: unsure,
  });
  ramp(
    host,
    "−" + fixed(end, digits),
    "+" + fixed(end, digits),
    "nats a token: without a red expert the loss is higher",
  );
  const plot = place("worth", "Worth against load", {class: "chart wide"});
  if (L <= 9) plot.append(legend(layers.map(l => [data.layers[l], layerColour(l), {points: true, marker: "circle"}])));
  const draw = scatter(plot, {
    title: "worth against load",
    unit: "nats a token",
    xUnit: "load / mean load",
    points: () =>
      all
        .filter(([l, e]) => Number.isFinite(worth(l, e)) && Number.isFinite(load(0, l, e)))
        .map(([l, e]) => ({
          x: load(0, l, e),
          y: worth(l, e),
          low: worthLow(l, e),
          high: worthHigh(l, e),
          name: tellExpert(l, e),
          colour: layerColour(l),
          chosen: l === state.layer && e === state.expert,
          pick: () => choose({layer: l, expert: e}),
        })),
  });
  views.push(later(draw));
}

/* The lifts of all pairs of the chosen layer, or the largest ones of a large model. */
function drawPairs(section, lifts, top, options) {
  const host = place(section),
    heading = host.appendChild(el("h3")),
    layerOf = () => Math.min(state.layer, (lifts || top).length - 1);
  const title = l => (options.step ? `from ${data.layers[l]} to ${data.layers[l + 1]}` : data.layers[l]);
  let draw;
  if (lifts) {
    const at = reals(lifts);
    ({draw} = map(host, {
      rows: () => {
        heading.textContent = title(layerOf());
        return range(E).map(String);
      },
      columns: E,
      columnTitle: options.columnTitle,
      square: true,
      label: options.label,
      value: (i, j) => at(layerOf(), i, j),
      scale: logScale(4),
      tip: (i, j) => {
        const l = layerOf(),
          lift = at(l, i, j);
        return Number.isFinite(lift) ? `${options.tell(l, i, j)}\n${times(lift)} chance` : options.none;
      },
      pick: i => choose({layer: layerOf(), expert: i}),
      chosen: () => null,
    }));
    ramp(host, "× 0.25", "× 4", "over chance");
  } else {
    const box = host.appendChild(scrolled(options.label, ""));
    draw = () => {
      const l = layerOf();
      heading.textContent = title(l) + ": the pairs furthest above chance";
      const rows = top[l].map(([i, j, lift]) => [expertButton(l, i), expertButton(l + options.step, j), times(lift)]);
      box.replaceChildren(table(options.heads, rows));
    };
    draw();
  }
  views.push(before => {
    if (before.layer !== state.layer) draw();
  });
}

function drawTransitions() {
  drawPairs("transitions", data.transitions.lift, data.transitions.top, {
    step: 1,
    none: "no token of these experts",
    label: "paths from experts of a layer to experts of the next",
    columnTitle: "expert of the next layer",
    heads: ["from", "to", "over chance"],
    tell: (l, i, j) => `expert ${i} of ${data.layers[l]} →\nexpert ${j} of ${data.layers[l + 1]}`,
  });
}
function drawTogether() {
  /* The pairs of all partners, each once. */
  const top = data.partners.map(layer => {
    const pairs = layer.flatMap((rows, i) => rows.map(([j, lift]) => [Math.min(i, j), Math.max(i, j), lift]));
    const each = new Map(pairs.map(pair => [pair[0] * E + pair[1], pair]));
    return [...each.values()].sort((a, b) => b[2] - a[2]).slice(0, 64);
  });
  drawPairs("partners", data.coactivation_lift, top, {
    step: 0,
    none: "the same expert",
    label: "experts chosen together",
    columnTitle: "expert",
    heads: ["expert", "and", "over chance"],
    tell: (l, i, j) => `${data.layers[l]}: experts ${i} and ${j}`,
  });
}
