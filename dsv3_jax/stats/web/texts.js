/* Whole texts: each token in the colour of its first expert of the chosen layer. */

function drawTexts() {
  const host = place("texts");
  const texts = data.texts.map(text => ({...text, gate: reals(text.gates), loss: reals(text.nll)}));
  let colours = "expert",
    numbers = E <= 64,
    at = -1,
    spans = [];
  const select = el(
    "select",
    {"aria-label": "text", onchange: event => choose({text: +event.target.value})},
    texts.map((text, i) =>
      el("option", {value: i}, `${i + 1} of ${texts.length}${text.domain ? ": " + text.domain : ""}`),
    ),
  );
  const step = by => choose({text: Math.min(Math.max(state.text + by, 0), texts.length - 1)});
  const before = button("‹ previous", () => step(-1)),
    after = button("next ›", () => step(1));
  const modes = {expert: "first expert", loss: "loss", gate: "gate of the open expert"};
  const colour = el(
    "select",
    {
      "aria-label": "colour",
      onchange: event => {
        colours = event.target.value;
        paint();
      },
    },
    Object.entries(modes).map(([value, name]) => el("option", {value}, "colour: " + name)),
  );
  const check = el("input", {
    type: "checkbox",
    onchange: event => {
      numbers = event.target.checked;
      build();
    },
  });
  check.checked = numbers;
  const box = el("div", {
    class: "tokens",
    tabindex: 0,
    role: "group",
    "aria-label": "tokens of the text; arrow keys move, Enter opens the first expert",
  });
  const note = el("p", {class: "dim"});
  host.append(
    el("div", {class: "row"}, before, select, after, colour, el("label", {class: "dim"}, check, " numbers")),
    box,
    note,
  );

  const text = () => texts[state.text];
  const chosen = t => text().experts[state.layer][t]; // a head has no choice for the last tokens
  const rank = t => chosen(t).indexOf(state.expert);
  function tell(t) {
    const l = state.layer,
      experts = chosen(t).map((e, k) => `expert ${e}: gate ${fixed(text().gate(l, t, k))}`);
    return [
      `“${text().tokens[t]}”` +
        (Number.isFinite(text().loss(t)) ? `, loss ${fixed(text().loss(t))} nats` : ""),
      data.layers[l],
      ...experts,
    ].join("\n");
  }
  function build() {
    at = -1;
    spans = text().tokens.map((token, t) => {
      const number = numbers ? el("sub", {"aria-hidden": "true"}) : null; // before the line breaks, if there is one
      const [line, ...rest] = (token || "∅").split("↵");
      return el("span", {"data-t": t}, rest.length ? [line + "↵", number, "\n" + rest.join("↵\n")] : [line, number]);
    });
    box.replaceChildren(...spans);
    before.disabled = state.text === 0;
    after.disabled = state.text === texts.length - 1;
    select.value = state.text;
    paint();
  }
  function paint() {
    const l = state.layer;
    let own = 0;
    spans.forEach((span, t) => {
      const first = chosen(t)[0],
        place = rank(t);
      const strength = colours === "loss" ? text().loss(t) / 8 : place < 0 ? 0 : text().gate(l, t, place);
      span.style.background =
        colours === "expert" ? (first === undefined ? "" : expertColour(first)) : diverging(strength);
      span.style.color = colours === "expert" ? "" : inkOn(strength);
      span.classList.toggle("own", place >= 0);
      if (numbers) span.querySelector("sub").textContent = first ?? "";
      own += place >= 0;
    });
    box.classList.toggle("some", state.expert >= 0 && colours === "expert");
    note.textContent =
      state.expert >= 0
        ? `Expert ${state.expert} of ${data.layers[l]} receives ${own} of these ${spans.length} tokens.`
        : `Colours: first expert in ${data.layers[l]}.`;
  }
  function move(to) {
    if (spans[at]) spans[at].classList.remove("at");
    at = Math.min(Math.max(to, 0), spans.length - 1);
    spans[at].classList.add("at");
    const place = spans[at].getBoundingClientRect(),
      frame = box.getBoundingClientRect();
    if (place.top < frame.top || place.bottom > frame.bottom) box.scrollTop += place.top - frame.top - frame.height / 3;
    const now = spans[at].getBoundingClientRect();
    showTip(now.left, now.bottom - 12, tell(at));
  }
  const tokenOf = event => {
    const span = event.target.closest("span[data-t]");
    return span ? +span.dataset.t : -1;
  };
  const open = t => {
    if (chosen(t).length) choose({expert: chosen(t)[0]});
  };
  box.addEventListener("pointermove", event => {
    const t = tokenOf(event);
    if (t >= 0) showTip(event.clientX, event.clientY, tell(t));
    else hideTip();
  });
  box.addEventListener("pointerleave", hideTip);
  box.addEventListener("click", event => {
    const t = tokenOf(event);
    if (t >= 0) open(t);
  });
  box.addEventListener("blur", hideTip);
  box.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10}[event.key];
    if (by) move(at < 0 ? 0 : at + by);
    else if (event.key === "Enter" && at >= 0) open(at);
    else return;
    event.preventDefault();
  });
  views.push(before => {
    if (before.text !== state.text) build();
    else if (before.layer !== state.layer || before.expert !== state.expert) paint();
  });
  redraws.push(paint);
  build();
}
