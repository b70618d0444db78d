"""The page of `dsv3 stats`: one file, every name escaped, and small for V3's shape."""

import json
import re
from collections import defaultdict
from html.parser import HTMLParser

import pytest
from routing_reports import HOSTILE, hostile, made_up, version_three

from dsv3_jax.stats.page import SCRIPTS, SECTIONS, WEB, findings, render_page


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


@pytest.fixture(scope="module")
def numbers():
    return made_up()


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([a-z_]+)">', page)


def test_the_page_needs_no_other_file_and_holds_the_numbers(numbers):
    page = render_page(numbers)
    reader = Reader(page)
    assert len(set(reader.ids)) == len(reader.ids)
    assert {address.removeprefix("#") for address in reader.addresses} == set(sections(page))
    assert reader.tags.isdisjoint({"img", "link", "iframe", "form", "base"})
    assert "://" not in page and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page and "'unsafe-inline'; script-src 'sha256-" in page
    for name in SCRIPTS:  # text goes into the page as text alone
        script = (WEB / name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|</", script), name
    assert {path.name for path in WEB.iterdir()} == {*SCRIPTS, "page.html", "page.css"}
    data = data_of(page)
    del data["colours"]
    assert data == json.loads(json.dumps(numbers))


def test_a_part_is_shown_where_the_numbers_have_it(numbers):
    assert sections(render_page(numbers)) == [key for key, *_ in SECTIONS]
    bare = made_up(heads=0, domains=("text",), experts_per_token=1, measured=False)
    page = render_page(bare)
    assert sections(page) == ["load", "texts", "information", "transitions", "repeats", "gate_entropy", "layers",
                              "favourites"]  # fmt: skip
    assert "None" not in "".join(Reader(page).texts["p"]) and findings(bare).keys() == {"load", "information"}
    unmatched = numbers | {"against": numbers["against"] | dict.fromkeys(("match", "shared", "by_chance"))}
    sentence = "The experts of other, step 300 are not matched. Bits a byte: 2.100 here, 2.000 there."
    assert findings(unmatched)["against"] == sentence


def test_text_never_becomes_markup(numbers):
    page = render_page(hostile(numbers))
    reader = Reader(page)
    assert "<b" not in page.replace("<body", "").replace("<button", "") and page.count("</script>") == 2
    assert reader.texts["h1"] == [f"Where tokens go: {HOSTILE}, step 400"]
    data = data_of(page)
    assert data["domains"][0] == data["texts"][0]["tokens"][0] == data["favourites"][0][0][0][1] == HOSTILE


@pytest.mark.long
def test_version_three_fits():
    """59 layers of 256 experts: no table of E² pairs, every list is there, and a page below 5 MB."""
    numbers = version_three(domains=24)
    assert len(render_page(numbers).encode()) < 5_000_000
    assert numbers["coactivation"] is None and numbers["transitions"]["lift"] is None
    assert len(numbers["transitions"]["top"]) == 58 and len(numbers["domains"]) == 7
    for key in ("favourites", "contexts", "partners"):
        assert sum(len(rows) > 0 for layer in numbers[key] for rows in layer) > 0.99 * 59 * 256
    assert len(numbers["texts"]) >= 2 and len(numbers["over_time"]["steps"]) == 40
