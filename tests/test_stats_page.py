"""The page of `dsv3 stats`: one file, every name escaped, and small for V3's shape."""

import json
import re
import time
from collections import defaultdict
from html.parser import HTMLParser

import numpy as np
import pytest
from routing_reports import HOSTILE, hostile, made_up, version_three

from dsv3_jax.report.run_plots import load_finding
from dsv3_jax.stats import findings
from dsv3_jax.stats.packing import pack, pack_ids, unpack, unpack_ids
from dsv3_jax.stats.page import SCRIPTS, WEB, render_page

OPTIONAL = (
    "header", "bias", "information", "worth", "transitions", "repeats", "saturation", "groups", "devices", "heads",
    "against", "texts", "over_time", "coactivation_lift",
)  # fmt: skip


class Reader(HTMLParser):
    """Ids, links and text of a page; each element that opens must close."""

    VOID = {"meta", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.addresses, self.texts, self.tags = [], [], [], defaultdict(list), set()
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attributes), attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, text):
        self.texts[self.open[-1] if self.open else ""].append(text)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([a-z-]+)">', page)


def test_packed_numbers_come_back(rng):
    values = rng.normal(size=(3, 4))
    values[1, 2] = np.nan
    for bits in (8, 16, 32):
        step = np.ptp(values[np.isfinite(values)]) / (2**bits - 2)
        np.testing.assert_allclose(unpack(pack(values, bits)), values, atol=step * 0.5001)
    for largest in (3, 255, 256, 70_000):
        ids = np.array([[0, largest], [1, 2]])
        np.testing.assert_array_equal(unpack_ids(pack_ids(ids)), ids)
    assert np.isnan(unpack(pack([None, None]))).all() and unpack(pack([2.0, 2.0])).tolist() == [2.0, 2.0]


def test_the_page_needs_no_other_file():
    page = render_page(made_up())
    reader = Reader(page)
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(address.startswith("#") for address in reader.addresses)
    assert {address[1:] for address in reader.addresses} == set(sections(page))
    assert reader.tags.isdisjoint({"img", "link", "iframe", "form", "base"})
    assert "://" not in page and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page and "'unsafe-inline'; script-src 'sha256-" in page
    for name in SCRIPTS:  # text goes into the page as text alone
        script = (WEB / name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|</", script), name
    assert {path.name for path in WEB.iterdir()} == {*SCRIPTS, "page.html", "page.css"}


def test_the_page_holds_the_numbers():
    numbers = made_up()
    data = data_of(render_page(numbers))
    load = np.array([numbers["load"], *numbers["load_by_domain"].values()], np.float64)
    np.testing.assert_allclose(unpack(data["load"]), load / load.mean(-1, keepdims=True), atol=1e-4)
    np.testing.assert_allclose(unpack(data["bias"]["value"]), numbers["bias"]["value"], atol=1e-5)
    worth = numbers["worth"]
    without = np.array(worth["without"], np.float64)
    np.testing.assert_allclose(unpack(data["worth"]["delta"]), without - worth["loss"], atol=1e-6)
    text = numbers["texts"][1]
    experts, gates = unpack_ids(data["texts"][1]["experts"]), unpack(data["texts"][1]["gates"])
    assert experts[:, :-1].tolist() == [of_layer[:-1] for of_layer in text["experts"]]
    assert np.isnan(gates[3, -1]).all()  # a head has no choice there
    np.testing.assert_allclose(gates[:3], text["gates"][:3], atol=2.1e-3)  # 8 bits
    starts, favourites = unpack_ids(data["favourites"]["starts"]), numbers["favourites"]
    cell = 2 * 16 + 5
    rows = slice(starts[cell], starts[cell + 1])
    of_expert = [data["favourites"]["texts"][i] for i in unpack_ids(data["favourites"]["text"])[rows]]
    assert of_expert == [row["text"] for row in favourites[2][5]]
    assert unpack_ids(data["favourites"]["count"])[rows].tolist() == [row["count"] for row in favourites[2][5]]
    match = np.array(numbers["against"]["match"])
    other = np.array(numbers["against"]["load"], np.float64)
    other = np.take_along_axis(other / other.mean(-1, keepdims=True), match, axis=1)
    np.testing.assert_allclose(unpack(data["against"]["difference"]), unpack(data["load"])[0] - other, atol=2e-4)


def test_absent_parts_leave_no_hole():
    """An old report has none of the newer parts; one domain has no domains to compare."""
    full = sections(render_page(made_up()))
    assert len(full) == 16
    numbers = made_up(texts=0)
    for key in OPTIONAL:
        del numbers[key]
    assert sections(render_page(numbers)) == ["load", "information", "domains", "entropy", "layers", "experts"]
    assert sections(render_page(numbers | dict.fromkeys(OPTIONAL))) == sections(render_page(numbers))
    for key in OPTIONAL:
        numbers = made_up()
        numbers[key] = None
        assert "None" not in "".join(Reader(render_page(numbers)).texts["p"]), key
    one = made_up(domains=("text",), bias=False, worth=False, against=False, heads=0)
    one["information"] = one["specialisation"] = None
    page = render_page(one)
    assert not {"domains", "information", "bias", "worth", "against", "heads"} & set(sections(page))
    assert data_of(page)["domains"] == []


def test_another_run_of_another_shape():
    """Its layers are found by name; without a match, its MaxVio and its loss are still shown."""
    numbers = made_up()
    other = numbers["against"]
    other |= {"layers": ["layer 3", "layer 1"], "load": [other["load"][2], other["load"][0]], "max_vio": [0.7, 0.5]}
    other["match"][1] = other["match"][3] = [None] * 16
    other["shared"][1] = other["shared"][3] = None
    against = data_of(render_page(numbers))["against"]
    np.testing.assert_allclose(unpack(against["max_vio"]), [0.5, np.nan, 0.7, np.nan])
    difference, match = unpack(against["difference"]), unpack_ids(against["match"])
    assert (match[1] == 16).all() and np.isnan(difference[[1, 3]]).all()
    load, theirs = np.array(numbers["load"][2], np.float64), np.array(other["load"][0], np.float64)
    np.testing.assert_allclose(difference[2], load / load.mean() - (theirs / theirs.mean())[match[2]], atol=1e-4)
    other |= {"match": None, "shared": None, "by_chance": None, "load": [[1, 2]], "note": "2 experts there"}
    page = render_page(numbers)
    assert "against" in sections(page) and "difference" not in data_of(page)["against"]
    assert "The experts of other (step 400) are not matched. The loss is 3.456 here and 3.400 there." in page


def test_pairs_and_partners_of_a_large_model():
    numbers = made_up(full=False)
    data = data_of(render_page(numbers))
    assert data["transitions"]["top"] == numbers["transitions"]["top"]
    partners, lifts = unpack_ids(data["partners"]["expert"]), unpack(data["partners"]["lift"])
    assert [[i, pytest.approx(x, abs=1e-3)] for i, x in zip(partners[1, 5], lifts[1, 5], strict=True)] == numbers[
        "partners"
    ][1][5]
    top = data["together"]["top"][1]
    found = {tuple(sorted((e, i))): x for e, rows in enumerate(numbers["partners"][1]) for i, x in rows}
    assert [x for *_, x in top] == sorted(found.values(), reverse=True)[:64]
    assert all(found[i, j] == x for i, j, x in top)


def test_a_layer_without_load_and_numbers_that_are_missing():
    numbers = made_up()
    numbers["load"][1] = [0] * 16
    numbers["load_by_domain"] = {
        name: [rows[0], [0] * 16, *rows[2:]] for name, rows in numbers["load_by_domain"].items()
    }
    numbers["max_vio"][1] = numbers["gate_entropy"][1] = numbers["information"]["token"][1] = None
    numbers["worth"]["without"][1] = [None] * 16
    numbers["coactivation_lift"][1] = [[None] * 16] * 16
    data = data_of(render_page(numbers))
    assert np.isnan(unpack(data["load"])[:, 1]).all() and np.isnan(unpack(data["max_vio"])[:, 1]).all()
    assert not np.isnan(unpack(data["load"])[:, 0]).any()


def test_text_never_becomes_markup():
    page = render_page(hostile(made_up()))
    reader = Reader(page)
    assert "<b" not in page.replace("<body", "").replace("<button", "") and page.count("</script>") == 2
    assert reader.texts["h1"] == [f"Where tokens go: {HOSTILE}, step 400"]
    data = data_of(page)
    assert data["domains"][0] == data["texts"][0]["tokens"][0] == HOSTILE and HOSTILE in data["favourites"]["texts"]


def test_lists_and_texts_are_cut_to_their_budgets(monkeypatch):
    monkeypatch.setattr("dsv3_jax.stats.page_data.FAVOURITES", 4 * 64)
    monkeypatch.setattr("dsv3_jax.stats.page_data.CONTEXT_BYTES", 4_000)
    monkeypatch.setattr("dsv3_jax.stats.page_data.TEXT_SLOTS", 4 * 4 * 100)
    monkeypatch.setattr("dsv3_jax.stats.page_data.LEAST_TEXT", 40)
    monkeypatch.setattr("dsv3_jax.stats.page_data.HISTORY_CELLS", 2 * 64)
    monkeypatch.setattr("dsv3_jax.stats.page_data.MATRIX_CELLS", 1)
    numbers = made_up()
    data = data_of(render_page(numbers))
    assert unpack_ids(data["favourites"]["starts"])[-1] == 4 * 64
    rows = data["contexts"]["rows"]
    assert len(rows) == 64 and all(len(before) <= 24 and len(after) <= 10 for before, _, after in rows)
    assert [(len(text["tokens"]), text["total"]) for text in data["texts"]] == [(50, 64), (50, 64)]
    assert data["bias"]["history"]["steps"] == [100, 400]
    lift = np.array(numbers["transitions"]["lift"][1], np.float64)
    assert data["transitions"]["top"][1][0][2] == round(lift.max(), 3) and len(data["together"]["top"]) == 4
    pairs = [tuple(row[:2]) for row in data["together"]["top"][0]]
    assert len(set(pairs)) == len(pairs) and all(i < j for i, j in pairs)  # each pair once


@pytest.mark.long
def test_version_three_fits():
    numbers = version_three(
        domains=tuple(f"domain {i}" for i in range(24)), words=tuple(f"␣word{i}" for i in range(5000))
    )
    start = time.process_time()
    page = render_page(numbers)
    assert time.process_time() - start < 10
    assert len(page.encode()) < 5_000_000


def test_findings_of_what_is_missing():
    nan = float("nan")
    assert load_finding([[0, 0]], ["layer 3"]) == "No token was counted."
    assert findings.information(None, 0.2, None) == "The domain tells 0.20 bits about the expert."
    assert "not more than chance" in findings.information([1.0], [0.2], [0.01], [-0.02])
    assert findings.worth(2.0, [[nan]], None, None, [[1]], ["layer 3"]) == "No expert was taken out."
    assert findings.path(None, []).startswith("No path") and findings.pair(None, []).startswith(
        "A token has one expert"
    )
    assert findings.saturation([400], [[1.0]], ["layer 3"]).startswith("One checkpoint")
    assert np.isnan(findings.rank_correlation([1, 1, 1], [1, 2, 3]))
