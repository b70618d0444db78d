"""Read options in the forms that people type, and report a bad one in one sentence.

--optim.learning-rate 3e-4      the name that --help-verbose lists
--learning-rate 3e-4            its end, where only one option has it
--lr 3e-4                       for short
optim.learning_rate=3e-4        Hydra's form, of each of these
"""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import tyro

SHORT = {"lr": "learning-rate"}  # of the last part of a name
HELP = ("help", "help-verbose")
_OPTION = re.compile(r"--[a-zA-Z][\w.-]*(=.*)?", re.DOTALL)
_FRAME = re.compile(r"^[│|]|[│|]$")  # of tyro, at both ends of a line; ASCII where it must be


def names_of(kind: Any) -> dict[str, bool]:
    """The names of a dataclass's options, and whether each is a flag.

    Example:
        >>> from dsv3_jax.config import Layout
        >>> list(names_of(Layout))[:3]
        ['fsdp', 'no-fsdp', 'expert-comm']
    """
    names: dict[str, bool] = {}
    for name, own in _types(kind):
        names[name] = own is bool
        if own is bool:
            head, dot, last = name.rpartition(".")
            names[f"{head}{dot}no-{last}"] = True
    return names


def _types(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The names of a dataclass's options, and the types of their values."""
    for field, hint in typing.get_type_hints(kind, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        if tyro.conf.Positional in marks or tyro.conf.Suppress in marks:
            continue
        own = typing.get_args(hint)[0] if marks else hint
        name = field.replace("_", "-")
        if dataclasses.is_dataclass(own):
            unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _types(own, prefix if unnamed else f"{prefix}{name}.")
        else:
            yield prefix + name, own


def check_lists(argv: list[str], kind: Any) -> None:
    """Refuse an option of several values that is given twice: the first ones would be lost.

    Args: argv: as `spelled` returns it.
    Raises: ValueError naming the option.

    Example:
        >>> from dsv3_jax.config import Lora
        >>> check_lists(["--on", "routed", "--rank", "8", "--on", "shared"], Lora)
        Traceback (most recent call last):
            ...
        ValueError: --on is given twice; name all after one: --on A B
    """
    given = [word.partition("=")[0] for word in argv]
    for name, own in _types(kind):
        if typing.get_origin(own) is tuple and given.count(f"--{name}") > 1:
            raise ValueError(f"--{name} is given twice; name all after one: --{name} A B")


def spelled(argv: list[str], names: Mapping[str, bool]) -> list[str]:
    """Write each option by its name in `names`.

    NAME=VALUE without dashes is an option if there is one of that name, and it is no option's
    value.

    Raises: ValueError for an option that is not there, with the nearest names.

    Example:
        >>> names = {"optim.learning-rate": False, "steps": False}
        >>> spelled(["--lr", "3e-4", "steps=9"], names)
        ['--optim.learning-rate', '3e-4', '--steps=9']
    """
    words = []
    is_value = False
    for word in argv:
        option, equals, value = word.partition("=")
        dashed = _OPTION.fullmatch(word) is not None
        name = None
        if dashed or (equals and not is_value):
            name = _find(option.removeprefix("--").replace("_", "-"), names)
        if dashed and name is None:
            raise ValueError(f"option {option} is unknown{_nearest(option, names)}")
        if name is None:
            words.append(word)
            is_value = False
            continue

        # A flag has no value: true is its name, and false the name with no-.
        is_flag = names.get(name, True)
        if equals and is_flag:
            head, _, last = name.rpartition(".")
            off = f"{head}.no-{last}" if head else f"no-{last}"
            chosen = {"true": name, "false": off}.get(value.lower())
            if chosen not in names:
                raise ValueError(f"{name}={value} is neither true nor false")
            words.append(f"--{chosen}")
        else:
            words.append(f"--{name}={value}" if equals else f"--{name}")
        is_value = not equals and not is_flag
    return words


def _find(name: str, names: Mapping[str, bool]) -> str | None:
    """The option that is meant. Raises: ValueError when several are."""
    if name in names or name in HELP or name.startswith("tyro-"):
        return name
    head, dot, last = name.rpartition(".")
    name = f"{head}{dot}{SHORT.get(last, last)}"
    if name in names:
        return name
    ends = [known for known in names if known.endswith(f".{name}")]
    if len(ends) > 1:
        raise ValueError(f"option --{name} may be --{' or --'.join(ends)}; name one")
    return ends[0] if ends else None


def _nearest(option: str, names: Mapping[str, bool]) -> str:
    """The end of the sentence: options whose last part is near, or holds that word."""
    head, _, word = option.removeprefix("--").replace("_", "-").rpartition(".")

    # Options by the last part of their names.
    ends: dict[str, list[str]] = {}
    for name in names:
        end = name.rpartition(".")[2]
        ends.setdefault(end, []).append(f"--{name}")

    near = get_close_matches(word, ends) + [end for end in ends if word in end]
    found = dict.fromkeys(name for end in near for name in ends[end])

    # Those of the group that was named come first.
    best = sorted(found, key=lambda name: not name.startswith(f"--{head}."))[:3]
    return f"; did you mean {' or '.join(best)}?" if best else ""


@contextlib.contextmanager
def one_sentence(names: Mapping[str, bool]) -> Iterator[None]:
    """Turn what tyro prints of bad options, in a frame, into the sentence of a ValueError.

    Args: names: of the options that there are.
    """
    said = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"  # no line is broken, which would break paths too
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise

        # A word that is no option: the nearest ones are named.
        sentence = _unframed(said.getvalue())
        if words := sentence.removeprefix("Unrecognized options: ").removesuffix(sentence):
            word = words.split(", ")[0]
            near = _nearest(word.partition("=")[0], names)
            sentence = f"{word!r} is no option, and no argument is left for it{near}"
        raise ValueError(sentence) from None
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    sys.stderr.write(said.getvalue())


def _unframed(text: str) -> str:
    r"""The first paragraph in a frame, or between two lines, without its title.

    Example:
        >>> _unframed("╭─ Value error ─╮\n│ Error parsing a.b: c=1 │\n│ ──── │\n│ more │")
        'c=1'
    """
    lines = [_FRAME.sub("", line.strip()).strip() for line in text.splitlines()[1:]]
    body = itertools.dropwhile(_is_rule, lines)
    found = " ".join(" ".join(itertools.takewhile(lambda line: not _is_rule(line), body)).split())
    return re.sub(r"^Error parsing [a-z_.]+: ", "", found) or text


def _is_rule(line: str) -> bool:
    return not line.strip("─-╰╯")
