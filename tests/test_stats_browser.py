"""The page of `dsv3 stats` in headless Chromium: clicks, search, sorting, addresses, themes."""

from functools import cache

import numpy as np
import pytest
from browser import needs_browser
from routing_reports import hostile, made_up, version_three

from dsv3_jax.stats.page import render_page

pytestmark = [needs_browser, pytest.mark.long]

numbers = cache(made_up)
SHAPES = {
    "tiny": numbers,
    "one": lambda: (
        made_up(heads=0, domains=("text",), experts_per_token=1, measured=False) | {"texts": []}
    ),
    "v3": version_three,
    "hostile": lambda: hostile(numbers()),
}
MAP = "#load-charts .map canvas:last-child"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A function: the page of a shape, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("pages")

    @cache
    def page(name):
        path = folder / f"{name}.html"
        path.write_text(render_page(SHAPES[name]()), encoding="utf-8")
        return path

    return page


@pytest.fixture
def tiny(browser, pages):
    """The page of the tiny model, open; at the end: no error thrown, no other file asked for."""
    browser.open(pages("tiny"))
    yield browser
    quiet(browser, pages("tiny"))


def quiet(browser, page) -> None:
    assert browser.errors == []
    assert {request.split("#")[0] for request in browser.requests} <= {page.absolute().as_uri()}


def sideways(browser) -> list[str]:
    return browser.run(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth ? [] : "
        "[...document.body.querySelectorAll('*')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll'))"
        ".map(e => e.tagName + '.' + e.className)"
    )


# test_stats_report has the size of V3's page; "hostile" has the numbers of "tiny"
@pytest.mark.parametrize("shape", ["one", "hostile", pytest.param("v3", marks=pytest.mark.rare)])
@pytest.mark.parametrize("width", [1280, 360])
def test_every_shape_opens(browser, pages, shape, width):
    browser.open(pages(shape), width=width, dark=width == 360)
    assert sideways(browser) == []
    charts = (
        "[...document.querySelectorAll('main section:not([hidden])')]"
        ".filter(s => !s.querySelector('canvas, svg, table, .tokens')).map(s => s.id)"
    )
    assert browser.run(charts) == []  # a part without content would be a hole
    browser.run("document.querySelector('#all-experts tbody button').click()")
    browser.settle()
    assert sideways(browser) == [] and not browser.run("document.getElementById('panel').hidden")
    assert not browser.texts("body b[onclick]")
    quiet(browser, pages(shape))


def test_a_click_opens_an_expert_and_its_address_opens_it_again(tiny, pages):
    width = tiny.run(f"document.querySelector('{MAP}').getBoundingClientRect().width")
    tiny.click(MAP, x=(width - 62) / 16 * 5.5, y=34 + 26 * 2.5)
    assert tiny.text("#panel h2") == "layer 3, expert 5" and tiny.text("#layer-name") == "layer 3"
    assert tiny.run("location.hash") == "#layer=3&expert=5"
    framed = sum(5 in chosen for chosen in numbers()["texts"][0]["experts"][2])
    assert len(tiny.texts(".tokens span.own")) == framed
    assert tiny.text("#panel .text") == numbers()["favourites"][2][5][0][1]
    tiny.send("Page.reload")
    tiny.settle()
    tiny.wait_for("document.readyState === 'complete' && !document.getElementById('panel').hidden")
    assert tiny.text("#panel h2") == "layer 3, expert 5"
    tiny.click("#panel-after")
    assert tiny.run("location.hash") == "#layer=3&expert=6"
    tiny.click("#panel-down")
    assert tiny.text("#panel h2") == "MTP 1, expert 6"
    tiny.press("Escape")
    assert tiny.run("document.getElementById('panel').hidden")
    assert tiny.run("location.hash") == "#layer=MTP1"
    for nowhere in ("#layer=99&expert=-3&text=x", "#layer=2&expert=99"):
        tiny.open(pages("tiny"), nowhere)
        assert tiny.run("document.getElementById('panel').hidden")


def test_search_and_the_sorted_table(tiny):
    tiny.type("#search", "e")
    found = "[...document.querySelectorAll('#found tbody tr')]"
    found = tiny.run(f"{found}.map(r => [...r.cells].map(c => c.textContent))")
    rows = [row for layer in numbers()["favourites"] for expert in layer for row in expert]
    rows = [row for row in rows if row[1] == "e"]
    assert len(found) == min(50, len(rows)) > 5 and all(cells[0] == "e" for cells in found)
    bits = sorted((row[4] for row in rows), reverse=True)
    np.testing.assert_allclose([float(cells[5]) for cells in found], bits[:50], atol=6e-5)
    tiny.run("document.querySelector('#found tbody button').click()")
    assert tiny.text("#panel h2") == f"{found[0][1]}, {found[0][2]}"

    # By load, then by load the other way round.
    load = np.array(numbers()["load"])
    ratio = sorted((load / load.mean(-1, keepdims=True)).ravel().round(2))
    place = next(i for i, x in enumerate(tiny.texts("#all-experts th")) if x.startswith("load"))
    for wanted in (ratio[::-1], ratio):
        tiny.run(f"document.querySelectorAll('#all-experts th button')[{place}].click()")
        tiny.settle()
        loads = tiny.texts(f"#all-experts tbody tr td:nth-child({place + 1})")
        assert [float(x.removeprefix("× ")) for x in loads] == wanted[:50]
    tiny.type("#filter", "mtp 1")
    assert len(tiny.texts("#all-experts tbody tr")) == 16
