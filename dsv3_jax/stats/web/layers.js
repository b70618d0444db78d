/* Facts of the run, and charts by layer or step: load, bias, information, neighbours, training, entropies, another run. */

const trunkMean = values => {
  const trunk = known(values.filter((_, l) => !isHead(l)));
  return mean(trunk.length ? trunk : values);
};
/* The end of a scale that is symmetric around 0. */
const scaleEnd = values => Math.max(quantile(values.map(Math.abs), 0.99), 1e-9);

function drawHeader() {
  const run = data.header || {},
    documents = Object.entries(data.documents),
    short = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});
  byId("about").textContent =
    `${whole(most(data.tokens))} tokens of ${whole(documents.reduce((sum, [, n]) => sum + n, 0))} documents ` +
    `(${documents.map(([name, n]) => `${name} ${whole(n)}`).join(", ")}): ${data.data}. ` +
    `${K} of ${E} experts a token in ${L} layers.`;
  const facts = {
    "loss of this text": run.loss && `${fixed(run.loss, 3)} nats a token`,
    "bits a byte": run.bits_per_byte && fixed(run.bits_per_byte, 3),
    "MaxVio of this text": fixed(trunkMean(data.max_vio)),
    "MaxVio, training mix": run.max_vio_training_mix && fixed(run.max_vio_training_mix),
    parameters: run.parameters && `${short.format(run.parameters)}, ${short.format(run.active_parameters)} active`,
    trained: run.steps && `${whole(run.steps)} steps, ${short.format(run.tokens_seen)} tokens`,
    recipe: run.preset,
    router: run.router,
    balance: run.balance_rule,
    version: run.version && run.version + (run.commit ? `, ${run.commit.slice(0, 10)}` : ""),
  };
  byId("facts").append(
    ...Object.entries(facts)
      .filter(([, value]) => value)
      .map(([name, value]) =>
        el("div", {class: value.length > 30 ? "long" : null}, el("dt", {}, name), el("dd", {}, value)),
      ),
  );
}

function drawLayers() {
  const special = data.specialisation,
    four = values => values.map(x => fixed(x ?? NaN, 4));
  const columns = {
    layer: data.layers,
    tokens: data.tokens.map(whole),
    MaxVio: data.max_vio.map(x => fixed(x ?? NaN)),
    "entropy of load": four(data.load_entropy),
    "Gini of load": four(data.load_gini),
    "entropy of gates": four(data.gate_entropy),
    "entropy of scores": four(data.score_entropy),
    ...(domains.length && {
      "I(expert; domain) with chance, bits": four(special.bits),
      "shuffled: mean": four(special.shuffled_mean),
      "shuffled: 95 %": four(special.shuffled_95),
      "share of H(domain)": special.share.map(percent),
      "p value": four(special.p_value),
    }),
  };
  const rows = range(L).map(l => Object.values(columns).map(column => column[l]));
  place("layers").append(scrolled("table of layers", table(Object.keys(columns), rows)));
}

const has = section => byId(section + "-charts") !== null;
const tellLoad = (l, e, d = 0) => (Number.isFinite(load(d, l, e)) ? `${times(load(d, l, e))} mean load` : "no load");
const tellWorth = (l, e) =>
  `${signed(worth(l, e), 4)} nats [${fixed(worthLow(l, e), 4)}, ${fixed(worthHigh(l, e), 4)}]`;
const tellExpert = (l, e) =>
  [
    nameOf(l, e),
    tellLoad(l, e),
    bias && `bias ${signed(bias(l, e), 4)}`,
    worth && `without it: ${tellWorth(l, e)}`,
  ]
    .filter(Boolean)
    .join("\n");

function drawLoad() {
  const host = place("load", null, {class: "chart wide"});
  if (domains.length) {
    const buttons = ["all text", ...domains].map((name, d) =>
      button(name, () => choose({domain: d}), {"aria-pressed": String(d === 0), "data-domain": d}),
    );
    host.append(el("div", {class: "row"}, buttons));
    views.push(() => buttons.forEach((b, d) => b.setAttribute("aria-pressed", String(d === state.domain))));
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
            domains[state.domain - 1] + ": " + tellLoad(l, e, state.domain),
            "all text: " + tellLoad(l, e),
          ].join("\n")
        : tellExpert(l, e),
    groups: data.groups ? E / data.groups.load[0].length : 0,
  });
  ramp(host, "0", "× " + fixed(loadEnd, 1), "load / mean load of the layer; the middle is even");
  if (data.groups) shares("by group", data.groups.load, "group");
  if (data.devices) shares("by device", data.devices.load, "device");

  function shares(heading, loads, name) {
    const ratio = reals(overMean(loads)),
      count = loads[0].length;
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
  const centre = data.bias.value.map(mean),
    end = scaleEnd(range(L).flatMap(l => data.bias.value[l].map(x => x - centre[l])));
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
  layerCurves("bias", "MaxVio with and without the bias", {title: "MaxVio by layer"}, [
    {
      name: "without the bias",
      at: reals(data.bias.max_vio_without),
      colour: "var(--without)",
      marker: "square",
      dash: "5 3",
    },
    {name: "with the bias", at: reals(data.bias.max_vio), colour: "var(--this)", marker: "circle"},
  ]);
  layerCurves("bias", "Choices that the bias changes", {title: "share of changed choices by layer", share: true}, [
    {name: "changed", at: reals(data.bias.changed_choices), colour: "var(--this)", marker: "circle"},
  ]);
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
    of = key => ({at: reals(part[key]), low: reals(part[key + "_low"]), high: reals(part[key + "_high"])});
  const token = {name: "token", colour: "var(--token)", marker: "circle", ...of("token")},
    domain = {name: "domain", colour: "var(--domain)", marker: "square", ...of("domain")},
    given = {
      name: "domain, once the token is known",
      colour: "var(--given)",
      marker: "diamond",
      ...of("domain_given_token"),
    };
  const options = {title: "bits about the expert by layer", unit: "bits", format: x => fixed(x, 3)};
  layerCurves("information", "What token and domain tell", options, [token, domain, given]);
  layerCurves("information", "The domain, enlarged", {...options, title: "bits of the domain by layer"}, [
    domain,
    given,
  ]);
}

function drawRepeats() {
  layerCurves(
    "repeats",
    "",
    {title: "share of repeated choices by layer", share: true},
    [
      {name: "shared with the token before", at: reals(data.repeats.share), colour: "var(--this)", marker: "circle"},
      {name: "by chance", at: reals(data.repeats.by_chance), colour: "var(--chance)", marker: "ring", dash: "4 3"},
    ],
    {class: "chart wide"},
  );
}

/* One curve a layer over steps. */
function stepCurves(section, title, steps, values, options) {
  const at = reals(values),
    host = place(section, "", {class: "chart wide"});
  if (L <= 9)
    host.append(legend(range(L).map(l => [data.layers[l], layerColour(l), {dash: isHead(l) ? "6 3" : undefined}])));
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
    ...options,
    series: () =>
      range(L).map(l => ({
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
    heads = ["head", "same expert numbers as the trunk's last layer", "by chance", "correlation of loads"];
  const rows = part.layers.map((name, i) => [
    name,
    percent(part.same_expert_number[i]),
    percent(part.by_chance[i]),
    fixed(part.load_correlation[i] ?? NaN),
  ]);
  place("heads").append(el("div", {class: "scroll"}, table(heads, rows)));
}

function drawEntropies() {
  const names = {
    gate_entropy: ["gates of the chosen experts", "circle"],
    score_entropy: ["scores of all experts", "diamond", "6 3"],
    load_entropy: ["load", "ring", "2 3"],
  };
  layerCurves(
    "gate_entropy",
    "",
    {title: "entropies by layer", y1: 1.04, format: x => fixed(x, 4)},
    Object.entries(names).map(([key, [name, marker, dash]]) => ({
      name,
      at: reals(data[key]),
      marker,
      dash,
      colour: "var(--this)",
    })),
    {class: "chart wide"},
  );
}

function drawAgainst() {
  const part = data.against,
    there = data.layers.map(name => part.layers.indexOf(name)), // a layer of the same name, or −1
    theirs = reals(overMean(part.load)),
    pair = {colour: "var(--this)", marker: "circle"};
  if (part.shared)
    layerCurves(
      "against",
      "Choices that go to the matched expert",
      {title: "shared choices by layer", share: true},
      [
        {name: "shared", at: reals(part.shared), ...pair},
        {name: "by chance", at: reals(part.by_chance), colour: "var(--chance)", marker: "ring", dash: "4 3"},
      ],
    );
  layerCurves("against", "MaxVio of both runs", {title: "MaxVio by layer"}, [
    {name: "this run", at: l => maxVio(0, l), ...pair},
    {
      name: otherRun,
      at: l => part.max_vio[there[l]] ?? NaN,
      colour: "var(--other)",
      marker: "diamond",
      dash: "6 3",
    },
  ]);
  if (!match) return;
  const difference = (l, e) => load(0, l, e) - theirs(there[l], match(l, e)),
    end = scaleEnd(range(L).flatMap(l => range(E).map(e => difference(l, e)))),
    host = place("against", "Load of each expert minus that of its match", {class: "chart wide"});
  expertMap(host, {
    label: "difference of load",
    value: difference,
    scale: x => x / end,
    text: x => signed(x, 2),
    tip: (l, e) =>
      Number.isFinite(match(l, e))
        ? `${nameOf(l, e)}\nmatch: expert ${match(l, e)} of ${otherRun}\nload ${signed(difference(l, e), 2)} × the mean`
        : `${nameOf(l, e)}\nno match`,
  });
  ramp(host, "−" + fixed(end), "+" + fixed(end), "difference of load / mean load");
}
