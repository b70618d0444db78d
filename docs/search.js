// The site's search. Sphinx reads `Scorer`; _static/excerpts.js has EXCERPTS, the text of each page
// and of its sections.

// Guides and pages that one reads from the beginning come first, then studies, then the API.
const PLACES = [
  [/^docs\/(start|model|glossary|guides\/)/, 40],
  [/^docs\/generated\/topics\//, 30],
  [/^(docs\/generated\/(commands|tables)|notebooks\/|SECURITY|CONTRIBUTING)/, 20],
  [/^experiments\//, 10],
];
const QUERY = (new URLSearchParams(window.location.search).get("q") ?? "").trim().toLowerCase();
const WORDS = QUERY.split(/\s+/).filter((word) => word.length > 2);

/** How often a page has all that was typed, up to nine times. */
function mentions(page) {
  const text = EXCERPTS[page]?.[""].toLowerCase() ?? "";
  return QUERY ? Math.min(text.split(QUERY).length - 1, 9) : 0;
}

var Scorer = {
  score: ([page, , , , score]) => {
    const place = PLACES.find(([pattern]) => pattern.test(page))?.[1] ?? 0;
    return score + place + mentions(page);
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};

/** Return 200 letters of a text around all that was typed, or else its first word, or nothing. */
function excerpt(text) {
  const lower = text.toLowerCase();
  const found = [QUERY, ...WORDS].map((word) => lower.indexOf(word)).find((at) => at >= 0);
  if (found === undefined) return "";
  const start = found < 60 ? 0 : text.lastIndexOf(" ", found - 60) + 1;
  const end = text.indexOf(" ", start + 200);
  return (start ? "… " : "") + text.slice(start, end < 0 ? undefined : end) + (end < 0 ? "" : " …");
}

function addExcerpt(item) {
  const [page, anchor] = item.querySelector("a").getAttribute("href").split("#");
  const texts = EXCERPTS[page.replace(/\.html$/, "")] ?? {};
  const text = excerpt(texts[anchor ?? ""] ?? texts[""] ?? "");
  if (!text) return;
  const place = item.appendChild(document.createElement("p"));
  place.className = "excerpt";
  place.textContent = text;
}

document.addEventListener("DOMContentLoaded", () => {
  const results = document.getElementById("search-results");
  if (!results || !QUERY) return;
  results.querySelectorAll("li").forEach(addExcerpt);
  new MutationObserver((changes) => {
    const added = changes.flatMap((change) => [...change.addedNodes]);
    added.filter((node) => node.nodeName === "LI").forEach(addExcerpt);
  }).observe(results, { childList: true, subtree: true });
});
