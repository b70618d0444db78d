"""The page of `dsv3 stats` in a headless Chromium: clicks, keys, search, sorting, addresses, themes, widths, names."""

import re

import numpy as np
import pytest
from browser import Browser, needs_browser
from routing_reports import HOSTILE, hostile, made_up, version_three

from dsv3_jax.stats.page import render_page

pytestmark = [needs_browser, pytest.mark.long]


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of three shapes, and one with hostile names."""
    folder, made = tmp_path_factory.mktemp("pages"), {}
    one = made_up(domains=("text",), bias=False, worth=False, against=False, heads=0, texts=0)
    shapes = {
        "tiny": made_up(),
        "one": one | {"information": None},
        "v3": version_three(),
        "hostile": hostile(made_up()),
    }
    for name, numbers in shapes.items():
        made[name] = folder / f"{name}.html"
        made[name].write_text(render_page(numbers), encoding="utf-8")
    return made


def quiet(browser, page) -> None:
    """No error, no warning, no request but the page's own."""
    assert browser.errors == []
    assert {request.split("#")[0] for request in browser.requests} <= {page.absolute().as_uri()}


def sideways(browser) -> list[str]:
    """Elements that make the page wider than its window."""
    return browser.run(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth ? [] : "
        "[...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && "
        "!e.closest('.scroll')).map(e => e.tagName + '.' + e.className)"
    )


@pytest.mark.parametrize("shape", ["tiny", "one", "v3", "hostile"])
@pytest.mark.parametrize("width", [1280, 360])
def test_every_shape_opens(browser, pages, shape, width):
    browser.open(pages[shape], width=width, dark=width == 360)
    assert sideways(browser) == []
    charts = (
        "[...document.querySelectorAll('main section:not([hidden])')]"
        ".filter(s => !s.querySelector('canvas, svg, table, .tokens')).map(s => s.id)"
    )
    assert browser.run(charts) == []  # a part without content would be a hole
    browser.run("document.querySelector('#all-experts tbody button').click()")
    browser.settle()
    assert sideways(browser) == [] and not browser.run("document.getElementById('panel').hidden")
    assert browser.run("document.querySelectorAll('body b[onclick]').length") == 0
    quiet(browser, pages[shape])


def test_a_click_opens_an_expert_and_its_address_opens_it_again(browser, pages):
    browser.open(pages["tiny"])
    first = browser.run("document.querySelector('#load-charts .map canvas:last-child').getBoundingClientRect().width")
    browser.click("#load-charts .map canvas:last-child", x=(first - 62) / 16 * 5.5, y=34 + 26 * 2.5)
    assert browser.run("document.querySelector('#panel h2').textContent") == "layer 3, expert 5"
    assert browser.run("location.hash") == "#layer=3&expert=5"
    assert browser.run("document.getElementById('layer-name').textContent") == "layer 3"
    framed = browser.run("document.querySelectorAll('.tokens span.own').length")
    numbers = made_up()
    assert framed == sum(5 in chosen for chosen in numbers["texts"][0]["experts"][2])
    assert browser.run("document.querySelector('#panel .text').textContent") == numbers["favourites"][2][5][0]["text"]
    browser.send("Page.reload")
    browser.settle()
    browser.wait_for("document.readyState === 'complete' && !document.getElementById('panel').hidden")
    assert browser.run("document.querySelector('#panel h2').textContent") == "layer 3, expert 5"
    browser.click("#panel-after")
    assert browser.run("location.hash") == "#layer=3&expert=6"
    browser.click("#panel-down")
    assert browser.run("document.querySelector('#panel h2').textContent") == "MTP 1, expert 6"
    browser.press("Escape")
    assert browser.run("document.getElementById('panel').hidden") and browser.run("location.hash") == "#layer=MTP1"
    browser.open(pages["tiny"], "#layer=99&expert=-3&text=x")  # no such layer
    assert browser.run("document.getElementById('panel').hidden")
    browser.open(pages["tiny"], "#layer=2&expert=99")  # no such expert
    assert browser.run("document.getElementById('panel').hidden")
    quiet(browser, pages["tiny"])


def test_the_slider_and_the_texts(browser, pages):
    numbers = made_up()
    browser.open(pages["tiny"])
    notes = "document.querySelector('#texts-charts .chart > .dim').textContent"
    assert browser.run(notes) == "Colours: first expert in layer 1."
    firsts = "[...document.querySelectorAll('.tokens sub')].map(e => +e.textContent)"
    assert browser.run(firsts) == [chosen[0] for chosen in numbers["texts"][0]["experts"][0]]
    browser.run("document.getElementById('layer').focus()")
    browser.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", windowsVirtualKeyCode=39)
    browser.send("Input.dispatchKeyEvent", type="keyUp", key="ArrowRight", windowsVirtualKeyCode=39)
    browser.settle()
    assert browser.run("document.getElementById('layer-name').textContent") == "layer 2"
    assert browser.run(firsts) == [chosen[0] for chosen in numbers["texts"][0]["experts"][1]]
    browser.run(
        "[...document.querySelectorAll('#texts-charts button')].find(b => b.textContent.startsWith('next')).click()"
    )
    browser.settle()
    assert browser.run(firsts) == [chosen[0] for chosen in numbers["texts"][1]["experts"][1]]
    browser.run("document.querySelector('.tokens').focus()")
    browser.press("ArrowRight", "ArrowRight")
    tip = browser.run("document.getElementById('tip').textContent")
    ids, gates = numbers["texts"][1]["experts"][1][1], numbers["texts"][1]["gates"][1][1]
    assert f"loss {numbers['texts'][1]['nll'][1]:.2f} nats" in tip and "layer 2" in tip
    assert [int(e) for e in re.findall(r"expert (\d+)", tip)] == ids
    np.testing.assert_allclose([float(g) for g in re.findall(r"gate ([\d.]+)", tip)], gates, atol=0.011)
    browser.press("Enter")
    assert browser.run("location.hash") == f"#layer=2&expert={ids[0]}&text=1"
    quiet(browser, pages["tiny"])


def test_search_and_the_sorted_table(browser, pages):
    numbers = made_up()
    browser.open(pages["tiny"])
    browser.run("const s = document.getElementById('search'); s.value = 'include'; s.dispatchEvent(new Event('input'))")
    found = browser.run(
        "[...document.querySelectorAll('#found tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    rows = [(row["bits"], numbers["layers"][layer], e) for layer, of_layer in enumerate(numbers["favourites"])
            for e, of_expert in enumerate(of_layer) for row in of_expert if "include" in row["text"]]  # fmt: skip
    assert len(found) == min(50, len(rows)) and all(cells[0] == "␣include" for cells in found)
    bits = [float(cells[5]) for cells in found]
    assert bits == sorted(bits, reverse=True) and abs(bits[0] - max(rows)[0]) < 2e-4
    browser.run("document.querySelector('#found tbody button').click()")
    assert browser.run("document.querySelector('#panel h2').textContent") == f"{found[0][1]}, {found[0][2]}"

    def column(name):
        place = browser.run(
            f"[...document.querySelectorAll('#all-experts th')].findIndex(h => h.textContent.startsWith({name!r}))"
        )
        browser.run(f"document.querySelectorAll('#all-experts th button')[{place}].click()")
        browser.settle()
        return browser.run(
            f"[...document.querySelectorAll('#all-experts tbody tr')].map(r => r.cells[{place}].textContent)"
        )

    loads = [float(x.removeprefix("× ")) for x in column("load")]
    assert loads == sorted(loads, reverse=True)
    ratio = np.array(numbers["load"]) / np.mean(numbers["load"], axis=-1, keepdims=True)
    assert loads[0] == round(ratio.max(), 2)
    assert browser.run("document.querySelector('th[aria-sort=descending]').textContent") == "load ▼"
    assert [float(x.removeprefix("× ")) for x in column("load")] == sorted(ratio.ravel().round(2))[:50]
    browser.run("const f = document.getElementById('filter'); f.value = 'mtp 1'; f.dispatchEvent(new Event('input'))")
    assert browser.run("document.querySelectorAll('#all-experts tbody tr').length") == 16
    quiet(browser, pages["tiny"])


def test_keys_reach_the_maps_and_the_charts(browser, pages):
    numbers = made_up()
    browser.open(pages["tiny"])
    browser.run("document.querySelector('#load-charts .map canvas:last-child').focus()")
    browser.press("ArrowRight", "ArrowRight", "ArrowDown")
    tip = "document.getElementById('tip').textContent"
    ratio = np.array(numbers["load"]) / np.mean(numbers["load"], axis=-1, keepdims=True)
    assert browser.run(tip).startswith(f"layer 2, expert 1\n× {ratio[1, 1]:.2f} mean load")
    browser.press("Enter")
    assert browser.run("location.hash") == "#layer=2&expert=1"
    browser.run("document.querySelector('#bias-charts svg[tabindex]').focus()")
    browser.press("ArrowRight")
    assert browser.run(tip).split("\n")[1:] == [
        f"without the bias: {numbers['bias']['max_vio_without'][0]:.2f}",
        f"with the bias: {numbers['bias']['max_vio'][0]:.2f}",
    ]
    for section in ("worth", "against"):
        browser.run(f"document.querySelector('#{section}-charts canvas[tabindex]').focus()")
        browser.press("ArrowRight")
        assert browser.run(tip).startswith("layer 2, expert 2\n"), section  # from the open expert one to the right
    match = numbers["against"]["match"]
    assert f"match: expert {match[1][2]} of other" in browser.run(tip)
    quiet(browser, pages["tiny"])


def test_light_and_dark(browser, pages):
    back = "getComputedStyle(document.body).backgroundColor"
    canvas = "document.querySelector('#load-charts .map canvas:last-child')"
    copy = "new OffscreenCanvas(9, 9).getContext('2d', {willReadFrequently: true})"
    pixel = f"(c => {{ c.drawImage({canvas}, -4, -40); return [...c.getImageData(0, 0, 1, 1).data].join(); }})({copy})"
    browser.open(pages["tiny"], dark=False)
    light = browser.run(back), browser.run(pixel)
    browser.click("#theme")
    dark = browser.run(back), browser.run(pixel)
    assert light[0] == "rgb(255, 255, 255)" and light[0] != dark[0] and light[1] != dark[1]
    browser.open(pages["tiny"], dark=True)
    assert (browser.run(back), browser.run(pixel)) == dark
    browser.click("#theme")
    assert (browser.run(back), browser.run(pixel)) == light
    browser.run("document.querySelector('[data-domain=\"2\"]').click()")
    browser.settle()
    assert browser.run("document.querySelector('[data-domain=\"2\"]').getAttribute('aria-pressed')") == "true"
    quiet(browser, pages["tiny"])


def test_hostile_names_stay_text(browser, pages):
    browser.open(pages["hostile"], "#layer=1&expert=0")
    assert browser.run("document.querySelector('h1').textContent") == f"Where tokens go: {HOSTILE}, step 400"
    assert browser.run("document.querySelector('.tokens span').firstChild.textContent") == HOSTILE
    assert HOSTILE in browser.run("document.getElementById('panel').textContent")
    browser.run("const s = document.getElementById('search'); s.value = '<b'; s.dispatchEvent(new Event('input'))")
    assert browser.run("document.querySelector('#found tbody td').textContent") == HOSTILE
    assert browser.run("document.querySelectorAll('b[onclick], script').length") == 2  # the page's own scripts
    quiet(browser, pages["hostile"])
