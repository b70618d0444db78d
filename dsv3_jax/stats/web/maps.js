/* Maps: cells of colour on a canvas, for rows × columns of any size, in a box that scrolls by itself. */

/* options: rows (names), columns (count), value(r, c), scale(value) → −1 … 1, tip(r, c) → text, pick(r, c),
   chosen() → [r, c], side(r) → text, sideTitle, groups (columns each), text(value), label, columnTitle,
   square, faint(r, c). */
function map(host, options) {
  const names = el("canvas", {class: "names", "aria-hidden": "true"}),
    canvas = el("canvas", {tabindex: 0, role: "img"});
  const box = el("div", {class: "scroll map"}, names, canvas);
  host.append(box);
  const base = el("canvas"),
    sharp = window.devicePixelRatio || 1;
  let context = base.getContext("2d"),
    shape = null,
    at = null;

  function measure() {
    const room = Math.max(box.clientWidth, 200),
      rows = options.rows();
    context.font = "12px system-ui, sans-serif";
    const left = Math.ceil(most(rows.map(name => context.measureText(name).width))) + 12;
    const right = options.side ? 62 : 6,
      top = options.sideTitle || options.columnTitle ? 34 : 20;
    const columns = options.columns,
      smallest = 2.5;
    const width = Math.max(
      Math.min((room - left - right) / columns, options.square ? 30 : 62),
      columns > 64 ? smallest : 12,
    );
    const height = options.square ? width : rows.length <= 16 ? 26 : rows.length <= 64 ? 13 : 8;
    return {
      rows,
      left,
      top,
      right,
      columns,
      width,
      height,
      wide: columns * width + right,
      tall: top + rows.length * height + 4,
    };
  }

  function size(canvas, wide, tall) {
    canvas.width = Math.ceil(wide * sharp);
    canvas.height = Math.ceil(tall * sharp);
    canvas.style.width = wide + "px";
    canvas.style.height = tall + "px";
    const context = canvas.getContext("2d");
    context.scale(sharp, sharp);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    return context;
  }

  /* The cells, which are kept, so that a frame around another cell costs little. */
  function draw() {
    shape = measure();
    const {rows, left, top, columns, width, height, wide, tall} = shape;
    context = size(base, wide, tall);
    canvas.setAttribute("aria-label", options.label + "; arrow keys move, Enter opens an expert");
    const text = colourOf("text"),
      dim = colourOf("dim"),
      back = colourOf("back"),
      gap = width > 8 ? 1 : 0;
    for (let r = 0; r < rows.length; r++)
      for (let c = 0; c < columns; c++) {
        const value = options.value(r, c),
          scaled = options.scale(value);
        const x = c * width,
          y = top + r * height;
        context.globalAlpha = options.faint && options.faint(r, c) ? 0.35 : 1;
        context.fillStyle = diverging(scaled);
        context.fillRect(x, y, Math.max(width - gap, width > 8 ? 1 : width + 0.3), height - (height > 8 ? 1 : 0));
        context.globalAlpha = 1;
        if (options.text && width >= 36 && height >= 20) {
          context.fillStyle = options.faint && options.faint(r, c) ? text : inkOn(scaled);
          context.textAlign = "center";
          context.font = "11px system-ui, sans-serif";
          context.fillText(options.text(value), x + (width - gap) / 2, y + height / 2);
        }
      }
    context.font = "12px system-ui, sans-serif";
    const each = Math.max(1, Math.ceil(13 / height)),
      step = [1, 2, 4, 8, 16, 32, 64].find(s => s * width >= 26) || 128;
    const beside = size(names, left, tall);
    beside.fillStyle = context.fillStyle = text;
    beside.textAlign = "right";
    context.textAlign = "left";
    for (let r = 0; r < rows.length; r += each) {
      beside.fillText(rows[r], left - 8, top + (r + 0.5) * height);
      if (options.side) context.fillText(options.side(r), columns * width + 8, top + (r + 0.5) * height);
    }
    context.fillStyle = dim;
    context.textAlign = "center";
    for (let c = 0; c < columns; c += step) context.fillText(c, Math.max((c + 0.5) * width, 4), top - 9);
    if (options.columnTitle) context.fillText(options.columnTitle, (columns * width) / 2, top - 25);
    context.textAlign = "left";
    if (options.sideTitle) context.fillText(options.sideTitle, columns * width + 8, top - 9);
    if (options.groups && options.groups > 1) {
      context.strokeStyle = back;
      context.lineWidth = width > 8 ? 4 : 2;
      for (let c = options.groups; c < columns; c += options.groups)
        line(c * width - gap / 2, top, c * width - gap / 2, tall - 4);
    }
    paint();
  }
  function paint() {
    if (!shape) return;
    context = size(canvas, shape.wide, shape.tall);
    context.drawImage(base, 0, 0, shape.wide, shape.tall);
    const chosen = options.chosen && options.chosen();
    if (chosen) outline(chosen[0], chosen[1], colourOf("text"), 2);
    if (at) outline(at[0], at[1], colourOf("link"), 3);
  }
  function line(x0, y0, x1, y1) {
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
    context.stroke();
  }
  function outline(r, c, colour, thick) {
    if (!(c >= 0)) return;
    context.strokeStyle = colour;
    context.lineWidth = thick;
    const out = shape.width > 8 ? 0 : 2;
    context.strokeRect(
      c * shape.width - out,
      shape.top + r * shape.height - out,
      Math.max(shape.width - 1, 2) + 2 * out,
      shape.height - 1 + 2 * out,
    );
  }
  function cellAt(event) {
    const box = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left) / shape.width);
    const r = Math.floor((event.clientY - box.top - shape.top) / shape.height);
    return r >= 0 && r < shape.rows.length && c >= 0 && c < shape.columns ? [r, c] : null;
  }
  canvas.addEventListener("pointermove", event => {
    const cell = cellAt(event);
    if (cell) showTip(event.clientX, event.clientY, options.tip(...cell));
    else hideTip();
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", event => {
    const cell = cellAt(event);
    if (cell && options.pick) options.pick(...cell);
  });
  canvas.addEventListener("keydown", event => {
    const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (move) {
      const from = at || (options.chosen && options.chosen() && options.chosen()[1] >= 0 ? options.chosen() : null);
      at = from
        ? [
            Math.min(Math.max(from[0] + move[0], 0), shape.rows.length - 1),
            Math.min(Math.max(from[1] + move[1], 0), shape.columns - 1),
          ]
        : [0, 0];
      paint();
      const box = canvas.getBoundingClientRect();
      showTip(
        box.left + (at[1] + 0.5) * shape.width,
        box.top + shape.top + (at[0] + 0.5) * shape.height,
        options.tip(...at),
      );
    } else if ((event.key === "Enter" || event.key === " ") && at && options.pick) options.pick(...at);
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("blur", () => {
    at = null;
    hideTip();
    paint();
  });
  shown(host, draw);
  return {draw, paint};
}

/* A bar of colours with its ends: what a map's colours mean. */
function ramp(host, low, high, title) {
  const canvas = el("canvas", {width: 180, height: 12, "aria-hidden": "true"}),
    context = canvas.getContext("2d");
  const ends = [low, high].map(text => el("span", {}, text));
  host.append(el("div", {class: "ramp"}, ends[0], canvas, ends[1], el("span", {}, title)));
  return shown(host, () => {
    for (let x = 0; x < 180; x++) {
      context.fillStyle = diverging(x / 90 - 1);
      context.fillRect(x, 0, 1.5, 12);
    }
  });
}

/* Draw now, and again when the theme or the width of the place changes. */
function shown(host, draw) {
  redraws.push(draw);
  let width = 0;
  new ResizeObserver(() => {
    if (host.clientWidth && host.clientWidth !== width) {
      width = host.clientWidth;
      draw();
    }
  }).observe(host);
  return draw;
}

/* A map of all layers × experts that opens the expert. */
function expertMap(host, options) {
  const made = map(host, {
    rows: () => data.layers,
    columns: E,
    columnTitle: "expert",
    pick: (l, e) => choose({layer: l, expert: e}),
    chosen: () => [state.layer, state.expert],
    ...options,
  });
  views.push(before => {
    if (options.byDomain && before.domain !== state.domain) made.draw();
    else made.paint();
  });
}
