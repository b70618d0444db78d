/* Search by token, and the table of all experts. */

const SHOWN = 50;

function drawSearch() {
  const input = byId("search"),
    found = byId("found");
  const all = data.favourites.flatMap((layer, l) => layer.flatMap((rows, e) => rows.map(row => ({l, e, row}))));
  const readable = text => text.replaceAll("␣", " ").toLowerCase();
  function search() {
    const wanted = readable(input.value);
    found.hidden = !wanted;
    if (!wanted) return;
    const fit = text => (text.trim() === wanted.trim() ? 2 : text.includes(wanted) ? 1 : 0);
    const kept = all
      .map(one => ({...one, fits: fit(readable(one.row[1]))}))
      .filter(one => one.fits)
      .sort((a, b) => b.fits - a.fits || b.row[4] - a.row[4]);
    const rows = kept
      .slice(0, SHOWN)
      .map(({l, e, row: [, text, count, lift, bits, margin]}) => [
        el("td", {class: "text"}, text),
        data.layers[l],
        expertButton(l, e),
        whole(count),
        times(lift),
        fixed(bits, 4),
        fixed(margin ?? NaN),
      ]);
    found.replaceChildren(
      el("h2", {}, `Experts that favour “${input.value}”`),
      el(
        "p",
        {class: "finding"},
        kept.length
          ? `${whole(kept.length)} lists of favourites contain it` +
              (kept.length > SHOWN ? `; the first ${SHOWN} are here.` : ".")
          : "No expert's list of favourites contains it.",
      ),
    );
    const heads = ["token", "layer", "expert", "count", "lift", "bits", "margin"];
    if (rows.length) found.append(scrolled("experts found", table(heads, rows)));
  }
  input.addEventListener("input", search);
  input.addEventListener("keydown", event => {
    if (event.key === "Enter" && !found.hidden) found.scrollIntoView();
    if (event.key === "Escape") {
      input.value = "";
      search();
      event.stopPropagation();
    }
  });
}

function drawTable() {
  const host = place("favourites");
  const preferred = (l, e) => {
    const ratios = domains.map((_, d) => preference(d, l, e));
    const d = ratios.reduce((a, x, i) => (x > (ratios[a] ?? -1) ? i : a), -1);
    return d < 0 ? null : [d, ratios[d]];
  };
  const rows = range(L * E).map(cell => {
    const l = Math.floor(cell / E),
      e = cell % E,
      [, token = "", , , bits = NaN] = data.favourites[l][e][0] || [];
    return {
      l,
      e,
      load: load(0, l, e),
      bias: bias ? bias(l, e) : NaN,
      worth: worth ? worth(l, e) : NaN,
      token,
      bits,
      domain: preferred(l, e),
    };
  });
  const columns = [
    ["layer", r => r.l, r => data.layers[r.l], "name"],
    ["expert", r => r.e, r => expertButton(r.l, r.e, String(r.e))],
    ["load", r => r.load, r => times(r.load)],
    bias && ["bias", r => r.bias, r => signed(r.bias, 4)],
    worth && ["loss without it", r => r.worth, r => signed(r.worth, 4)],
    ["favourite", r => r.token, r => r.token, "text"],
    ["bits", r => r.bits, r => fixed(r.bits, 4)],
    domains.length && [
      "domain",
      r => (r.domain ? r.domain[1] : NaN),
      r => (r.domain ? `${domains[r.domain[0]]} ${times(r.domain[1])}` : "–"),
      "name",
    ],
  ].filter(Boolean);
  let sorted = 0,
    up = true,
    limit = SHOWN,
    words = "";
  const filter = el("input", {
    type: "search",
    id: "filter",
    placeholder: "filter: layer 3, a token, a domain",
    "aria-label": "filter the table",
    oninput: event => {
      words = event.target.value.toLowerCase();
      limit = SHOWN;
      draw();
    },
  });
  const body = el("tbody"),
    count = el("span", {class: "dim"}),
    more = button("show more", () => {
      limit += 4 * SHOWN;
      draw();
    });
  const heads = columns.map(([name, , , kind], i) =>
    el(
      "th",
      {scope: "col", class: kind && "name"},
      button(name, () => {
        up = sorted === i ? !up : Boolean(kind) || i === 1;
        sorted = i;
        draw();
      }),
    ),
  );
  host.append(
    el("div", {class: "row"}, filter, count),
    el(
      "div",
      {class: "scroll tall", tabindex: 0, role: "region", "aria-label": "table of experts"},
      el("table", {id: "all-experts"}, el("thead", {}, el("tr", {}, heads)), body),
    ),
    el("div", {class: "row"}, more),
  );
  const text = r =>
    columns
      .filter(([, , , kind]) => kind)
      .map(([, , cell]) => cell(r))
      .join(" ")
      .toLowerCase() + ` expert ${r.e} `;
  function draw() {
    const value = columns[sorted][1];
    const kept = words ? rows.filter(r => text(r).includes(words)) : rows.slice();
    const missing = x => typeof x === "number" && Number.isNaN(x);
    kept.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (missing(x) || missing(y)) return missing(x) - missing(y); // missing ones last, either way
      return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
    });
    heads.forEach((head, i) => {
      head.setAttribute("aria-sort", i === sorted ? (up ? "ascending" : "descending") : "none");
      head.firstChild.textContent = columns[i][0] + (i === sorted ? (up ? " ▲" : " ▼") : "");
    });
    body.replaceChildren(
      ...kept.slice(0, limit).map(r =>
        el(
          "tr",
          {"aria-selected": String(r.l === state.layer && r.e === state.expert), "data-cell": r.l * E + r.e},
          columns.map(([, , cell, kind]) => el("td", {class: kind}, cell(r))),
        ),
      ),
    );
    count.textContent = `${whole(Math.min(limit, kept.length))} of ${whole(kept.length)} experts`;
    more.hidden = kept.length <= limit;
  }
  views.push(() => {
    for (const tr of body.rows)
      tr.setAttribute("aria-selected", String(+tr.dataset.cell === state.layer * E + state.expert));
  });
  draw();
}
