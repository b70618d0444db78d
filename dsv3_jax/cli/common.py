"""Code that the commands share: options, presets, settings of the process, errors as a sentence."""

import contextlib
import dataclasses
import errno
import inspect
import itertools
import math
import os
import sys
import textwrap
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from dsv3_jax.config import did_you_mean
from dsv3_jax.host.mirror import with_urls
from dsv3_jax.report.units import printable

# Options

HELPS = {"-h", "--help", "--help-verbose"}


def parse(kind: type, argv: list[str], command: str, default: Any = None) -> Any:
    """Make an options dataclass from arguments; tyro ends the process for --help.

    With `default`, the command takes each setting of a model or a run: --help lists them, and
    --help-verbose explains.

    Raises: ValueError for bad options.
    """
    import tyro  # late: `guarded` says that it is missing

    from dsv3_jax.cli.options import check_lists, names_of, one_sentence, spelled

    names = names_of(kind)
    argv = spelled(argv, names)
    check_lists(argv, kind)
    if default is not None and {"-h", "--help"} & set(argv):
        _short_help(kind, command, default)
    how = {"prog": f"dsv3 {command}", "default": default, "compact_help": default is not None}
    if HELPS & set(argv):
        return tyro.cli(kind, args=argv if default is not None else ["--help"], **how)
    with one_sentence(names):
        return tyro.cli(kind, args=argv, **how)


def _short_help(kind: Any, command: str, default: Any) -> None:
    """Explain a command's own options, and list the settings by name and default."""
    import tyro

    # Settings are the fields that are configurations. tyro's own list is to leave them out.
    hints = typing.get_type_hints(kind, include_extras=True)
    settings = [
        item.name
        for item in dataclasses.fields(kind)
        if dataclasses.is_dataclass(getattr(default, item.name))
    ]
    own = dataclasses.make_dataclass(
        kind.__name__,
        [(name, Annotated[Any, tyro.conf.Suppress]) for name in settings],
        bases=(kind,),
    )

    # One paragraph for each first part of the options' names; an unnamed field's have none.
    groups: dict[str, str] = {}
    for name in settings:
        marks = getattr(hints[name], "__metadata__", ())
        unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
        first = "--" if unnamed else f"--{name}."
        for prefix, setting in _settings(getattr(default, name), first):
            groups[prefix] = f"{groups.get(prefix, prefix)}  {setting}"
    listed = [
        textwrap.fill(text, 98, subsequent_indent="    ", break_on_hyphens=False)
        for text in groups.values()
    ]

    intro = (
        "Settings with their defaults, by the first part of their names; "
        "--help-verbose explains them:"
    )
    text = "\n".join([inspect.cleandoc(kind.__doc__), "", intro, *listed])
    tyro.cli(
        own, args=["--help"], prog=f"dsv3 {command}", default=own(**vars(default)), description=text
    )


def _settings(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Every setting as the first part of its option, and the rest with its value.

    Example:
        >>> from dsv3_jax.config import Layout
        >>> for prefix, setting in _settings(Layout(), "--layout."):
        ...     print(prefix, setting)
        --layout. no-fsdp
        --layout. expert-comm=auto
        --layout. capacity-slack=1.25
        --layout. expert-nodes=1
        --layout. length=none
    """
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name = item.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            yield prefix, name if value else f"no-{name}"
        else:
            yield prefix, f"{name}={','.join(value) if isinstance(value, tuple) else value}"


def named_preset(
    argv: list[str], command: str, find: Callable[[str], Any]
) -> tuple[Any, list[str]]:
    """Look up the preset that a command's first argument names.

    Returns: (what `find` returns, the other arguments). For --help it is the preset "tiny".
    Raises: ValueError if there is no such argument or preset.

    Example:
        >>> named_preset(["tiny", "--steps", "9"], "train", str.upper)
        ('TINY', ['--steps', '9'])
    """
    if not argv or argv[0].startswith("-"):
        if HELPS & set(argv):
            return find("tiny"), argv
        raise ValueError(f"argument PRESET is missing: name one first, as in: dsv3 {command} tiny")
    return find(argv[0]), argv[1:]


def value_of(argv: list[str], option: str) -> str | None:
    """An option's value before parsing, because the parser's defaults depend on it.

    The last one counts, and None is none, as for the parser.

    Example:
        >>> value_of(["tiny", "--steps", "3", "--mesh", "data=2", "--steps=9"], "--steps")
        '9'
    """
    value = None
    for word, after in itertools.pairwise([*argv, ""]):
        if word == option or word.startswith(option + "="):
            value = word.removeprefix(option).removeprefix("=") or after
    return None if value == "None" else value


def with_variables(argv: list[str], option: str) -> list[str]:
    """Write each `--template.NAME VALUE`, of a chat template, as `--template NAME=VALUE …`.

    Example:
        >>> argv = ["--template.thinking", "true", "--template.effort=low", "--seed", "1"]
        >>> with_variables(argv, "--template")
        ['--seed', '1', '--template', 'thinking=true', 'effort=low']
    """
    rest = []
    pairs = []
    words = iter(argv)
    for word in words:
        if word.startswith(f"{option}."):
            name, equals, value = word.removeprefix(f"{option}.").partition("=")
            pairs.append(f"{name.replace('-', '_')}={value if equals else next(words, '')}")
        else:
            rest.append(word)
    return [*rest, option, *pairs] if pairs else rest


# The process


def prepare_training(mesh: Any = None) -> None:
    """Set the allocator for training on CPU. Call it before JAX makes an array."""
    from dsv3_jax.kernels.choose import platform_of
    from dsv3_jax.kernels.cpu.memory import keep_memory

    if platform_of(mesh) == "cpu":
        keep_memory()


def mesh_of_option(text: str | None) -> Any:
    """Make the mesh that --mesh describes; on CPU as many devices as it needs.

    None means a single device.
    """
    if text is None:
        return None
    import jax

    from dsv3_jax.mesh import sharding
    from dsv3_jax.mesh.shape import parse_mesh

    # JAX refuses once an array exists: the devices are then those that there are.
    sizes = parse_mesh(text)
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))
    return sharding.make_mesh(**sizes)


def devices_here() -> int:
    """Count this machine's devices that a run without --mesh trains on.

    A CPU counts as one device, because its devices share the cores.
    """
    import jax

    from dsv3_jax.kernels import choose

    return 1 if choose.platform_of() == "cpu" else jax.local_device_count()


def all_devices(run: Any) -> Any:
    """Make the mesh of a training run without --mesh: all of this machine's devices along "data".

    None means a single device.
    Raises: ConfigError for kernels that are not there, before anything is printed.
    """
    from dsv3_jax.kernels import choose
    from dsv3_jax.mesh import sharding

    count = devices_here()
    if count == 1:
        return None
    choose.prepare(run.execution)
    mesh = sharding.make_mesh(data=count)
    sharding.check_run(mesh, run)
    print(f"training on the {count} devices here; --mesh data=1 uses one")
    return mesh


# Errors


def guarded(command: Callable[[], int]) -> int:
    """Run a command; return its exit code, and print the errors of bad input as one sentence."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        sys.stdout = open(os.devnull, "w")
        return 141
    except (ValueError, OSError, MemoryError) as error:
        return fail(sentence(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dsv3_jax"):
            raise
        return fail(
            f"this command needs the package {error.name!r}, which is not installed: pip install "
            f"{error.name}"
        )
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # of tyro after --help or a bad option, and of SIGTERM
        if isinstance(stop.code, int | None):
            return int(stop.code or 0)
        return fail(sentence(stop), 1)
    except Exception as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
            wish = os.environ.get("JAX_PLATFORMS")
            reason = f"JAX_PLATFORMS={wish!r} finds no device here; unset it. {error}"
            return fail(sentence(ValueError(reason)))
        # A full disk or memory, from inside XLA, Orbax or ArrayRecord.
        full = ("RESOURCE_EXHAUSTED", "No space left", "File too large")
        if any(words in str(error) for words in full):
            return fail(sentence(error))
        raise


MAX_SENTENCE = 480  # characters, the line's "dsv3: " not included


def sentence(error: BaseException) -> str:
    """An error's message on one line of at most `MAX_SENTENCE` characters, control codes visible.

    Example:
        >>> sentence(ValueError("two\\n  lines \\x1b[31m"))
        'two lines \\\\x1b[31m'
    """
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        place = error.filename or error.strerror
        return f"the disk is full: {place}; what was saved before is complete"

    # A long sentence keeps its end, which often says what to do.
    text = str(error).removeprefix(f"[Errno {getattr(error, 'errno', None)}] ")
    words = with_urls(text)[: 100 * MAX_SENTENCE].split()
    text = printable(" ".join(words)) or type(error).__name__
    return text if len(text) <= MAX_SENTENCE else f"{text[: MAX_SENTENCE - 151]} … {text[-148:]}"


def fail(text: str, code: int = 2) -> int:
    """Print an error on stderr; return the exit code."""
    try:
        print(f"dsv3: {text}", file=sys.stderr, flush=True)
    except OSError:  # its disk is full; Python's own attempt at the end would change the exit code
        sys.stderr = open(os.devnull, "w")
    return code


def run_subcommand(
    command: str, table: Mapping[str, tuple[Callable, str, str]], argv: list[str]
) -> int:
    """Run the subcommand that the first argument names; without one, or for --help, list them.

    Args: table: subcommand → its function of the other arguments, their names, and what it does.
    Raises: ValueError for another name.

    Example:
        >>> table = {"list": (len, "[FOLDER]", "list the runs in a folder")}
        >>> run_subcommand("runs", table, ["list", "a"])
        1
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [
            f"  {f'{name} {arguments}':<28} {what}" for name, (_, arguments, what) in table.items()
        ]
        print(f"usage: dsv3 {command} SUBCOMMAND …", "", *lines, sep="\n")
        return 0
    if argv[0] not in table:
        raise ValueError(
            f"subcommand {argv[0]!r} is not one of {', '.join(table)}{did_you_mean(argv[0], table)}"
        )
    return table[argv[0]][0](argv[1:])
