"""Code that the commands share: options, presets by name, settings of the process, and errors as one sentence."""

import contextlib
import dataclasses
import errno
import io
import itertools
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from types import MappingProxyType
from typing import Annotated, Any

import docstring_parser
import tyro

from dsv3_jax.config import did_you_mean

# Options that moved, without `--model.`: a run's execution is apart from its model.
MOVED = {
    "compute-dtype": "compute-dtype",
    "remat": "remat",
    "dispatch": "kernels",
    "layout.fsdp": "layout.fsdp",
    "layout.no-fsdp": "layout.no-fsdp",
    "layout.exchange": "layout.expert-comm",
    "layout.slack": "layout.capacity-slack",
}

# Options


def parse(kind: type, argv: list[str], command: str, default: Any = None) -> Any:
    """Make an options dataclass from a command's arguments.

    Raises: ValueError (one sentence) for arguments that are unknown, missing or of the wrong type.
    """
    if {"-h", "--help"} & set(argv):
        _mend_help(kind)
    else:
        check_options(argv, options_of(kind), command)
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(kind, args=argv, prog=f"dsv3 {command}", default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_sentence(output.getvalue(), argv)) from None


def _mend_help(kind: Any) -> None:
    """Let tyro wrap each help text as one paragraph, and name no default of an empty list: the text says what it means.

    It would keep the line ends of indented docstrings, and write "(default: )".
    """
    no_default = tyro.conf.arg(help_behavior_hint="")
    docs = (docstring_parser.parse_from_object(cls) for cls in reversed(kind.__mro__[:-1]))
    texts = {found.arg_name: found.description for doc in docs for found in doc.params}
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        text = texts.get(item.name)
        if text:
            item.metadata = MappingProxyType({**item.metadata, "help": " ".join(text.split())})
        plain = kind.__annotations__.get(item.name)
        if item.default == () and plain is not None and typing.get_origin(plain) is not Annotated:
            kind.__annotations__[item.name] = Annotated[plain, no_default]
        if dataclasses.is_dataclass(hints[item.name]):
            _mend_help(hints[item.name])


def options_of(kind: type) -> dict[str, bool]:
    """The options of a dataclass, nested ones too: name → whether it is a switch, which takes no value.

    Example:
        >>> from dsv3_jax.config import Layout
        >>> options_of(Layout)["--capacity-slack"], options_of(Layout)["--fsdp"]
        (False, True)
    """
    return dict(_options(kind, ""))


def _options(kind: Any, prefix: str) -> Iterator[tuple[str, bool]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    for item in dataclasses.fields(kind):
        hint, name = hints[item.name], item.name.replace("_", "-")
        marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
        if tyro.conf.Positional in marks:
            continue
        if marks:
            hint = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(hint):
            flat = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _options(hint, prefix if flat else f"{prefix}{name}.")
            continue
        yield f"--{prefix}{name}", hint is bool
        if hint is bool:
            yield f"--{prefix}no-{name}", True


def check_options(argv: list[str], options: dict[str, bool], command: str) -> None:
    """Check that all options exist, and have a value if they need one.

    Raises: ValueError that names the nearest option, or what an option is called now.

    Example:
        >>> check_options(["--stpes", "9"], {"--steps": False}, "train")
        Traceback (most recent call last):
            ...
        ValueError: option '--stpes' is not one of dsv3 train; did you mean '--steps'?
    """
    for word, after in itertools.pairwise([*argv, "--"]):
        if not word.startswith("--") or word == "--":
            continue
        name, equals, _ = word.partition("=")
        name = name.replace("_", "-")
        if name not in options:
            raise ValueError(f"option {name!r} {_moved(name, options) or _unknown(name, options, command)}")
        if not equals and not options[name] and after.startswith("--"):
            raise ValueError(f"option {name!r} needs a value")


def _moved(name: str, options: Iterable[str]) -> str:
    """The end of an error about a renamed option: its name now; empty for other options."""
    old = name.removeprefix("--").removeprefix("model.")
    for now in (f"--{prefix}{MOVED[old]}" for prefix in ("execution.", "") if old in MOVED):
        if now in options:
            hint = f", as in {now} grouped_swiglu=dense; a capacity factor alone drops tokens"
            return f"is {now} now{hint if old == 'dispatch' else ''}"
    return ""


def _unknown(name: str, options: Iterable[str], command: str) -> str:
    """An option is nearest by its last part, whatever it is nested in; of several those, by its whole name."""
    parts = {option: option.removeprefix("--").rpartition(".")[2] for option in options}
    near = get_close_matches(name.removeprefix("--").rpartition(".")[2], set(parts.values()), n=1)
    nearest = get_close_matches(name, [o for o, part in parts.items() if part in near], n=1, cutoff=0)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "--help lists the options"
    return f"is not one of dsv3 {command.removesuffix(' PRESET')}; {hint}"


def _one_sentence(text: str, argv: list[str]) -> str:
    """Turn tyro's message about bad arguments, which is in boxes, into one sentence."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = " ".join(re.sub(r"[╭╮╰╯│─]|-{9,}", " ", text).split())  # boxes, or lines where there is no UTF-8
    for value in (re.sub(r"^--[\w.-]+=", "", word) for word in argv):
        if len(value) > 40:  # the boxes break long words
            text = value.join(re.split(" ?".join(map(re.escape, value)), text))
    text = text.split(" For full helptext")[0].split(" Argument helptext")[0]
    text = re.sub(r"^(Parsing error|Unrecognized options|Invalid \w+|Value error|Missing argument) ", "", text)
    text = re.sub(r"^Unrecognized options: ([^ ,]+).*$", r"argument '\1' is one too many; see --help", text)
    text = re.sub(r"^Missing value for argument '(\S+)'\..*$", r"option '\1' needs a value", text)
    text = re.sub(r"^Required options Missing from .*?: (?:(--)?(\S+) )(.*?) \(required\).*$", _missing, text)
    text = re.sub(r"^invalid choice '(.*)' for argument '(\S+)'. Expected one of \((.*)\)\.$", _choice, text)
    text = re.sub(r"^Error parsing (?:(--\S+)|[\w.-]+): ", lambda m: f"option '{m[1]}': " if m[1] else "", text)
    text = re.sub(r"invalid literal for int\(\) with base 10: (.+)$", r"\1 is not a whole number", text)
    return re.sub(r"could not convert string to float: (.+)$", r"\1 is not a number", text)


def _missing(match: re.Match) -> str:
    dashes, name, what = match.groups()
    return (
        f"option '--{name}' is missing: {what.partition(' ')[2]}" if dashes else f"argument {name} is missing: {what}"
    )


def _choice(match: re.Match) -> str:
    given, option, names = match[1], match[2], re.findall(r"'([^']*)'", match[3])
    return f"option {option!r}: {given!r} is not one of {', '.join(names)}{did_you_mean(given, names)}"


def named_preset(argv: list[str], command: str, look_up: Callable[[str], Any]) -> tuple[Any, list[str]]:
    """Look up the preset that a command's first argument names.

    Returns: (what `look_up` finds, the other arguments). For --help it is the preset "tiny".
    Raises: ValueError if there is no such argument or preset.

    Example:
        >>> named_preset(["tiny", "--steps", "9"], "train", str.upper)
        ('TINY', ['--steps', '9'])
    """
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            return look_up("tiny"), argv
        raise ValueError(f"argument PRESET is missing: name one first, as in: dsv3 {command} tiny")
    return look_up(argv[0]), argv[1:]


def value_of(argv: list[str], option: str) -> str | None:
    """An option's value before parsing, because the parser's defaults depend on it.

    Example:
        >>> value_of(["tiny", "--mesh", "data=2", "--steps=9"], "--steps")
        '9'
    """
    for word, after in itertools.pairwise([*argv, ""]):
        if word == option or word.startswith(option + "="):
            return word.removeprefix(option).removeprefix("=") or after
    return None


# The process


def prepare_process() -> None:
    """Set the level of XLA's messages. Call it before JAX is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def prepare_training(mesh: Any = None) -> None:
    """Set the allocator for training on CPU. Call it before JAX makes an array."""
    from dsv3_jax.kernels.choose import platform_of
    from dsv3_jax.kernels.cpu.memory import keep_memory

    if platform_of(mesh) == "cpu":
        keep_memory()


def make_mesh(text: str | None) -> Any:
    """Make the mesh that --mesh describes; on CPU as many devices as it needs. None means a single device."""
    if text is None:
        return None
    import jax

    from dsv3_jax.mesh import sharding

    sizes = sharding.parse_mesh(text)
    with contextlib.suppress(RuntimeError):  # an array exists already: the devices are those there are
        jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))
    return sharding.make_mesh(**sizes)


def all_devices(run: Any) -> Any:
    """Make the mesh of a training run without --mesh: all of this machine's devices along "data".

    None means a single device: there is no other, or it is a CPU, whose devices share its cores.
    Raises: ConfigError if the run's batch is not divisible by the devices.
    """
    import jax

    from dsv3_jax.config import ConfigError
    from dsv3_jax.kernels import choose
    from dsv3_jax.mesh import sharding

    count, platform = jax.local_device_count(), choose.platform_of()
    if count == 1 or platform == "cpu":
        return None
    choose.prepare(run.execution)  # refuses kernels that are not there, before anything is printed
    if (rows := run.data.batch_size // run.optim.microbatches) % count:
        raise ConfigError(
            f"batch_size/microbatches={rows} rows are not divisible by the {count} devices here; use a multiple, or "
            "choose fewer devices, such as --mesh data=1"
        )
    print(f"training on the {count} devices here, {rows // count} rows on each; --mesh data=1 uses one")
    return sharding.make_mesh(data=count)


# Errors


def guarded(command: Callable[[], int]) -> int:
    """Run a command; return its exit code, and print the errors of bad input as one sentence."""
    try:
        return command()
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        sys.stdout = open(os.devnull, "w")
        return 141
    except (ValueError, OSError) as error:
        return fail(sentence(error))
    except MemoryError as error:
        return fail(f"not enough memory: {sentence(error)}")
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error):  # from inside XLA or Orbax
            return fail(sentence(error))
        raise


MAX_SENTENCE = 480  # characters, the line's "dsv3: " not included


def sentence(error: BaseException) -> str:
    """An error's message on one line: at most `MAX_SENTENCE` characters, without control codes.

    Example:
        >>> sentence(ValueError("two\\n  lines \\x1b[31m"))
        'two lines \\\\x1b[31m'
    """
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full: {error.filename or error.strerror}; what was saved before is complete"
    return _plain(str(error)) or type(error).__name__


def _plain(text: str) -> str:
    """One line in which codes that would steer a terminal are written out; of a long text both ends are kept."""
    text = " ".join(text[: 100 * MAX_SENTENCE].split())
    text = re.sub(
        r"[^\x20-\x7e]", lambda m: m[0] if m[0].isprintable() else m[0].encode("unicode_escape").decode(), text
    )
    return text if len(text) <= MAX_SENTENCE else f"{text[: MAX_SENTENCE - 151]} … {text[-148:]}"


def fail(text: str, code: int = 2) -> int:
    """Print an error on stderr; return the exit code."""
    print(f"dsv3: {_plain(text)}", file=sys.stderr)
    return code
