"""The README is short and right about the code: its links lead to files, and its counts of lines to five percent."""

import re
from pathlib import Path

import pytest

from experiments.count_lines import CORE, count

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short_and_its_tree_is_there():
    tree = re.search(r"^```\ndsv3_jax/\n((?:.*\n)+?)```", README, re.MULTILINE)
    assert tree and README.count("\n") <= 200
    within = [name for line in tree[1].splitlines() if line[0] == " " for name in line.strip().split("  ")[0].split()]
    above = [name for line in tree[1].splitlines() if line[0] != " " for name in line.split("  ")[0].split()]
    assert len(within) > 10 and above
    assert [name for name in within if not (ROOT / "dsv3_jax" / name).exists()] == []
    assert [name for name in above if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "docs", "experiments", "notebooks"])
def test_links_lead_to_files(page):
    pages = [ROOT / page] if page.endswith(".md") else (ROOT / page).rglob("*.md")
    targets = [
        (path, target)
        for path in pages
        if not {"generated", "_build"} & set(path.parts)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        if "generated/" not in target
    ]
    assert targets and [(str(path), target) for path, target in targets if not (path.parent / target).exists()] == []


def test_the_counts_of_lines():
    core = re.search(r"about ([\d,]+) lines of\s+code in (\d+)\s+files, or ([\d,]+) with", README)
    whole = re.search(r"whole package has about ([\d,]+)", README)
    assert core and whole
    counts = count()
    files, code, lines = (sum(counts[name][i] for name in CORE) for i in range(3))
    said = [int(text.replace(",", "")) for text in (core[1], core[2], core[3], whole[1])]
    assert said == pytest.approx([code, files, lines, sum(code for _, code, _ in counts.values())], rel=0.05)


@pytest.mark.parametrize("page", ["AGENTS.md", "CONTRIBUTING.md"])
def test_what_contributors_read_names_files_and_targets_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:dsv3_jax|docs|tests|experiments)/[\w/.]*)`", text)
    targets = re.findall(r"^make ([\w-]+)", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [path for path in paths if not (ROOT / path).exists()] == [] and len(text.splitlines()) <= 64
    assert targets and [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
