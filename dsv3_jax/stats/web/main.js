/* Put everything in place: toolbar, theme, address, and the charts of the parts that the page has. */

const slider = byId("layer");
slider.max = L - 1;
slider.addEventListener("input", () => choose({layer: +slider.value}));
byId("layer-before").addEventListener("click", () => choose({layer: Math.max(state.layer - 1, 0)}));
byId("layer-after").addEventListener("click", () => choose({layer: Math.min(state.layer + 1, L - 1)}));
views.push(() => {
  slider.value = state.layer;
  slider.setAttribute("aria-valuetext", data.layers[state.layer]);
  byId("layer-name").textContent = data.layers[state.layer];
  byId("layer-before").disabled = state.layer === 0;
  byId("layer-after").disabled = state.layer === L - 1;
});

byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  redraw();
});
systemDark.addEventListener("change", redraw);
document.addEventListener("scroll", hideTip, {passive: true});

/* The address: #layer=3&expert=17&text=2. Other fragments are the page's own parts. */
const keys = data.layers.map(name => name.replace("layer ", "").replace(" ", "")); // 3, MTP1
function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  if (!words.has("layer")) return;
  const number = (name, count) => {
    const x = Number(words.get(name) ?? NaN);
    return Number.isInteger(x) && x >= 0 && x < count ? x : -1;
  };
  const layer = keys.indexOf(words.get("layer"));
  if (layer < 0) return;
  choose({
    layer,
    expert: words.get("expert") ? number("expert", E) : -1,
    text: Math.max(0, number("text", (data.texts || []).length)),
  });
}
let writes = false;
views.push(() => {
  if (!writes) return;
  const words = [`layer=${encodeURIComponent(keys[state.layer])}`];
  if (state.expert >= 0) words.push(`expert=${state.expert}`);
  if (state.text) words.push(`text=${state.text}`);
  history.replaceState(null, "", "#" + words.join("&"));
});

const parts = {
  load: drawLoad,
  texts: drawTexts,
  bias: drawBias,
  information: drawInformation,
  domains: drawDomains,
  worth: drawWorth,
  transitions: drawTransitions,
  partners: drawTogether,
  repeats: drawRepeats,
  heads: drawHeads,
  gate_entropy: drawEntropies,
  against: drawAgainst,
  layers: drawLayers,
  favourites: drawTable,
  over_time: () => stepCurves("over_time", "MaxVio of training batches", data.over_time.steps, data.over_time.max_vio),
  saturation: () =>
    stepCurves("saturation", "choices already made", data.saturation.steps, data.saturation.share, {
      y1: 1.04,
      share: true,
    }),
};
drawHeader();
for (const [section, draw] of Object.entries(parts)) if (has(section)) draw();
for (const section of ["load", "bias", "information", "against"])
  if (has(section)) byId(section + "-charts").classList.add("two");
drawPanel();
drawSearch();
choose({});
readAddress();
writes = true;
window.addEventListener("hashchange", readAddress);
