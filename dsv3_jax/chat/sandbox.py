"""The sandbox of chat templates: a template is a program of someone else's, which must reach nothing, and must end.

Jinja's own sandbox keeps a template from the process. Here each turn of a loop and each call also looks at the CPU time
that is left, and what makes large values is counted before they are made: operators, joined text, and what is written.
Filters and methods whose result depends on a number, such as `center`, are taken away; no released template has them.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 20.0  # of CPU; a conversation of 10,000 turns takes a tenth of a second
MAX_CHARACTERS = 2**27  # that a run makes
_ITEM = 16  # an item of a list counts as so many characters more
_IN_PARTS = json.JSONEncoder(default=str, ensure_ascii=False, skipkeys=True)
_NO_FILTERS = ("batch", "center", "format", "indent", "round", "slice", "wordwrap")
_NO_METHODS = "center encode expandtabs format format_map ljust rjust to_bytes translate zfill".split()


class Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class TooMuch(jinja2.TemplateError):
    """The template makes too large values, or runs too long."""


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
    """Jinja with the functions that templates find in transformers, and with limits.

    Example:
        >>> with one_sentence():
        ...     Sandbox().compiled("{{ 'a' * 10**9 }}").render()
        Traceback (most recent call last):
            ...
        ValueError: the chat template fails with TooMuch: it makes more than 134,217,728 characters
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.finalize = self.counted
        self.filters |= {"tojson": self._to_json, "join": self._join, "replace": self._replace}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        for name in _NO_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.left = MAX_CHARACTERS  # of a run
        self.begin()

    def begin(self) -> None:
        """Give the template its time, for one run or several."""
        self._until = time.thread_time() + MAX_SECONDS

    def compiled(self, source: str) -> jinja2.Template:
        """Compile a template whose loops and joined texts are counted."""
        return self.from_string(_Counted().visit(self.parse(source)))

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a block, a macro or the template wrote."""
        return self._join(parts)

    def tick(self) -> None:
        """Raise TooMuch if no time is left. It is called in each turn of a loop."""
        if time.thread_time() > self._until:
            raise TooMuch(f"it runs for more than {MAX_SECONDS:g} seconds")

    def call(self, context: Any, function: Any, *args: Any, **named: Any) -> Any:
        self.tick()
        text, name = getattr(function, "__self__", None), getattr(function, "__name__", None)
        if isinstance(text, str) and name in ("join", "replace"):
            return self._join(args[0], text) if name == "join" else self._replace(text, *args)
        return super().call(context, function, *args, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise TooMuch("it formats text by %, which may make it too wide")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._spend((left.bit_length() * right >> 6) ** 2)
        for times, values in ((left, right), (right, left)) if operator == "*" else ():
            if isinstance(times, int) and isinstance(values, str | list | tuple):
                self._spend(max(times, 0) * len(values) * (1 if isinstance(values, str) else _ITEM))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list | tuple):
            self._spend(len(result))
        elif isinstance(result, int):
            self._spend((result.bit_length() >> 6) ** 2)  # so long the product of two takes
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _NO_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Let `format` be a method as others, which is not safe."""

    def _spend(self, characters: int) -> None:
        self.left -= characters
        if self.left < 0:
            raise TooMuch(f"it makes more than {MAX_CHARACTERS:,} characters")

    def counted(self, value: Any) -> Any:
        """Spend what a value has as text, and return it; what is in a list twice counts twice."""
        for part in [value] if isinstance(value, str) else _IN_PARTS.iterencode(value):
            self._spend(len(part) + _ITEM)
        return value

    def _join(self, parts: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        parts = list(parts) if attribute is None else [self.getitem(part, attribute) for part in parts]
        self.counted(parts)
        self._spend(len(d) * len(parts))
        return d.join(map(str, parts))

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text = str(self.counted(text))
        self._spend(text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _to_json(self, value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
        self.counted(value)
        if len(str(options)) > 80 or (indent is not None and indent not in range(17)):
            raise TooMuch(f"it writes JSON with indent={indent!r:.80}, which is too wide")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class _Counted(NodeTransformer):
    """Lets each turn of a loop call `Sandbox.tick`, and makes each `~` a counted join."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes, lineno=node.lineno), "join", [], [], None, None, lineno=node.lineno)


def _raise_exception(message: str) -> None:
    raise Refused(message)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn whatever a template raises into a ValueError: it is a program of someone else's."""
    try:
        yield
    except Exception as error:
        reason = "refuses the messages" if isinstance(error, Refused) else f"fails with {type(error).__name__}"
        raise ValueError(f"the chat template {reason}: {' '.join(str(error).split())}") from error
