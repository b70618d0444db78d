"""A run's folder: its configuration, its own tokenizer, and whether it is this run's.

A folder can be copied, renamed and used from any directory: what is inside it is named relative to it, and it holds a
copy of its tokenizer. The text that it was trained on stays where it is.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsv3_jax.config import Execution, RunConfig, first_difference, replace, run_from_dict, to_dict
from dsv3_jax.data import hub, tokenizer
from dsv3_jax.files import PART, read_json, write_atomic

RUN_FILE, TOKENIZER_FILE = "run.json", "tokenizer.json"
# Settings that may change when a run is resumed. The learning rate's schedule is a function of steps.
BESIDE = ("kernels", "history", "made")  # keys of run.json that are not of the configuration
MAY_CHANGE = ("steps", "eval_every", "eval_batches", "save_every", "keep", "log_every")
_MAX_RUN = 8_000_000  # bytes of a run.json


def read_run(folder: str | Path) -> RunConfig:
    """Read the configuration of a run folder; the path of its tokenizer is that of its own copy, if it has one.

    Raises: ValueError if the folder holds no run, or its configuration cannot be read.

    Example:
        >>> import tempfile
        >>> from dsv3_jax.presets import recipe
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = claim(folder, recipe("tiny"))
        ...     read_run(folder) == recipe("tiny")
        True
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise ValueError(f"folder={str(folder)!r} holds no run: there is no {RUN_FILE} in it")
    values = read_json(path, _MAX_RUN)
    if not isinstance(values, dict):
        raise ValueError(f"file={str(path)!r} holds no run: {type(values).__name__} is not an object")
    run = run_from_dict({key: value for key, value in values.items() if key not in BESIDE})
    own = own_tokenizer(folder)
    if run.data.tokenizer != "bytes" and own.is_file():
        run = replace(run, data=replace(run.data, tokenizer=str(own)))
    return run


def read_made(folder: str | Path) -> list[dict[str, Any]]:
    """Return what a run was trained with, one entry for each distinct start; older folders have none.

    Example:
        >>> import tempfile
        >>> from dsv3_jax.presets import recipe
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = claim(folder, recipe("tiny"), made={"commit": "0123abc"})
        ...     read_made(folder)
        [{'commit': '0123abc'}]
    """
    made = read_json(Path(folder) / RUN_FILE, _MAX_RUN).get("made")
    return made if isinstance(made, list) else []


def own_tokenizer(folder: str | Path) -> Path:
    """The file of a run folder's own tokenizer; it may be absent."""
    return tokenizer.file_of(str(folder)) if Path(folder).is_dir() else Path(folder) / TOKENIZER_FILE


def claim(
    folder: str | Path, run: RunConfig, kernels: dict[str, str] | None = None, made: dict[str, Any] | None = None
) -> RunConfig:
    """Make a run folder, or check that it is this run's.

    A tokenizer may be there already. The configuration must be the one the folder was made with, key by key,
    except for its execution and `MAY_CHANGE`, whose changes go into the file's `history`.

    Args:
        kernels: the implementation chosen for each op, to be recorded.
        made: what the run is trained with, see `provenance.made_from`. The file keeps one of each distinct start in
            its list `made`, so that a run that resumes with other code or another text says so.
    Returns: `settled`.
    Raises: ValueError if the folder is another run's, or holds other files.

    Example:
        >>> import tempfile
        >>> from dsv3_jax.presets import recipe
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = claim(folder, recipe("tiny"))
        ...     claim(folder, replace(recipe("tiny"), seed=9))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: seed=9 is not that of the run in ..., 0; choose another --out
    """
    folder = Path(folder)
    if (folder / RUN_FILE).exists():
        held = read_run(folder)
        different = difference(held, run)
        if different:
            key, a, b = different
            raise ValueError(f"{key}={b!r} is not that of the run in {folder}, {a!r}; choose another --out")
        _record(folder / RUN_FILE, changes(held, run), made)
        return settled(run, folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={str(folder)!r} is a file, not a folder for a run")
    of_tokenizer = (TOKENIZER_FILE, tokenizer.TIKTOKEN_FILE, tokenizer.CONFIG_FILE, tokenizer.SPECIALS_FILE)
    if folder.exists() and any(path.name not in of_tokenizer and path.suffix != PART for path in folder.iterdir()):
        raise ValueError(f"out={str(folder)!r} holds other files and no {RUN_FILE}; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    own = own_tokenizer(folder)
    if run.data.tokenizer != "bytes":
        own = tokenizer.keep_copy(run.data.tokenizer, folder)
    run = settled(run, folder)
    name = own.name if run.data.tokenizer == str(own) else run.data.tokenizer
    written = to_dict(replace(run, data=replace(run.data, tokenizer=name)))
    write_atomic(
        folder / RUN_FILE,
        json.dumps(written | {"kernels": kernels or {}} | ({"made": [made]} if made else {}), indent=1) + "\n",
    )
    return run


def changes(held: RunConfig, run: RunConfig) -> dict[str, tuple[int, int]]:
    """The settings of `MAY_CHANGE` that differ: name → (value before, value now).

    Example:
        >>> from dsv3_jax.presets import recipe
        >>> changes(recipe("tiny"), replace(recipe("tiny"), steps=800))
        {'steps': (400, 800)}
    """
    pairs = {name: (getattr(held, name), getattr(run, name)) for name in MAY_CHANGE}
    return {name: (before, now) for name, (before, now) in pairs.items() if before != now}


def _record(file: Path, changed: dict[str, tuple[int, int]], made: dict[str, Any] | None) -> None:
    """Write changed settings into a run's file and add them to its history; add a start to `made` if it is new."""
    values = json.loads(file.read_text())
    before = values.get("made")
    starts = before if isinstance(before, list) else []
    if made and made not in starts:
        values["made"] = [*starts, made]
    elif not changed:
        return
    if changed:
        _add_to_history(values, changed)
    write_atomic(file, json.dumps(values, indent=1) + "\n")


def _add_to_history(values: dict[str, Any], changed: dict[str, tuple[int, int]]) -> None:
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "changed": changed}
    history = values.get("history")
    values["history"] = [*(history if isinstance(history, list) else []), entry]
    values |= {name: now for name, (_, now) in changed.items()}


def settled(run: RunConfig, folder: str | Path) -> RunConfig:
    """A run that has claimed a folder: its tokenizer is its own copy, and paths do not depend on the directory.

    Example:
        >>> from dsv3_jax.config import DataConfig
        >>> from dsv3_jax.presets import recipe
        >>> run = replace(recipe("tiny"), data=DataConfig(paths=("books",)))
        >>> settled(run, "runs/demo").data.paths == (os.path.abspath("books"),)
        True
    """
    own = own_tokenizer(folder)
    tokenizer = str(own) if run.data.tokenizer != "bytes" and own.exists() else run.data.tokenizer
    return replace(run, data=replace(run.data, tokenizer=tokenizer, paths=absolute(run.data.paths)))


def absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Paths that do not depend on the current directory.

    Example:
        >>> absolute(("books",)) == (os.path.join(os.getcwd(), "books"),)
        True
    """
    return tuple(map(_absolute, paths))


def _absolute(path: str) -> str:
    if not hub.is_dataset(path):
        return os.path.abspath(path)
    name = hub.parts_of(path)[0]
    place = os.path.abspath(name) if os.path.exists(name) else name  # a folder, or a name of the hub
    return hub.PREFIX + place + path.removeprefix(hub.PREFIX + name)


def difference(a: RunConfig, b: RunConfig) -> tuple[str, Any, Any] | None:
    """As `first_difference`, of what makes a run this one.

    How it is computed does not, nor from where its text and its other run are named, nor `MAY_CHANGE`. Tokenizers are
    compared by their ids, as far as both can be read.

    Example:
        >>> from dsv3_jax.presets import recipe
        >>> run = recipe("tiny")
        >>> difference(run, replace(run, seed=9)), difference(run, replace(run, execution=Execution("bfloat16")))
        (('seed', 0, 9), None)
    """

    def identity(run: RunConfig) -> dict:
        data = replace(run.data, paths=absolute(run.data.paths), tokenizer="bytes")
        others = {key: value and os.path.abspath(value) for key, value in (("trunk", run.trunk), ("start", run.start))}
        values = to_dict(replace(run, execution=Execution(), data=data, **others))
        return {key: value for key, value in values.items() if key not in MAY_CHANGE}

    found = first_difference(identity(a), identity(b))
    if found is None and not same_tokenizer(a.data.tokenizer, b.data.tokenizer):
        return "data.tokenizer", a.data.tokenizer, b.data.tokenizer
    return found


def same_tokenizer(a: str, b: str) -> bool:
    """Whether two tokenizers give ids the same meaning; a file that is gone is given the benefit of the doubt.

    Example:
        >>> same_tokenizer("bytes", "bytes"), same_tokenizer("bytes", "tokenizer.json")
        (True, False)
    """
    if a == b or "bytes" in (a, b):
        return a == b
    if not Path(a).exists() or not Path(b).exists():
        return True
    return tokenizer.load(a).same_ids(tokenizer.load(b))
