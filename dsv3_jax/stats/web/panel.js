/* One expert: what it receives, what it is worth, its tokens, contexts, partners, and where its tokens go next. */

const lists = {
  favourites: {
    starts: ids(data.favourites.starts),
    text: ids(data.favourites.text),
    count: ids(data.favourites.count),
    lift: reals(data.favourites.lift),
    bits: reals(data.favourites.bits),
    margin: reals(data.favourites.margin),
  },
  contexts: {starts: ids(data.contexts.starts), gate: reals(data.contexts.gate)},
};
const rowsOf = (list, l, e) => {
  const cell = l * E + e;
  return range(list.starts(cell + 1) - list.starts(cell)).map(i => list.starts(cell) + i);
};
const favouriteText = i => data.favourites.texts[lists.favourites.text(i)];
const partners = data.partners && {expert: ids(data.partners.expert), lift: reals(data.partners.lift)};
const paths = data.transitions && data.transitions.lift && reals(data.transitions.lift);
const match = data.against && data.against.match && ids(data.against.match);

/* Experts of the next layer that receive this expert's tokens more often than chance. */
function nextOf(l, e) {
  if (!data.transitions || l >= L - 1) return [];
  const all = paths
    ? range(E).map(j => [j, paths(l, e, j)])
    : (data.transitions.top[l] || []).filter(([i]) => i === e).map(([, j, lift]) => [j, lift]);
  return all
    .filter(([, lift]) => lift > 1)
    .sort((a, b) => b[1] - a[1])
    .slice(0, 6);
}
/* Partners from the list of each expert, or from the largest pairs of its layer. */
function partnersOf(l, e) {
  if (partners)
    return range(partners.expert.shape[2])
      .map(i => [partners.expert(l, e, i), partners.lift(l, e, i)])
      .filter(([other]) => other !== e);
  if (!data.together) return [];
  return (data.together.top[l] || [])
    .filter(([i, j]) => i === e || j === e)
    .map(([i, j, lift]) => [i === e ? j : i, lift])
    .slice(0, 6);
}

function drawPanel() {
  const panel = byId("panel");
  let opener = null;
  function close() {
    choose({expert: -1});
    if (opener && opener.isConnected) opener.focus({preventScroll: true});
  }
  const section = (heading, ...children) => [el("h3", {}, heading), ...children.filter(Boolean)];
  const table = (heads, rows) =>
    el(
      "table",
      {},
      heads
        ? el(
            "thead",
            {},
            el(
              "tr",
              {},
              heads.map(name => el("th", {scope: "col"}, name)),
            ),
          )
        : null,
      el(
        "tbody",
        {},
        rows.map(cells =>
          el(
            "tr",
            {},
            cells.map(cell => el("td", {}, cell)),
          ),
        ),
      ),
    );
  const mono = text => el("span", {class: "text"}, text);

  function show() {
    const {layer: l, expert: e} = state,
      f = lists.favourites,
      c = lists.contexts;
    const facts = [["load", tellLoad(l, e)]];
    if (bias) facts.push(["bias", signed(bias(l, e), 4)]);
    if (worth)
      facts.push([
        "loss without it",
        `${signed(worth(l, e), 4)} nats` +
          (worthLow ? ` [${fixed(worthLow(l, e), 4)}, ${fixed(worthHigh(l, e), 4)}]` : ""),
      ]);
    if (match) facts.push([`in ${otherRun}`, match(l, e) === E ? "no match" : `expert ${match(l, e)}`]);
    const widest = most([1, ...known(data.domains.map((_, d) => load(d + 1, l, e) / load(0, l, e)))]);
    const domains = data.domains
      .map((name, d) => [d, name, load(d + 1, l, e) / load(0, l, e)])
      .sort((a, b) => b[2] - a[2])
      .slice(0, 8);
    const favourites = rowsOf(f, l, e),
      contexts = rowsOf(c, l, e),
      next = nextOf(l, e),
      together = partnersOf(l, e);
    const move = (by, key, count) => ({[key]: (state[key] + by + count) % count});
    const heads = ["token", "count", "lift", f.bits && "bits", f.margin && "margin"].filter(Boolean);
    panel.replaceChildren(
      el(
        "div",
        {class: "row"},
        el("h2", {}, nameOf(l, e)),
        button("✕", close, {"aria-label": "close", id: "panel-close"}),
      ),
      el(
        "div",
        {class: "row"},
        button("‹ expert", () => choose(move(-1, "expert", E)), {"aria-label": "previous expert", id: "panel-before"}),
        button("expert ›", () => choose(move(1, "expert", E)), {"aria-label": "next expert", id: "panel-after"}),
        button("↑ layer", () => choose(move(-1, "layer", L)), {"aria-label": "layer before", id: "panel-up"}),
        button("↓ layer", () => choose(move(1, "layer", L)), {"aria-label": "layer after", id: "panel-down"}),
      ),
      table(null, facts),
      ...(domains.length
        ? section(
            "Domains: share over share of all text",
            table(
              null,
              domains.map(([, name, x]) => [
                name,
                el("span", {
                  class: "bar",
                  style: {
                    width: Number.isFinite(x) ? `${(6 * x) / widest}rem` : "0",
                    background: diverging(logScale(2)(x)),
                  },
                }),
                times(x),
              ]),
            ),
          )
        : []),
      ...section(
        "Favourite tokens",
        favourites.length
          ? table(
              heads,
              favourites.map(i => [
                mono(favouriteText(i)),
                whole(f.count(i)),
                times(f.lift(i)),
                ...[f.bits && fixed(f.bits(i), 4), f.margin && fixed(f.margin(i))].filter(x => x !== null),
              ]),
            )
          : el("p", {class: "dim"}, "No frequent token comes here more often than chance."),
      ),
      ...section(
        "Contexts with large gates",
        ...contexts.map(i => {
          const [before, token, after] = data.contexts.rows[i];
          return el(
            "div",
            {class: "context text"},
            el("b", {title: "gate"}, c.gate ? fixed(c.gate(i)) : ""),
            before,
            el("mark", {}, token),
            after,
          );
        }),
        contexts.length ? null : el("p", {class: "dim"}, "No token was routed to this expert."),
      ),
      ...(together.length
        ? section(
            "Chosen together with",
            table(
              null,
              together.map(([other, lift]) => [expertButton(l, other), times(lift)]),
            ),
          )
        : []),
      ...(next.length
        ? section(
            `Its tokens go next, in ${data.layers[l + 1]}, to`,
            table(
              null,
              next.map(([other, lift]) => [expertButton(l + 1, other), times(lift)]),
            ),
          )
        : []),
    );
  }
  views.push(before => {
    const open = state.expert >= 0;
    if (before.expert === state.expert && before.layer === state.layer) return;
    const focused = panel.contains(document.activeElement) ? document.activeElement.id : null;
    if (open && before.expert < 0) opener = document.activeElement;
    panel.hidden = !open;
    document.documentElement.classList.toggle("open", open);
    if (!open) return;
    show();
    if (focused !== null) (byId(focused) || panel).focus({preventScroll: true});
    else panel.scrollTop = 0;
  });
  redraws.push(() => {
    if (state.expert >= 0) show();
  });
  document.addEventListener("keydown", event => {
    if (event.key === "Escape" && state.expert >= 0) close();
  });
}
