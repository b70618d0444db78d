"""The README is short and right about the code: its links lead to files."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short_and_its_tree_is_there():
    tree = re.search(r"^```\ndsv3_jax/\n((?:.*\n)+?)```", README, re.MULTILINE)
    assert tree and README.count("\n") <= 200
    within = [
        name
        for line in tree[1].splitlines()
        if line[0] == " "
        for name in line.strip().split("  ")[0].split()
    ]
    above = [
        name
        for line in tree[1].splitlines()
        if line[0] != " "
        for name in line.split("  ")[0].split()
    ]
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
        for target in re.findall(
            r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")
        )
        if "generated/" not in target
    ]
    assert targets
    assert [
        (str(path), target) for path, target in targets if not (path.parent / target).exists()
    ] == []


@pytest.mark.parametrize("page", ["AGENTS.md", "CONTRIBUTING.md"])
def test_what_contributors_read_names_files_and_commands_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 65
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    words = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    named = re.findall(r"`([\w./]*/[\w./]*|\w+\.(?:py|md|toml|txt|json))`", text)
    named += [
        word for line in words for word in line if "/" in word and not word.startswith(".venv")
    ]
    # a table's row names a file beside the first
    folders = (ROOT, ROOT / "dsv3_jax", *(ROOT / "dsv3_jax").iterdir())
    assert words and named
    assert [name for name in named if not any((folder / name).exists() for folder in folders)] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line[1] for line in words if line[0] == "make"] + re.findall(r"`make ([\w-]+)", text)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    modules = [line[line.index("-m") + 1] for line in words if "-m" in line]
    assert [module for module in modules if not importlib.util.find_spec(module)] == []
    for name, path in re.findall(r"`([A-Z_]+)` in `([\w/.]+)`", text):
        code = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^{name}\b", code, re.MULTILINE), name
