/* Charts by layer or step: load, bias, information, neighbours, training, heads, entropies, another run. */

const has = section => byId(section + "-charts") !== null;
const tellLoad = (l, e, d = 0) => (Number.isFinite(load(d, l, e)) ? `${times(load(d, l, e))} mean load` : "no load");
const tellExpert = (l, e) =>
  [
    nameOf(l, e),
    tellLoad(l, e),
    bias && `bias ${signed(bias(l, e), 4)}`,
    worth &&
      `without it: ${signed(worth(l, e), 4)} nats` +
        (worthLow ? ` [${fixed(worthLow(l, e), 4)}, ${fixed(worthHigh(l, e), 4)}]` : ""),
  ]
    .filter(Boolean)
    .join("\n");

function drawLoad() {
  const host = place("load", null, {class: "chart wide"});
  let show = () => {};
  if (data.domains.length) {
    const names = ["all text", ...data.domains];
    if (names.length <= 9) {
      const buttons = names.map((name, d) =>
        button(name, () => choose({domain: d}), {"aria-pressed": String(d === 0), "data-domain": d}),
      );
      host.append(el("div", {class: "row"}, buttons));
      show = () => buttons.forEach((b, d) => b.setAttribute("aria-pressed", String(d === state.domain)));
    } else
      host.append(
        el(
          "div",
          {class: "row"},
          el(
            "select",
            {"aria-label": "domain", onchange: event => choose({domain: +event.target.value})},
            names.map((name, d) => el("option", {value: d}, name)),
          ),
        ),
      );
    views.push(show);
  }
  expertMap(host, {
    label: "load of each expert by layer",
    byDomain: true,
    value: (l, e) => load(state.domain, l, e),
    scale: loadScale,
    text: x => fixed(x),
    side: l => (Number.isFinite(maxVio(state.domain, l)) ? fixed(maxVio(state.domain, l)) : "no load"),
    sideTitle: "MaxVio",
    tip: (l, e) =>
      state.domain
        ? [
            nameOf(l, e),
            data.domains[state.domain - 1] + ": " + tellLoad(l, e, state.domain),
            "all text: " + tellLoad(l, e),
          ].join("\n")
        : tellExpert(l, e),
    groups: data.groups ? E / data.groups.load.shape[1] : 0,
  });
  ramp(host, "0", "× " + fixed(data.load_end, 1), "load / mean load of the layer; the middle is even");
  if (data.groups && data.groups.load.shape[1] > 1) shares("by group", data.groups.load, "group");
  if (data.devices && data.devices.load) shares("by device", data.devices.load, "device");

  function shares(heading, packed, name) {
    const at = reals(packed),
      count = at.shape[1];
    const ratio = (l, g) => at(l, g) / mean(row(at, l));
    const host = place("load", "Load " + heading);
    map(host, {
      rows: () => data.layers,
      columns: count,
      columnTitle: name,
      label: "load " + heading,
      value: ratio,
      scale: loadScale,
      text: x => fixed(x),
      tip: (l, g) => `${data.layers[l]}, ${name} ${g}\n${times(ratio(l, g))} the mean of the layer's ${name}s`,
      side: l => fixed(most(range(count).map(g => ratio(l, g))) - 1),
      sideTitle: "MaxVio",
    });
  }
}

function drawBias() {
  const centre = range(L).map(l => mean(row(bias, l)));
  const end = Math.max(
    quantile(
      range(L).flatMap(l => row(bias, l).map(x => Math.abs(x - centre[l]))),
      0.99,
    ),
    1e-9,
  );
  const host = place("bias", null, {class: "chart wide"});
  expertMap(host, {
    label: "bias of each expert by layer",
    value: (l, e) => bias(l, e) - centre[l],
    scale: x => x / end,
    text: x => signed(x, 3),
    tip: (l, e) =>
      `${nameOf(l, e)}\nbias ${signed(bias(l, e), 4)}, ${signed(bias(l, e) - centre[l], 4)} from the layer's mean\n${tellLoad(l, e)}`,
  });
  ramp(host, "−" + fixed(end, 3), "+" + fixed(end, 3), "bias − mean of the layer: red experts are helped");
  const {changed_choices: changed, max_vio: withBias, max_vio_without: without} = data.bias;
  if (withBias && without)
    layerCurves("bias", "MaxVio with and without the bias", {title: "MaxVio by layer", y0: 0}, [
      {name: "without the bias", at: reals(without), colour: "var(--without)", marker: "square", dash: "5 3"},
      {name: "with the bias", at: reals(withBias), colour: "var(--this)", marker: "circle"},
    ]);
  if (changed)
    layerCurves(
      "bias",
      "Choices that the bias changes",
      {title: "share of changed choices by layer", y0: 0, share: true},
      [{name: "changed", at: reals(changed), colour: "var(--this)", marker: "circle"}],
    );
  if (data.bias.history) {
    const at = reals(data.bias.history.value),
      steps = data.bias.history.steps,
      host = place("bias", "", {class: "chart wide"});
    const heading = host.appendChild(el("h3"));
    const draw = curves(host, {
      x: steps,
      title: "bias of the chosen layer's experts over training",
      format: x => signed(x, 4),
      tall: 260,
      series: () => {
        heading.textContent = `Bias over training, each expert of ${data.layers[state.layer]}`;
        return range(E)
          .map(e => {
            const own = e === state.expert;
            return {
              name: `expert ${e}`,
              values: range(steps.length).map(s => at(s, state.layer, e)),
              colour: own ? "var(--text)" : "var(--this)",
              opacity: own ? 1 : E > 64 ? 0.25 : 0.6,
              width: own ? 3 : 1.2,
              pick: () => choose({expert: e}),
            };
          })
          .sort((a, b) => a.width - b.width);
      },
    });
    views.push(later(draw));
  }
}

/* Curves over layers, with a legend; each series has at(l), and low(l), high(l) for intervals. */
function layerCurves(section, heading, options, series, properties) {
  const host = place(section, heading, properties);
  if (series.length > 1) host.append(legend(series.map(s => [s.name, s.colour, {marker: s.marker, dash: s.dash}])));
  curves(host, {
    x: data.layers,
    names: true,
    ...options,
    series: () =>
      series.map((s, i) => ({
        ...s,
        values: range(L).map(l => s.at(l)),
        low: s.low && range(L).map(l => s.low(l)),
        high: s.high && range(L).map(l => s.high(l)),
        shift: L <= 16 && series.length > 1 ? (i - (series.length - 1) / 2) * 7 : 0,
      })),
  });
}

function drawInformation() {
  const part = data.information,
    interval = key => ({low: reals(part[key + "_low"]), high: reals(part[key + "_high"])});
  const token = {name: "token", at: reals(part.token), colour: "var(--token)", marker: "circle", ...interval("token")};
  const domain = part.domain
    ? {name: "domain", at: reals(part.domain), colour: "var(--domain)", marker: "square", ...interval("domain")}
    : part.bits && {name: "domain", at: reals(part.bits), colour: "var(--domain)", marker: "square"};
  const given = part.domain_given_token && {
    name: "domain, once the token is known",
    at: reals(part.domain_given_token),
    colour: "var(--given)",
    marker: "diamond",
    ...interval("domain_given_token"),
  };
  const shuffled = !part.token &&
    part.shuffled_95 && {
      name: "domains shuffled, 95 % are below",
      at: reals(part.shuffled_95),
      colour: "var(--chance)",
      marker: "ring",
      dash: "4 3",
    };
  const bits = x => fixed(x, 3);
  if (part.token)
    layerCurves(
      "information",
      "What token and domain tell",
      {title: "bits about the expert by layer", unit: "bits", y0: 0, format: bits},
      [token, domain, given].filter(Boolean),
    );
  layerCurves(
    "information",
    part.token ? "The domain, enlarged" : "What the domain tells",
    {title: "bits of the domain by layer", unit: "bits", y0: 0, format: bits},
    [domain, given, shuffled].filter(Boolean),
  );
}

function drawRepeats() {
  layerCurves(
    "repeats",
    "",
    {title: "share of repeated choices by layer", y0: 0, share: true},
    [
      {name: "shared with the token before", at: reals(data.repeats.share), colour: "var(--this)", marker: "circle"},
      {name: "by chance", at: reals(data.repeats.by_chance), colour: "var(--chance)", marker: "ring", dash: "4 3"},
    ],
    {class: "chart wide"},
  );
}

/* One curve a layer over steps. */
function stepCurves(section, title, steps, packed, options) {
  const at = reals(packed),
    host = place(section, "", {class: "chart wide"});
  if (at.shape[1] <= 9)
    host.append(
      legend(range(at.shape[1]).map(l => [data.layers[l], layerColour(l), {dash: isHead(l) ? "6 3" : undefined}])),
    );
  else
    host.append(
      el(
        "p",
        {class: "dim"},
        "One curve a layer, from dark (first) to light (last); dashed: MTP heads; thick: the chosen layer.",
      ),
    );
  const draw = curves(host, {
    x: steps,
    title,
    y0: 0,
    ...options,
    series: () =>
      range(at.shape[1]).map(l => ({
        name: data.layers[l],
        values: range(steps.length).map(s => at(s, l)),
        colour: layerColour(l),
        dash: isHead(l) ? "6 3" : undefined,
        width: l === state.layer ? 3 : 1.4,
        pick: () => choose({layer: l}),
      })),
  });
  views.push(later(draw));
}

function drawHeads() {
  const part = data.heads,
    rows = part.layers.map((name, i) => [
      name,
      percent(part.same_expert_number[i]),
      percent(part.by_chance[i]),
      part.load_correlation ? fixed(part.load_correlation[i]) : "–",
    ]);
  place("heads").append(
    el(
      "div",
      {class: "scroll"},
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            ["head", "same expert numbers as the trunk's last layer", "by chance", "correlation of loads"].map(name =>
              el("th", {scope: "col"}, name),
            ),
          ),
        ),
        el(
          "tbody",
          {},
          rows.map(cells =>
            el(
              "tr",
              {},
              cells.map((cell, i) => el(i ? "td" : "th", i ? {} : {scope: "row"}, cell)),
            ),
          ),
        ),
      ),
    ),
  );
}

function drawEntropies() {
  const names = {
    gate_entropy: ["gates of the chosen experts", "circle"],
    score_entropy: ["scores of all experts", "diamond", "6 3"],
    load_entropy: ["load", "ring", "2 3"],
  };
  layerCurves(
    "entropy",
    "",
    {title: "entropies by layer", y0: 0, y1: 1.04, format: x => fixed(x, 4)},
    Object.entries(names)
      .filter(([key]) => data.entropies[key])
      .map(([key, [name, marker, dash]]) => ({
        name,
        at: reals(data.entropies[key]),
        marker,
        dash,
        colour: "var(--this)",
      })),
    {class: "chart wide"},
  );
}

function drawAgainst() {
  const part = data.against,
    pair = {colour: "var(--this)", marker: "circle"};
  if (part.shared)
    layerCurves(
      "against",
      "Choices that go to the matched expert",
      {title: "shared choices by layer", y0: 0, share: true},
      [
        {name: "shared", at: reals(part.shared), ...pair},
        part.by_chance && {
          name: "by chance",
          at: reals(part.by_chance),
          colour: "var(--chance)",
          marker: "ring",
          dash: "4 3",
        },
      ].filter(Boolean),
    );
  if (part.max_vio)
    layerCurves("against", "MaxVio of both runs", {title: "MaxVio by layer", y0: 0}, [
      {name: "this run", at: l => maxVio(0, l), ...pair},
      {name: otherRun, at: reals(part.max_vio), colour: "var(--other)", marker: "diamond", dash: "6 3"},
    ]);
  if (!part.difference) return;
  const at = reals(part.difference),
    match = ids(part.match),
    host = place("against", "Load of each expert minus that of its match", {class: "chart wide"});
  const end = Math.max(
    quantile(
      range(L).flatMap(l => row(at, l).map(Math.abs)),
      0.99,
    ),
    1e-9,
  );
  expertMap(host, {
    label: "difference of load",
    value: at,
    scale: x => x / end,
    text: x => signed(x, 2),
    tip: (l, e) =>
      match(l, e) === E
        ? `${nameOf(l, e)}\nno match`
        : `${nameOf(l, e)}\nmatch: expert ${match(l, e)} of ${otherRun}\nload ${signed(at(l, e), 2)} × the mean`,
  });
  ramp(host, "−" + fixed(end), "+" + fixed(end), "difference of load / mean load");
}
