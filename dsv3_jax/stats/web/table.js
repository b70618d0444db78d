/* Search by token, and the table of all experts. */

const SHOWN = 50;

function drawSearch() {
  const input = byId("search"),
    found = byId("found"),
    f = lists.favourites;
  const owner = new Uint32Array(f.text.shape[0]);
  for (let cell = 0; cell < L * E; cell++) for (let i = f.starts(cell); i < f.starts(cell + 1); i++) owner[i] = cell;
  const readable = text => text.replaceAll("␣", " ").toLowerCase();
  function search() {
    const wanted = readable(input.value);
    found.hidden = !wanted;
    if (!wanted) return;
    const matches = data.favourites.texts.map(text => {
      const plain = readable(text);
      return plain.trim() === wanted.trim() ? 2 : plain.includes(wanted) ? 1 : 0;
    });
    const rows = range(owner.length).filter(i => matches[f.text(i)]);
    const weight = i => (f.bits ? f.bits(i) : f.lift(i));
    rows.sort((a, b) => matches[f.text(b)] - matches[f.text(a)] || weight(b) - weight(a));
    const heads = ["token", "layer", "expert", "count", "lift", f.bits && "bits", f.margin && "margin"].filter(Boolean);
    found.replaceChildren(
      el("h2", {}, `Experts that favour “${input.value}”`),
      el(
        "p",
        {class: "finding"},
        rows.length
          ? `${whole(rows.length)} lists of favourites hold it` +
              (rows.length > SHOWN ? `; the first ${SHOWN} are here.` : ".")
          : "No expert's list of favourites holds it.",
      ),
      rows.length
        ? el(
            "div",
            {class: "scroll tall"},
            el(
              "table",
              {},
              el(
                "thead",
                {},
                el(
                  "tr",
                  {},
                  heads.map(name => el("th", {scope: "col"}, name)),
                ),
              ),
              el(
                "tbody",
                {},
                rows.slice(0, SHOWN).map(i => {
                  const l = Math.floor(owner[i] / E),
                    e = owner[i] % E;
                  return el(
                    "tr",
                    {},
                    el("td", {class: "text"}, favouriteText(i)),
                    el("td", {}, data.layers[l]),
                    el("td", {}, expertButton(l, e)),
                    el("td", {}, whole(f.count(i))),
                    el("td", {}, times(f.lift(i))),
                    f.bits ? el("td", {}, fixed(f.bits(i), 4)) : null,
                    f.margin ? el("td", {}, fixed(f.margin(i))) : null,
                  );
                }),
              ),
            ),
          )
        : null,
    );
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
  const host = place("experts"),
    f = lists.favourites;
  const best = (l, e) => {
    const rows = rowsOf(f, l, e);
    return rows.length ? rows[0] : -1;
  };
  const preferred = (l, e) => {
    const ratios = data.domains.map((_, d) => load(d + 1, l, e) / load(0, l, e));
    const d = ratios.reduce((a, x, i) => (x > (ratios[a] ?? -1) ? i : a), -1);
    return d < 0 ? null : [d, ratios[d]];
  };
  const rows = range(L * E).map(cell => {
    const l = Math.floor(cell / E),
      e = cell % E,
      top = best(l, e);
    return {
      l,
      e,
      load: load(0, l, e),
      bias: bias ? bias(l, e) : NaN,
      worth: worth ? worth(l, e) : NaN,
      top,
      token: top < 0 ? "" : favouriteText(top),
      bits: top >= 0 && f.bits ? f.bits(top) : NaN,
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
    f.bits && ["bits", r => r.bits, r => fixed(r.bits, 4)],
    data.domains.length && [
      "domain",
      r => (r.domain ? r.domain[1] : NaN),
      r => (r.domain ? `${data.domains[r.domain[0]]} ${times(r.domain[1])}` : "–"),
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
