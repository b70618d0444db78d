"""What the demo installs, and how it ends: good places, and commands that work as pasted."""

import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from flax import nnx

from dsv3_jax.chat.text_settings import plain_settings
from dsv3_jax.cli import demo_end as demo
from dsv3_jax.cli import train
from dsv3_jax.cli.common import parse
from dsv3_jax.cli.generate import Generate
from dsv3_jax.data.corpus import Document
from dsv3_jax.stats.reporting import Stats


class NextLetter(nnx.Module):
    """After each byte it expects the one that follows it in the alphabet."""

    def __call__(self, tokens):
        return SimpleNamespace(logits=jax.nn.one_hot(tokens + 1, 300))


def test_continuations_are_chosen_where_the_model_is_right_for_most_letters(monkeypatch, capsys):
    def generate(model, prompts, count):
        return SimpleNamespace(tokens=[[p[-1] + 1 + i for i in range(count)] for p in prompts])

    monkeypatch.setattr(demo, "generate", generate)
    texts = {
        "a line\n" + "z" * 99 + "abcdef" + "y" * 200: "code",
        "a line\n" + "z" * 60 + "\nxabcdefghijk" + "y" * 200: "tests",
        "0123456789" * 30: "C",  # right, but no letters
        "abcdefghijklmnop" * 30: "English",  # no code
        "abc": "code",  # too short
        "ab" * 200: "code",
    }
    documents = [Document("." * len(text) + text, domain) for text, domain in texts.items()]
    model, text = NextLetter(), plain_settings()
    found = demo.continued(model, text, documents, rows=9)
    assert [piece.truth for piece in found] == ["bcdefghijkyy", "bcdefyyyyyyy", "babababababa"]
    assert [piece.written[:12] for piece in found[:2]] == ["bcdefghijklm"] * 2
    assert found[0].before == "a line\n" + "z" * 60 + "\nxa"
    assert demo.continued(model, text, documents[3:5], rows=9) == []

    # Both columns begin with what the line begins with.
    demo.show(found[:1])
    assert "xabcdefghijklm" in (said := capsys.readouterr().out) and "xabcdefghijkyy" in said


@pytest.mark.parametrize(
    "called, found, want",
    [
        (".venv/bin/dsv3", "/usr/bin/dsv3", ".venv/bin/dsv3"),
        ("/usr/bin/dsv3", "/usr/bin/dsv3", "dsv3"),
        ("/my env/bin/dsv3", None, "'/my env/bin/dsv3'"),
        ("/x/dsv3_jax/cli/__main__.py", None, f"{sys.executable} -m dsv3_jax.cli"),
    ],
)
def test_the_program_is_named_as_this_shell_calls_it(called, found, want, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr("shutil.which", lambda name: found)
    assert demo.program() == want


def test_the_commands_are_good(whole):
    lines = demo.commands("dsv3", whole.folder)
    generate, stats, longer = (shlex.split(line, comments=True)[1:] for line in lines)
    kinds = {"generate": Generate, "stats": Stats}
    for name, *words in (generate, stats):
        assert parse(kinds[name], words, name)
    run = train.options(longer[1:]).run
    assert run.steps == 800 and run.data == whole.run.data


@pytest.mark.parametrize(
    "accelerator, code, said",
    [("tpu", 0, "'jax[tpu]>=0.11'"), ("cuda99", 2, "ACCELERATOR='cuda99'")],
)
def test_make_demo_installs_what_a_device_needs(monkeypatch, accelerator, code, said):
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of a make that runs these tests
        monkeypatch.delenv(name, raising=False)
    command = ["make", "--dry-run", "demo", f"ACCELERATOR={accelerator}"]
    command += [f"PYTHON={sys.executable}", "VENV=nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == code and said in done.stdout + done.stderr
