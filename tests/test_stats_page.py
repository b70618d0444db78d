"""The page of `dsv3 stats`: one file, every name escaped, and small for V3's shape."""

import json
import re

import pytest
from markupsafe import escape
from routing_reports import HOSTILE, hostile, made_up, version_three

from dsv3_jax.stats.page import SCRIPTS, WEB, render_page


@pytest.fixture(scope="module")
def numbers():
    return made_up()


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([a-z_]+)">', page)


def test_the_page_needs_no_other_file_and_holds_the_numbers(numbers):
    page = render_page(numbers)
    ids, links = re.findall(r' id="([^"]*)"', page), re.findall(r'(?:src|href|action)="([^"]*)"', page)
    assert len(set(ids)) == len(ids) and {link.removeprefix("#") for link in links} == set(sections(page))
    assert not re.search(r"<(img|link|iframe|form|base|object)\b| on[a-z]+=", page)
    assert "://" not in page and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page and "'unsafe-inline'; script-src 'sha256-" in page
    scripts = "".join((WEB / name).read_text() for name in SCRIPTS)  # text goes into the page as text alone
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|</", scripts)
    data = data_of(page)
    del data["colours"]
    assert data == json.loads(json.dumps(numbers))


def test_text_never_becomes_markup(numbers):
    page = render_page(hostile(numbers))
    assert "<b" not in page.replace("<body", "").replace("<button", "") and page.count("</script>") == 2
    assert f"<h1>Where tokens go: {escape(HOSTILE)}, step 400</h1>" in page
    data = data_of(page)
    assert data["domains"][0] == data["texts"][0]["tokens"][0] == data["favourites"][0][0][0][1] == HOSTILE


@pytest.mark.long
def test_version_three_fits():
    """59 layers of 256 experts: no table of E² pairs, every list is there, and a page below 5 MB."""
    numbers = version_three()
    assert len(render_page(numbers).encode()) < 5_000_000
    assert numbers["coactivation"] is None and numbers["transitions"]["lift"] is None
    assert len(numbers["transitions"]["top"]) == 58 and len(numbers["domains"]) == 7
    for key in ("favourites", "contexts", "partners"):
        assert sum(len(rows) > 0 for layer in numbers[key] for rows in layer) > 0.99 * 59 * 256
    assert len(numbers["texts"]) >= 2 and len(numbers["over_time"]["steps"]) == 40
