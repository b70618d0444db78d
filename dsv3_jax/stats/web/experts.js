/* Charts of the experts of one layer: domains, worth, paths to the next layer, pairs. */

function drawDomains() {
  const host = place("domains"),
    heading = host.appendChild(el("h3"));
  /* p(expert | domain) / p(expert): each is E × load over mean. */
  const value = (d, e) => load(d + 1, state.layer, e) / load(0, state.layer, e);
  const {draw} = map(host, {
    rows: () => {
      heading.textContent = data.layers[state.layer];
      return data.domains.map(name => (name.length > 16 ? name.slice(0, 15) + "…" : name));
    },
    columns: E,
    columnTitle: "expert",
    label: "preference of each domain for each expert of the layer",
    value,
    scale: logScale(2),
    text: x => fixed(x),
    tip: (d, e) => `${data.domains[d]}, ${nameOf(state.layer, e)}\n${times(value(d, e))} its share of all text`,
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
    end = Math.max(
      quantile(
        all.map(([l, e]) => Math.abs(worth(l, e))),
        0.99,
      ),
      1e-9,
    );
  const digits = end < 0.01 ? 4 : 3,
    layers = range(L).filter(l => known(row(worth, l)).length); // heads are not taken out
  const unsure = (l, e) => worthLow && worthLow(l, e) <= 0 && worthHigh(l, e) >= 0;
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
          low: worthLow ? worthLow(l, e) : undefined,
          high: worthHigh ? worthHigh(l, e) : undefined,
          name: tellExpert(l, e),
          colour: layerColour(l),
          chosen: l === state.layer && e === state.expert,
          pick: () => choose({layer: l, expert: e}),
        })),
  });
  views.push(later(draw));
}

/* A matrix of the chosen layer, or its largest pairs where matrices would be too large. */
function drawPairs(section, part, options) {
  const host = place(section),
    heading = host.appendChild(el("h3")),
    layers = part.lift ? part.lift.shape[0] : part.top.length;
  const layerOf = () => Math.min(state.layer, layers - 1),
    last = l => Math.min(l + options.step, L - 1);
  const title = l => (options.step ? `from ${data.layers[l]} to ${data.layers[last(l)]}` : data.layers[l]);
  if (part.lift) {
    const at = reals(part.lift);
    const {draw} = map(host, {
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
      tip: (i, j) =>
        Number.isFinite(at(layerOf(), i, j)) ? options.tell(layerOf(), i, j, at(layerOf(), i, j)) : options.none,
      pick: i => choose({layer: layerOf(), expert: i}),
      chosen: () => null,
    });
    ramp(host, "× 0.25", "× 4", "over chance");
    views.push(before => {
      if (before.layer !== state.layer) draw();
    });
    return;
  }
  const box = host.appendChild(
    el("div", {class: "scroll tall", tabindex: 0, role: "region", "aria-label": options.label}),
  );
  const draw = () => {
    const l = layerOf();
    heading.textContent = title(l) + ": the pairs furthest above chance";
    box.replaceChildren(
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            options.heads.map(name => el("th", {scope: "col"}, name)),
          ),
        ),
        el(
          "tbody",
          {},
          part.top[l].map(([i, j, lift]) =>
            el(
              "tr",
              {},
              el("td", {}, expertButton(l, i)),
              el("td", {}, expertButton(last(l), j)),
              el("td", {}, times(lift)),
            ),
          ),
        ),
      ),
    );
  };
  views.push(before => {
    if (before.layer !== state.layer) draw();
  });
  draw();
}

function drawTransitions() {
  drawPairs("transitions", data.transitions, {
    step: 1,
    none: "no token of these experts",
    label: "paths from experts of a layer to experts of the next",
    columnTitle: "expert of the next layer",
    heads: ["from", "to", "over chance"],
    tell: (l, i, j, x) =>
      `expert ${i} of ${data.layers[l]} →\nexpert ${j} of ${data.layers[l + 1]}\n${times(x)} chance`,
  });
}
function drawTogether() {
  drawPairs("together", data.together, {
    step: 0,
    none: "the same expert",
    label: "experts chosen together",
    columnTitle: "expert",
    heads: ["expert", "and", "over chance"],
    tell: (l, i, j, x) => `${data.layers[l]}: experts ${i} and ${j}\n${times(x)} chance`,
  });
}
