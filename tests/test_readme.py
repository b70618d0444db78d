"""The README is right about the code: its files exist, and its counts of lines are right to five percent."""

import re
from pathlib import Path

import pytest

from experiments.count_lines import CORE, count

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = re.search(r"^dsv3_jax/\n((?:  .*\n)+)", README, re.MULTILINE)


def test_every_file_of_the_tree_is_there():
    assert TREE
    folder, missing, seen = "", [], 0
    for line in TREE[1].splitlines():
        if found := re.match(r"  (\w+)/ ", line):
            folder = found[1]
        for name in re.findall(r"\w+\.py\b", line):
            seen += 1
            within = ROOT / "dsv3_jax" / folder
            if not (within / name).is_file() and not list(within.glob(f"*/{name}")):
                missing.append(f"{folder}/{name}")
    assert not missing and seen > 50


def test_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


def test_the_counts_of_lines():
    core = re.search(r"about ([\d,]+) lines of\s+code in (\d+)\s+files, or ([\d,]+) with", README)
    whole = re.search(r"whole package has about ([\d,]+)", README)
    assert core and whole
    counts = count()
    files, code, lines = (sum(counts[name][i] for name in CORE) for i in range(3))
    said = [int(text.replace(",", "")) for text in (core[1], core[2], core[3], whole[1])]
    assert said == pytest.approx([code, files, lines, sum(code for _, code, _ in counts.values())], rel=0.05)
