"""The sandbox of chat templates: a template is a program of someone else's, which must reach nothing, and must end.

Jinja's own sandbox keeps a template from the process. The operating system bounds its time and memory, see `limits`.
"""

import json
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_jax.signals import cpu_limit

MAX_SECONDS = 20.0  # of CPU; a conversation of 10,000 turns takes a tenth of a second
MAX_BYTES = 2**29  # that a template may take
_ONE_AT_A_TIME = threading.Lock()  # the limit of memory is the process's


class Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class TooMuch(ValueError):
    """The template takes too much memory, or runs too long."""


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: notes where its text is in the output.

    Attributes:
        blocks: what the template has written, which its caller appends.
        found: for each generation block, the number of `blocks` before it, and its characters.
    """

    tags = {"generation"}
    blocks: list[str]
    found: list[tuple[int, int]]

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = str(caller())
        self.found.append((len(self.blocks), len(text)))
        return text


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with the functions that templates find in transformers."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise Refused(message)


def _late(*_: Any) -> None:
    raise TooMuch(f"the chat template runs for more than {MAX_SECONDS:g} seconds")


@contextmanager
def limits() -> Iterator[None]:
    """Bound the time and memory of the templates that run within the context.

    The time is the process's on its CPUs, and is bounded in the main thread alone; the memory is bounded on Linux
    alone.

    Raises: TooMuch.

    Example:
        >>> with limits():
        ...     Sandbox().from_string("{{ 'a' * 10**9 }}").render()
        Traceback (most recent call last):
            ...
        dsv3_jax.chat.sandbox.TooMuch: the chat template takes more than 512 MiB
    """
    with _ONE_AT_A_TIME, cpu_limit(MAX_SECONDS, _late):
        before = resource.getrlimit(resource.RLIMIT_AS)
        try:
            if sys.platform == "linux":
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                most = [n for n in (used + MAX_BYTES, *before) if n != resource.RLIM_INFINITY]
                resource.setrlimit(resource.RLIMIT_AS, (min(most), before[1]))
            yield
        except MemoryError as error:
            raise TooMuch(f"the chat template takes more than {MAX_BYTES >> 20} MiB") from error
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn whatever a template raises into a ValueError."""
    try:
        yield
    except (TooMuch, MemoryError):
        raise
    except Exception as error:
        reason = "refuses the messages" if isinstance(error, Refused) else f"fails with {type(error).__name__}"
        raise ValueError(f"the chat template {reason}: {' '.join(str(error).split())}") from error
