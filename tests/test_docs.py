"""Every command and Python block of the README and the site runs, with small steps."""

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import nbformat
import pytest
import tyro
from browser import needs_browser
from released import GRID, Cell, write_folder
from runs import MODEL, by_command, environment, flags, make_run, refused, write_lines, write_text
from texts import ANSWER, TEMPLATES, TEXTS, TOOLS, USER, write_text_files

import dsv3_jax as ds
from dsv3_jax import presets
from dsv3_jax.config.model import ATTENTION_KINDS
from dsv3_jax.model.blocks import ATTENTION
from dsv3_jax.ops import routing
from dsv3_jax.report import metrics_files, run_plots
from dsv3_jax.runs import start as starts
from dsv3_jax.scores.made import write_tasks
from experiments.cards import TASKS, read_cards, write_card

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
GUIDES = [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/guides/*.md"))]
PAGES = [ROOT / "README.md", *GUIDES]


class Parsed(BaseException):
    """The arguments were good."""


def blocks(page: Path, language: str) -> str:
    text = page.read_text(encoding="utf-8")
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))


def lines(page: Path) -> list[tuple[str, list[str]]]:
    text = blocks(page, "bash").replace("\\\n", " ")
    pairs = [(line, shlex.split(line, comments=True)) for line in text.splitlines()]
    return [pair for pair in pairs if pair[1]]


def commands(page: Path) -> list[list[str]]:
    return [words[1:] for _, words in lines(page) if words[0] == "dsv3"]


@pytest.mark.parametrize("page", [*filter(commands, PAGES)], ids=lambda page: page.stem)
def test_the_options_of_each_command_are_there(page, monkeypatch):
    parse = tyro.cli

    def stop(*args, **options):
        parse(*args, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", stop)
    monkeypatch.setattr(starts, "open_start", lambda start, out: start)  # no weights are read
    for name in ("on_trunk", "on_weights"):
        monkeypatch.setattr(starts, name, lambda run, start: run)
    refused = []
    for argv in commands(page):
        with contextlib.suppress(Parsed):
            refused.append((argv, by_command(*argv)))
    assert refused == []


# Lines that are not run, and why.
NOT_RUN = {
    "pip install": "it downloads packages; tests/try_wheel.py installs",
    ". .venv/bin/activate": "make has no environment here",
    "python experiments/accel/run.py": "experiments/accel/test_accel.py runs it",
    "dsv3 serve": "it runs until it is stopped; tests/test_serve_page.py",
    "lm_eval run": "it downloads tasks; test_serve_api.py asks as it does",
    "dsv3 train v3": "it needs 512 devices and more",
    "dsv3 train v2_lite": "it needs eight cards",
    "--target gpu": "it needs a GPU's compiler; tests/test_compiled.py has it",
    "tiny --start runs/demo --model.attention dsa": "no query latents; test_sparse_attention.py",
    "dsv3 train tiny --start runs/warm": "the same",
    "dsv3 info mini --check": "it computes at mini's sizes; tests/test_check.py has small ones",
}
LESS = {  # further words by command
    "generate": "--max-new-tokens 3",
    "chat": "--max-new-tokens 3",
    "eval": "--batches 1",
    "stats": "--batches 1 --draws 9 --worth-tokens 32",
    "tokenizer": "--force",
}
INSTEAD = {
    "tokenize PATHS": "tokenize notes/ --val-fraction 0.3", "--row-tokens 4096": "--row-tokens 16",
    "--vocab-size 8192": "--vocab-size 300", "--profile 10:13": "--profile 1:2",
    "--steps 40": "--steps 2",
    "--against runs/other:200": "--against runs/other:12",
    "plan v3 --mesh data=128,expert=16": "plan tiny --mesh data=2,expert=4",
    "--experts 32 --parts 4": "--experts 8 --parts 2",  # dense layers have ten hidden units
}  # fmt: skip
RELEASED = {  # cells of the parity grid by place
    "Moonlight-16B-A3B-Instruct": "Moonlight",
    "moonshotai/Moonlight-16B-A3B": "Moonlight",
    "DeepSeek-V3": "FP8 file",
    "DeepSeek-V3.1": "groups",
    "DeepSeek-V2-Lite": "V2-Lite, greedy",
    "deepseek-ai/DeepSeek-V2-Lite": "V2-Lite, greedy",
    "Kimi-K2": "Moonlight",
}


def shorter(argv: list[str]) -> list[str]:
    """The command with little to do: a small model on a page of text, two steps, mini as tiny."""
    text = shlex.join(argv)
    for words, other in INSTEAD.items():
        text = text.replace(words, other)
    argv = shlex.split(text)
    if argv[0] != "train":
        less = "" if "--tasks" in argv else LESS.get(argv[0], "")
        return argv + shlex.split(less)
    small = ["--steps", "2", "--eval-batches", "1", "--data.batch-size", "8"]
    small += ["--grpo.max-new-tokens", "3"] * (argv[1] == "grpo")
    if argv[1] not in ("sft", "grpo"):
        taken = ("--model.",) if {"--start", "--trunk"} & set(argv) else ()  # the other run's
        # kernels are not named with 8 bits
        taken += ("--execution.kernels",) if "--execution.precision" in argv else ()
        taken += ("--data.paths",) if "--data.paths" in argv else ()  # a list is given once
        options = re.split(r" (?=--)", " ".join(flags(make_run("notes/", steps=2))))
        small = " ".join(option for option in options if not option.startswith(taken)).split(" ")
        small += ["--data.batch-size", "8"] * ("--mesh" in argv)
        small += ["--model.vocab-size", "300"] * (argv[1] == "mini" and "--start" not in argv)
    return ["train", argv[1].replace("mini", "tiny"), *small, *argv[2:]]


@pytest.fixture(scope="module")
def place(whole, tmp_path_factory):
    """A folder with all that the pages name: texts, chats, runs and released folders."""
    folder = tmp_path_factory.mktemp("pages")
    write_text(folder / "notes")
    (folder / "src").mkdir()
    (folder / "src" / "a.py").write_text("x = 2\n" * 30)
    (folder / "corpus.jsonl").write_text(json.dumps({"text": "a text of its own"}) + "\n")
    chats = [{"messages": [USER, {**ANSWER, "content": f"the end {i}"}]} for i in range(9)]
    tasks = [{"prompt": f"{i}+1=", "answer": f"{i + 1}"} for i in range(9)]
    for name, records in {"chats": chats, "tasks": tasks, "prompts": tasks}.items():
        write_lines(folder / f"{name}.jsonl", records)
    guide = (ROOT / "docs" / "guides" / "chat.md").read_text()
    (reward,) = re.findall(r"```python\n(def reward.*?)```", guide, re.DOTALL)
    (folder / "judge.py").write_text(reward)
    for name in ("demo", "other"):
        shutil.copytree(whole.folder, folder / "runs" / name)
    write_tasks(folder / "runs" / "demo" / "tasks", [Path(__file__).read_text()], rows=8)
    for name, cell in RELEASED.items():
        write_folder(folder / name, Cell(cell, GRID[cell].config | {"vocab_size": 384}))
        write_text_files(folder / name, TEXTS["V3"])
    for name, template in (("DeepSeek-V3.1", "r1"), ("Kimi-K2", "kimi")):
        shutil.copy(TEMPLATES / f"{template}.jinja", folder / name / "chat_template.jinja")
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = "mine.json --vocab-size 300 --paths notes/"
        assert by_command("tokenizer", *words.split())[0] == 0
        ds.train.fit(make_run("notes/", steps=2), "runs/first", quiet=True)
    return folder


IN_CI = ("README",)  # the others compile for minutes


def marked(page: Path):
    mark = pytest.mark.long if page.stem in IN_CI else pytest.mark.rare
    return pytest.param(page, id=page.stem, marks=mark)


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if lines(page)])
def test_each_command_runs_or_is_named_with_a_reason(page, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delitem(sys.modules, "judge", raising=False)  # another test's
    shutil.rmtree("released", ignore_errors=True)  # of another page
    failed = []
    # chats come last: they may be of a later run
    for line, argv in sorted(lines(page), key=lambda pair: "dsv3 chat" in pair[0]):
        if argv[0] == "make":
            assert re.search(rf"^{argv[1]}:", MAKEFILE, re.MULTILINE)
        elif argv[0] == "dsv3" and not any(words in line for words in NOT_RUN):
            code, _, err = by_command(*shorter(argv[1:]), lines="hello\n/exit\n")
            if code != 0:
                failed.append((line, err))
        else:
            assert any(words in line for words in NOT_RUN), line
    assert failed == []


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if blocks(page, "python")])
def test_python_runs(page, place, monkeypatch):
    monkeypatch.chdir(place)
    own = {name: presets.recipe(name) for name in presets.NEEDS_START}
    monkeypatch.setattr(ds, "recipe", lambda name: own.get(name) or make_run("notes/"))
    small = {"tiny": MODEL}
    monkeypatch.setattr(ds, "preset", lambda name: small.get(name) or presets.preset(name))
    registered = {"by_position": [routing.ROUTERS], "summed": [ATTENTION_KINDS, ATTENTION]}
    for name, tables in registered.items():
        for table in tables:
            monkeypatch.setitem(table, name, None)  # leaves the table with the test
            del table[name]
    names = {"ds": ds, "cfg": MODEL, "messages": [USER, ANSWER]}
    names |= {"tokens": jnp.ones((1, 8), jnp.int32), "prompts": [[1, 2]]}
    names |= {"wandb": SimpleNamespace(log=lambda *_, step: None)}
    names |= {"model": ds.load_model("runs/first"), "tokenizer": ds.tokenizer.load("bytes")}
    text = re.sub(r"\bsteps=\d+", "steps=2", blocks(page, "python"))
    exec(re.sub(r", (20|100|200)\b(?=[,)])", ", 3", text), names)


def test_a_card_holds_what_was_measured_and_the_site_says_what_has_not_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import generate

    made = {"device": "NVIDIA H100 80GB HBM3", "command": "run.py", "versions": {"jax": "1"}}
    card = partial(write_card, tmp_path, "mini", **made)
    card(task="speed", figures={"MFU": 0.25})
    card(task="speed", figures={"MFU": 0.5, "step, s": 2.0})  # in the place of the first
    with refused("'MFU': nan"):
        card(task="speed", figures={"MFU": float("nan")})
    page = generate.cards(read_cards(tmp_path))
    for line in ("| speed | not run | 1 | not run |", "| mini | 0.5 |", "## TPU\n\nNot run."):
        assert line in page
    assert {card["task"] for card in read_cards()} <= TASKS.keys()


def formulas(source: Path) -> list[str]:
    """The formulas of a page: what stands between dollars, outside of code."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return re.findall(r"\$\$.+?\$\$|\$[^$]+\$", prose, re.DOTALL)


SOURCES = [
    *GUIDES,
    *sorted(ROOT.glob("notebooks/*.ipynb")),
    *sorted(ROOT.glob("experiments/**/*.md")),
]
WITH_FORMULAS = [source for source in SOURCES if formulas(source)]


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    """The site's pages with formulas, built with the site's own settings."""
    try:
        distribution("sphinx-mathjax-offline")
    except PackageNotFoundError:
        pytest.skip("the packages of `make docs` are not installed")
    names = [source.relative_to(ROOT).as_posix() for source in WITH_FORMULAS]
    folder = tmp_path_factory.mktemp("site")
    root_doc = Path(names[0]).with_suffix("")
    only = ("-D", f"include_patterns={','.join(names)}", "-D", f"root_doc={root_doc}")
    sphinx = (sys.executable, "-m", "sphinx", "-Q", "-b", "html", "-c", "docs")
    command = (*sphinx, *only, ".", str(folder))
    done = subprocess.run(command, cwd=ROOT, env=environment(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def assert_alone(browser):
    """Nothing failed on the page, and it asked for nothing outside the site."""
    assert browser.errors == []
    assert {request[:8] for request in browser.requests} == {"file:///"}


@needs_browser
@pytest.mark.long
def test_each_formula_of_the_sources_is_drawn(site, browser):
    assert len(WITH_FORMULAS) > 4
    for source in WITH_FORMULAS:
        browser.open(site / source.relative_to(ROOT).with_suffix(".html"), width=360)
        drawn = "document.querySelectorAll('.math > mjx-container > svg').length"
        browser.wait_for(f"{drawn} === {len(formulas(source))}")
        assert browser.texts("svg [data-mml-node=merror]") == []
        # a long formula scrolls in its own box
        assert browser.run("document.documentElement.scrollWidth") == 360
        others = "document.querySelectorAll('pre, code, script, mjx-container')"
        browser.run(f"{others}.forEach(e => e.remove())")
        assert not re.findall(r"\$.*\$|\\[a-zA-Z({\[]+", browser.text("article"))
        assert_alone(browser)


@needs_browser
@pytest.mark.long
def test_a_search_shows_where_each_page_has_the_word(site, browser):
    browser.open(site / "search.html", "?q=tokens")
    browser.wait_for("document.querySelectorAll('#search-results .excerpt').length > 1")
    assert all("tokens" in text.lower() for text in browser.texts("#search-results .excerpt"))
    assert_alone(browser)


def test_the_glossary_has_every_metric_of_a_run():
    drawn = {key for _, _, curves in run_plots.PANELS for key, *_ in curves}
    of_files = (metrics_files._AXES, metrics_files._OBJECTS, metrics_files._TEXTS)
    metrics = drawn.union(run_plots.NOT_DRAWN, *of_files)
    glossary = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    assert {name for name in metrics - {"step"} if f"`{name}`" not in glossary} == set()


# links, files and commands that pages name


def test_the_readme_is_short_and_its_tree_is_there():
    tree = re.search(r"^```\ndsv3_jax/\n((?:.*\n)+?)```", README, re.MULTILINE)
    assert tree and README.count("\n") <= 200
    named = []
    for line in tree[1].splitlines():
        folder = ROOT / "dsv3_jax" if line.startswith(" ") else ROOT
        named += [folder / name for name in line.strip().split("  ")[0].split()]
    assert len(named) > 10 and [path for path in named if not path.exists()] == []


def test_links_lead_to_files():
    targets = []
    folders = ("docs", "experiments", "notebooks")
    for path in [ROOT / "README.md", *(p for f in folders for p in (ROOT / f).rglob("*.md"))]:
        if not {"generated", "_build"} & set(path.parts):
            links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", path.read_text("utf-8"))
            targets += [path.parent / link for link in links if "generated/" not in link]
    assert len(targets) > 99 and [target for target in targets if not target.exists()] == []


@pytest.mark.parametrize("page", ["AGENTS.md", "CONTRIBUTING.md"])
def test_what_contributors_read_names_files_and_commands_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 65
    words = [words for _, words in lines(ROOT / page)]
    named = re.findall(r"`([\w./]*/[\w./]*|\w+\.(?:py|md|toml|txt|json))`", text)
    named += [word for line in words for word in line if "/" in word and word[:5] != ".venv"]
    # a table's row names a file beside the first
    folders = (ROOT, ROOT / "dsv3_jax", *(ROOT / "dsv3_jax").iterdir())
    assert words and named
    assert [name for name in named if not any((folder / name).exists() for folder in folders)] == []
    targets = [line[1] for line in words if line[0] == "make"] + re.findall(r"`make ([\w-]+)", text)
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    modules = [line[line.index("-m") + 1] for line in words if "-m" in line]
    assert [module for module in modules if not importlib.util.find_spec(module)] == []
    for name, path in re.findall(r"`([A-Z_]+)` in `([\w/.]+)`", text):
        code = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^{name}\b", code, re.MULTILINE), name
