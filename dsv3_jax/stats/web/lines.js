/* Curves over layers or steps, and a scatter of points. */

/* options: x (numbers, or names of layers), names (true: x are names), series: [{name, values, colour, dash, marker,
   low, high, width}], y1, unit, format, title. The y axis goes down to 0 at least. */
function curves(host, options) {
  const svg = drawn("svg", {tabindex: 0, role: "img", "aria-label": options.title + "; arrow keys read the values"});
  host.append(svg);
  let view = null,
    at = -1;
  const format = options.format || (options.share ? percent : x => fixed(x, 2));

  function draw() {
    const series = options.series(),
      xs = options.x,
      wide = Math.max(host.clientWidth, 240),
      tall = options.tall || 230;
    const values = known(series.flatMap(s => [...s.values, ...(s.low || []), ...(s.high || [])]));
    const low = least([0, ...values]),
      high = options.y1 ?? (values.length ? most(values) : 1),
      ticks = niceTicks(low, high || 1, tall < 180 ? 3 : 5);
    const y1 = options.y1 ?? Math.max(high, ticks[ticks.length - 1]) * 1.04;
    const box = {left: 46, right: wide - 10, top: 10, bottom: tall - 34};
    const places = options.names ? range(xs.length) : xs;
    const x0 = places[0] - (options.names ? 0.5 : 0),
      x1 = places[places.length - 1] + (options.names ? 0.5 : 0);
    const x = v => box.left + ((v - x0) / (x1 - x0 || 1)) * (box.right - box.left);
    const y = v => box.bottom - ((v - low) / (y1 - low || 1)) * (box.bottom - box.top);
    svg.setAttribute("viewBox", `0 0 ${wide} ${tall}`);
    svg.style.height = tall + "px";
    svg.replaceChildren();
    for (const tick of ticks) {
      svg.append(drawn("line", {class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick)}));
      svg.append(
        drawn(
          "text",
          {class: "axis", x: box.left - 6, y: y(tick) + 4, "text-anchor": "end"},
          options.share ? fixed(100 * tick, 0) + " %" : tickText(tick, ticks),
        ),
      );
    }
    const marks = options.names
      ? nameTicks(xs, box.right - box.left)
      : niceTicks(x0, x1, Math.max(2, Math.floor(wide / 110))).filter(t => t >= x0);
    for (const t of marks)
      svg.append(
        drawn(
          "text",
          {class: "axis", x: x(t), y: tall - 18, "text-anchor": "middle"},
          options.names ? xs[t].replace("layer ", "") : whole(t),
        ),
      );
    svg.append(
      drawn("text", {class: "axis", x: box.right, y: tall - 3, "text-anchor": "end"}, options.names ? "layer" : "step"),
    );
    if (options.unit) svg.append(drawn("text", {class: "axis", x: 2, y: tall - 3}, options.unit));
    for (const s of series) {
      let path = "",
        pen = false;
      const shift = s.shift || 0; // intervals of several curves stand beside each other
      s.values.forEach((v, i) => {
        if (options.names && i && isHead(i) && !isHead(i - 1)) pen = false; // heads stand apart from the trunk
        if (!Number.isFinite(v)) {
          pen = false;
          return;
        }
        path += `${pen ? "L" : "M"}${(x(places[i]) + shift).toFixed(1)} ${y(v).toFixed(1)}`;
        pen = true;
      });
      svg.append(
        drawn("path", {
          d: path,
          fill: "none",
          stroke: s.colour,
          "stroke-width": s.width || 1.8,
          "stroke-dasharray": s.dash,
          "stroke-linejoin": "round",
          opacity: s.opacity,
        }),
      );
      if (s.low)
        s.values.forEach((v, i) => {
          if (Number.isFinite(v))
            svg.append(
              drawn("line", {
                x1: x(places[i]) + shift,
                x2: x(places[i]) + shift,
                y1: y(s.low[i]),
                y2: y(s.high[i]),
                stroke: s.colour,
                "stroke-width": 2,
              }),
            );
        });
      if (s.marker || places.length === 1)
        s.values.forEach((v, i) => {
          if (Number.isFinite(v))
            svg.append(marker(s.marker, x(places[i]) + shift, y(v), s.colour, places.length > 30 ? 2.5 : 4));
        });
    }
    const cursor = drawn("line", {class: "grid", y1: box.top, y2: box.bottom, visibility: "hidden"});
    const dot = drawn("circle", {r: 6, fill: "none", "stroke-width": 2, visibility: "hidden"});
    svg.append(cursor, dot);
    view = {series, places, x, y, cursor, dot, wide, tall};
  }

  /* All values at this x, or of many curves the nearest. */
  function read(i, clientX, clientY) {
    const {series, places, x, y, cursor, dot} = view,
      box = svg.getBoundingClientRect();
    const head = options.names ? options.x[i] : "step " + whole(options.x[i]);
    let shownSeries = series.filter(s => Number.isFinite(s.values[i]));
    dot.setAttribute("visibility", "hidden");
    if (shownSeries.length > 9 && clientY !== undefined) {
      const gap = s => Math.abs(y(s.values[i]) - (clientY - box.top));
      const nearest = shownSeries.reduce((a, b) => (gap(b) < gap(a) ? b : a));
      shownSeries = [nearest];
      dot.setAttribute("cx", x(places[i]));
      dot.setAttribute("cy", y(nearest.values[i]));
      dot.setAttribute("stroke", nearest.colour);
      dot.setAttribute("visibility", "visible");
    }
    cursor.setAttribute("x1", x(places[i]));
    cursor.setAttribute("x2", x(places[i]));
    cursor.setAttribute("visibility", "visible");
    const lines = shownSeries
      .slice(0, 9)
      .map(s => `${s.name}: ${format(s.values[i])}` + (s.low ? ` [${format(s.low[i])}, ${format(s.high[i])}]` : ""));
    showTip(clientX ?? box.left + x(places[i]), clientY ?? box.top + 20, [head, ...lines].join("\n"));
    return shownSeries[0];
  }
  function nearest(event) {
    const place = event.clientX - svg.getBoundingClientRect().left;
    const gap = i => Math.abs(view.x(view.places[i]) - place);
    return range(view.places.length).reduce((a, b) => (gap(b) < gap(a) ? b : a), 0);
  }
  const leave = () => {
    hideTip();
    if (view) {
      view.cursor.setAttribute("visibility", "hidden");
      view.dot.setAttribute("visibility", "hidden");
    }
  };
  svg.addEventListener("pointermove", event => {
    if (view && view.series.length) read(nearest(event), event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("click", event => {
    if (!view || !view.series.length) return;
    const i = nearest(event),
      series = read(i, event.clientX, event.clientY);
    if (series && series.pick) series.pick();
    else if (options.names && options.pickLayer !== false) choose({layer: i});
  });
  svg.addEventListener("keydown", event => {
    if (event.key === "Enter" && at >= 0 && options.names) return choose({layer: at});
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!step || !view || !view.series.length) return;
    at = Math.min(Math.max(at + step, 0), view.places.length - 1);
    read(at);
    event.preventDefault();
  });
  return shown(host, draw);
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count || 1,
    size = 10 ** Math.floor(Math.log10(rough));
  const step = size * [1, 2, 2.5, 5, 10].find(m => m * size >= rough * 0.999);
  const ticks = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step)
    ticks.push(Math.abs(t) < step * 1e-6 ? 0 : t);
  return ticks;
}
const tickText = (tick, ticks) => {
  const step = ticks.length > 1 ? ticks[1] - ticks[0] : 1;
  return step >= 1
    ? whole(tick)
    : fixed(tick, Math.min(5, Math.ceil(-Math.log10(step) + (String(step).includes("25") ? 1 : 0) - 1e-9)));
};
/* As many names as there is room for; the last one always. */
function nameTicks(names, room) {
  const each = Math.max(1, Math.ceil(names.length / Math.max(2, Math.floor(room / 48))));
  const last = names.length - 1;
  return [...range(last).filter(i => i % each === 0 && last - i >= each), last];
}

/* Points: [{x, y, low, high, name, pick, chosen}]. */
function scatter(host, options) {
  const canvas = el("canvas", {
    tabindex: 0,
    role: "img",
    "aria-label": options.title + "; arrow keys move from point to point, Enter opens",
  });
  host.append(canvas);
  const context = canvas.getContext("2d");
  let placed = [],
    at = -1;
  function draw() {
    const points = options.points(),
      wide = Math.max(host.clientWidth, 240),
      tall = 300,
      sharp = window.devicePixelRatio || 1;
    canvas.width = wide * sharp;
    canvas.height = tall * sharp;
    canvas.style.width = wide + "px";
    canvas.style.height = tall + "px";
    context.scale(sharp, sharp);
    const few = points.length <= 400,
      ys = points.flatMap(p => (few && p.low !== undefined ? [p.y, p.low, p.high] : [p.y]));
    const [y0, y1] = [Math.min(0, least(known(ys))), Math.max(1e-9, most(known(ys)))],
      [x0, x1] = [least(points.map(p => p.x)) * 0.97, most(points.map(p => p.x)) * 1.03];
    const box = {left: 54, right: wide - 10, top: 10, bottom: tall - 36};
    const x = v => box.left + ((v - x0) / (x1 - x0)) * (box.right - box.left);
    const y = v => box.bottom - ((v - y0) / (y1 - y0)) * (box.bottom - box.top);
    context.font = "12px system-ui, sans-serif";
    const ticks = niceTicks(y0, y1, 5);
    for (const t of ticks) {
      context.fillStyle = t === 0 ? colourOf("dim") : colourOf("line");
      context.fillRect(box.left, y(t), box.right - box.left, 1);
      context.fillStyle = colourOf("dim");
      context.textAlign = "right";
      context.fillText(tickText(t, ticks), box.left - 6, y(t) + 4);
    }
    const xt = niceTicks(x0, x1, 5);
    context.textAlign = "center";
    for (const t of xt) context.fillText(tickText(t, xt), x(t), tall - 20);
    context.textAlign = "right";
    context.fillText(options.xUnit, box.right, tall - 4);
    context.textAlign = "left";
    context.fillText(options.unit, 2, tall - 4);
    placed = points.map(p => ({...p, px: x(p.x), py: y(p.y), colour: p.colour}));
    for (const p of placed) {
      context.globalAlpha = few ? 0.9 : 0.5;
      if (few && p.low !== undefined) {
        context.fillStyle = colourOf("none");
        context.fillRect(p.px - 0.5, y(p.high), 1, y(p.low) - y(p.high));
      }
    }
    placed.forEach((p, i) => {
      context.globalAlpha = p.chosen || few ? 1 : 0.6;
      context.fillStyle = p.colour;
      context.beginPath();
      context.arc(p.px, p.py, few ? 4 : 2, 0, 7);
      context.fill();
      if (p.chosen || i === at) {
        context.strokeStyle = i === at ? colourOf("link") : colourOf("text");
        context.lineWidth = 2;
        context.beginPath();
        context.arc(p.px, p.py, 7, 0, 7);
        context.stroke();
      }
    });
    context.globalAlpha = 1;
  }
  function nearest(event) {
    const box = canvas.getBoundingClientRect(),
      px = event.clientX - box.left,
      py = event.clientY - box.top;
    const gap = p => (p.px - px) ** 2 + (p.py - py) ** 2;
    const best = placed.reduce((a, b) => (gap(b) < gap(a) ? b : a));
    return gap(best) < 500 ? best : null;
  }
  canvas.addEventListener("pointermove", event => {
    const p = placed.length && nearest(event);
    if (p) showTip(event.clientX, event.clientY, p.name);
    else hideTip();
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", event => {
    const p = placed.length && nearest(event);
    if (p) p.pick();
  });
  canvas.addEventListener("keydown", event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step) {
      const order = range(placed.length).sort((a, b) => placed[a].x - placed[b].x),
        now = order.indexOf(at);
      at = order[Math.min(Math.max(now + step, 0), order.length - 1)];
      draw();
      const box = canvas.getBoundingClientRect();
      showTip(box.left + placed[at].px, box.top + placed[at].py, placed[at].name);
    } else if (event.key === "Enter" && at >= 0) placed[at].pick();
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("blur", () => {
    at = -1;
    hideTip();
    draw();
  });
  return shown(host, draw);
}
