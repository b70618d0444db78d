"""Every `dsv3` command of the README and the site has options that exist, with values that they take."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest
import tyro
from runs import unhooked_cli

from dsv3_jax import train
from dsv3_jax.training import warm_start

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/guides/*.md"))]


class Parsed(BaseException):
    """The arguments were good."""


def commands(page: Path) -> list[list[str]]:
    text = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dsv3 ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_commands(page, monkeypatch, capsys):
    parse = tyro.cli

    def stop(*args, **options):
        parse(*args, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", stop)
    monkeypatch.setattr(train, "open_start", lambda start, out: start)  # no weights are read
    for name in ("on_trunk", "on_weights"):
        monkeypatch.setattr(warm_start, name, lambda run, start: run)
    refused = []
    for argv in commands(page):
        with contextlib.suppress(Parsed):
            unhooked_cli().main(argv)
            refused.append((argv, capsys.readouterr().err))
    assert refused == []
