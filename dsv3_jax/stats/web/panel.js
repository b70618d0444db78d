/* One expert: what it receives, what it is worth, its tokens, contexts, partners, and where its tokens go next. */

/* Experts of the next layer that receive this expert's tokens more often than chance. */
function nextOf(l, e) {
  if (!data.transitions || l >= L - 1) return [];
  const {lift, top} = data.transitions;
  const all = lift
    ? lift[l][e].map((x, j) => [j, x])
    : top[l].filter(([i]) => i === e).map(([, j, x]) => [j, x]);
  return all
    .filter(([, x]) => x > 1)
    .sort((a, b) => b[1] - a[1])
    .slice(0, 6);
}

function drawPanel() {
  const panel = byId("panel");
  let opener = null;
  function close() {
    choose({expert: -1});
    if (opener && opener.isConnected) opener.focus({preventScroll: true});
  }
  const section = (heading, content, otherwise) => [
    el("h3", {}, heading),
    content || el("p", {class: "dim"}, otherwise),
  ];
  const move = (by, key, count) => choose({[key]: (state[key] + by + count) % count});

  function show() {
    const {layer: l, expert: e} = state,
      favourites = data.favourites[l][e],
      contexts = data.contexts[l][e],
      together = data.partners[l][e],
      next = nextOf(l, e);
    const facts = [["load", tellLoad(l, e)]];
    if (bias) facts.push(["bias", signed(bias(l, e), 4)]);
    if (worth) facts.push(["loss without it", tellWorth(l, e)]);
    if (match) facts.push([`in ${otherRun}`, Number.isFinite(match(l, e)) ? `expert ${match(l, e)}` : "no match"]);
    const preferred = domains
      .map((name, d) => [name, preference(d, l, e)])
      .sort((a, b) => b[1] - a[1])
      .slice(0, 8);
    const widest = most([1, ...known(preferred.map(([, x]) => x))]);
    const bar = x =>
      el("span", {
        class: "bar",
        style: {width: Number.isFinite(x) ? `${(6 * x) / widest}rem` : "0", background: diverging(logScale(2)(x))},
      });
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
        button("‹ expert", () => move(-1, "expert", E), {"aria-label": "previous expert", id: "panel-before"}),
        button("expert ›", () => move(1, "expert", E), {"aria-label": "next expert", id: "panel-after"}),
        button("↑ layer", () => move(-1, "layer", L), {"aria-label": "layer before", id: "panel-up"}),
        button("↓ layer", () => move(1, "layer", L), {"aria-label": "layer after", id: "panel-down"}),
      ),
      table(null, facts),
      ...(domains.length
        ? section(
            "Domains: share over share of all text",
            table(
              null,
              preferred.map(([name, x]) => [name, bar(x), times(x)]),
            ),
          )
        : []),
      ...section(
        "Favourite tokens",
        favourites.length &&
          table(
            ["token", "count", "lift", "bits", "margin"],
            favourites.map(([, text, count, lift, bits, margin]) => [
              el("span", {class: "text"}, text),
              whole(count),
              times(lift),
              fixed(bits, 4),
              fixed(margin ?? NaN),
            ]),
          ),
        "No frequent token comes here more often than chance.",
      ),
      ...section(
        "Contexts with large gates",
        contexts.length &&
          el(
            "div",
            {},
            contexts.map(([before, token, after, gate]) =>
              el(
                "div",
                {class: "context text"},
                el("b", {title: "gate"}, fixed(gate)),
                before,
                el("mark", {}, token),
                after,
              ),
            ),
          ),
        "No token was routed to this expert.",
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
