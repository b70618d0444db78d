"""The sandbox of chat templates, programs of someone else's: they reach nothing, and they end.

Jinja's own sandbox keeps a template from the process. The operating system bounds its time and
memory: templates run in another process, which the kernel ends, since no handler in Python
interrupts C code that compares or multiplies. That process is this file as a program: it imports
Jinja, starts with the first template, and answers JSON line by line.
"""

import atexit
import contextlib
import functools
import itertools
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_SECONDS = 20.0  # of CPU for a conversation; one of 10,000 turns takes a tenth of a second
MAX_BYTES = 2**29  # that a template may take
_ONE_AT_A_TIME = threading.Lock()  # there is one process for all templates
_process: subprocess.Popen[str] | None = None


class UnsafeTemplate(ValueError):
    """A template that exceeds its limits or reaches outside: it is at fault, not its messages."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Bound what the templates of one conversation take: time, and on Linux memory."""
    global _process
    with _ONE_AT_A_TIME:
        # The first template starts the process; so does the first after a template that was ended.
        # A fork starts its own: `poll` says there that the parent's has ended.
        if _process is None or _process.poll() is not None:
            _end()
            _process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                process_group=0,  # Ctrl-C is for this process alone
            )  # fmt: skip
        # A list of limits starts the clock for the templates that follow.
        print(json.dumps([MAX_SECONDS, MAX_BYTES]), file=_process.stdin)
        yield


def ask(source: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a template within `limits`. Without values, look at it.

    Returns: its text, and the spans of its generation blocks; or what it reads, and the texts that
        are written in it.
    Raises: ValueError for whatever the template raises; UnsafeTemplate when it takes too much time
        or memory, or tries to reach anything outside.
    """
    process = _process
    assert process and process.stdout
    try:
        request = {"source": source, "values": values, "now": datetime.now().isoformat()}
        print(json.dumps(request), file=process.stdin, flush=True)
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    except BaseException:
        _end()  # its answer is not that to the next request
        raise

    # No line, or a part of one: the kernel ended the process. Its signal says which limit it was.
    if not line.endswith("\n"):
        if process.wait() == -signal.SIGPROF:
            reason = f"runs for more than {MAX_SECONDS:g} seconds"
        else:
            reason = f"takes more than {MAX_BYTES >> 20} MiB"
        raise UnsafeTemplate(f"the chat template {reason}")

    answer = json.loads(line)
    if "error" in answer:
        raise (UnsafeTemplate if answer["unsafe"] else ValueError)(answer["error"])
    return answer


@atexit.register
def _end() -> None:
    global _process
    if _process is not None:
        with contextlib.suppress(BrokenPipeError), _process:
            _process.kill()
        _process = None


# The program


class Refused(jinja2.TemplateError):
    """The template called raise_exception."""


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
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        self.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        self.globals["raise_exception"] = _raise_exception


def _raise_exception(message: str) -> None:
    raise Refused(message)


def _serve() -> None:
    """Answer the lines of stdin. A list has the limits of the lines up to the next list."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # it ends the process
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, list):
            _limit(*request)
            continue
        try:
            answer = _answer(**request)
        except MemoryError:
            raise  # it ends the process
        except Exception as error:
            failed = f"fails with {type(error).__name__}"
            reason = "refuses the messages" if isinstance(error, Refused) else failed
            sentence = f"the chat template {reason}: {' '.join(str(error).split())}"
            answer = {"error": sentence, "unsafe": isinstance(error, SecurityError)}
        print(json.dumps(answer), flush=True)


def _limit(seconds: float, size: int) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        # -1 is no limit
        resource.setrlimit(resource.RLIMIT_AS, (min(used + size, hard % 2**64), hard))


_compiled = functools.lru_cache(maxsize=4)(lambda source: Sandbox().from_string(source))


def _answer(source: str, values: dict[str, Any] | None, now: str) -> dict[str, Any]:
    template = _compiled(source)
    environment = template.environment
    environment.globals["strftime_now"] = datetime.fromisoformat(now).strftime
    if values is None:
        return _look_at(environment, source)

    # The blocks come one by one, so a generation block knows how many were written before it.
    tracker: Any = environment.extensions[Generation.identifier]
    tracker.blocks, tracker.found = [], []
    for block in template.generate(values):
        tracker.blocks.append(block)

    starts = [0, *itertools.accumulate(map(len, tracker.blocks))]
    spans = [(starts[i], starts[i] + length) for i, length in tracker.found]
    return {"text": "".join(tracker.blocks), "spans": spans}


def _look_at(environment: jinja2.Environment, source: str) -> dict[str, Any]:
    """Return what a template reads beside its functions, and the texts that it contains."""
    program = environment.parse(source)
    constants = [node.value for node in program.find_all(nodes.Const)]
    written = [
        *(node.data for node in program.find_all(nodes.TemplateData)),
        *(value for value in constants if isinstance(value, str)),
    ]
    return {
        "reads": list(meta.find_undeclared_variables(program) - environment.globals.keys()),
        "writes_role": _writes_role(program),
        "written": "\0".join(written),
    }


def _writes_role(node: nodes.Node) -> bool:
    """Say whether a template does anything with a message's role but compare it."""
    role = isinstance(node, nodes.Getattr) and node.attr == "role"
    role |= (
        isinstance(node, nodes.Getitem)
        and isinstance(node.arg, nodes.Const)
        and node.arg.value == "role"
    )
    return not isinstance(node, nodes.Compare) and (
        role or any(map(_writes_role, node.iter_child_nodes()))
    )


if __name__ == "__main__":
    _serve()
