"""A run's folder: its configuration, its own tokenizer, and whether it is this run's.

A folder can be copied, renamed and used from any directory: what is inside it is named relative to
it, and it holds a copy of its tokenizer. The text that it was trained on stays where it is.
"""

import importlib.metadata
import json
import os
import shlex
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsv3_jax.config import (
    ConfigError,
    Execution,
    RunConfig,
    first_difference,
    from_dict,
    replace,
    to_dict,
)
from dsv3_jax.config.model import ATTENTION_KINDS
from dsv3_jax.data import hub, tokenizer
from dsv3_jax.host.bucket import url_of
from dsv3_jax.host.files import PART, check_writable, read_json, write_atomic
from dsv3_jax.host.imports import IMPORTED
from dsv3_jax.host.lock import LOCK_FILE
from dsv3_jax.ops.balance import RULES
from dsv3_jax.ops.routing import ROUTERS

RUN_FILE, TOKENIZER_FILE = "run.json", "tokenizer.json"
ORIGIN = "released_config.json"  # in a run: config.json of the released folder that it was made of
# files that training writes
REPLACED = (RUN_FILE, "metrics.jsonl", "load.jsonl", "training.png", "routing.png")
# of run folders: raised when parameters or data positions change so that older ones cannot be read
FORMAT = 2
OLDER = "dsv3-jax 0.1.0"  # reads run folders without a format
# Settings that may change when a run is resumed; the learning rate is a function of steps.
MAY_CHANGE = ("steps", "eval_every", "eval_batches", "save_every", "keep", "log_every")
_MAX_RUN = 8_000_000  # bytes of a run.json


def read_run(folder: str | Path) -> RunConfig:
    """Read the configuration of a run folder, whose own tokenizer it names, if there is one.

    Raises: ValueError if the folder holds no run or one of another format, or its configuration
        cannot be read.

    Example:
        >>> import tempfile
        >>> from dsv3_jax.presets import recipe
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = claim(folder, recipe("tiny"))
        ...     read_run(folder) == recipe("tiny")
        True
    """
    values = _read(folder)["run"]
    try:
        run = from_dict(RunConfig, values)
    except ValueError as error:
        if isinstance(model := values.get("model"), dict):
            name = str(model.get("attention", "mla"))
            _check_names(folder, ("attention", name, ATTENTION_KINDS))
        raise ValueError(f"{Path(folder) / RUN_FILE}: {error}") from error
    return _with_own_tokenizer(run, folder)


def read_made(folder: str | Path) -> list[dict[str, Any]]:
    """Return what a run was trained with, an entry for each start unlike the one before.

    Example:
        >>> import tempfile
        >>> from dsv3_jax.presets import recipe
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = claim(folder, recipe("tiny"), made={"commit": "0123abc"})
        ...     read_made(folder)
        [{'commit': '0123abc'}]
    """
    return _read(folder)["made"]


def _read(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise ValueError(f"folder={str(folder)!r} holds no run: there is no {RUN_FILE} in it")
    values = read_json(path, _MAX_RUN)

    # Another format has parameters or data positions that this version cannot read.
    if (found := values.get("format")) != FORMAT:
        reader = OLDER if found is None else "the version that wrote it"
        raise ValueError(
            f"folder={str(folder)!r} has a run of format={found!s:.20}, not {FORMAT}: "
            f"{reader} reads it"
        )
    kinds = {"run": dict, "kernels": dict, "made": list, "history": list}
    if wrong := [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]:
        raise ValueError(f"file={str(path)!r} is damaged: it has no {wrong[0]!r}")
    return values


def check_place(folder: Path) -> None:
    """Check that a run can be written there. Raises: OSError; ValueError for a pattern of Orbax."""
    path = str(folder.absolute())
    if found := [letter for letter in "[*?" if letter in path]:
        raise ValueError(
            f"out={path!r} holds {found[0]!r}, which Orbax reads as a pattern of names; "
            "choose another path"
        )
    check_writable(folder, folders=True)


def claim(
    folder: str | Path,
    run: RunConfig,
    kernels: dict[str, str] | None = None,
    made: dict[str, Any] | None = None,
    words: tokenizer.Tokenizer | None = None,
) -> RunConfig:
    """Make a run folder, or check that it is this run's.

    A tokenizer may be there already. The configuration must be the one the folder was made with,
    key by key, except for its execution and `MAY_CHANGE`, whose changes go into the file's
    `history`.

    Args:
        kernels: the implementation chosen for each op, to be recorded.
        made: what the run is trained with, see `made_from`. The file keeps each start that differs
            from the one before in its list `made`, so that a run that resumes with other code or
            another text says so.
        words: the run's tokenizer, if it is read already.
    Returns: `settled`.
    Raises: ValueError if the folder is another run's, holds other files, or has links to what
        others own.

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
    _refuse_links(folder)

    # A run that has begun: only settings that may change do.
    if (folder / RUN_FILE).exists():
        held = read_run(folder)
        if different := difference(held, run):
            key, a, b = different
            raise ValueError(
                f"{key}={b!r} is not that of the run in {folder}, {a!r}; choose another --out"
            )
        _record(folder, held, run, made)
        return settled(run, folder)

    # A new one keeps its tokenizer. run.json comes last: with it the folder is a run.
    refuse_other_files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if run.data.tokenizer != "bytes":
        tokenizer.keep_copy(run.data.tokenizer, folder, words)
    run = settled(run, folder)

    # The file names the tokenizer relative to the folder, which can then be moved.
    inside = replace(run, data=replace(run.data, tokenizer=Path(run.data.tokenizer).name))
    written = {"format": FORMAT, "run": to_dict(inside)}
    written |= {"kernels": kernels or {}, "made": [made] if made else [], "history": []}
    write_atomic(folder / RUN_FILE, json.dumps(written, indent=1) + "\n")
    return run


def _refuse_links(folder: Path) -> None:
    """Check that training in a folder writes into no other. Raises: ValueError."""
    for path in (folder / name for name in REPLACED):
        if path.is_symlink():  # training would write through it
            raise ValueError(
                f"file={str(path)!r} is a link to {os.readlink(path)!r}; "
                "replace it by the file itself"
            )
    # another folder, if checkpoints/ is a link
    held_in = Path(os.path.realpath(folder / "checkpoints")).parent
    if held_in != folder.resolve() and (held_in / RUN_FILE).exists():
        raise ValueError(
            f"{folder}/checkpoints is a link into the run {held_in}, "
            "whose checkpoints would be deleted"
        )


def refuse_other_files(folder: Path) -> None:
    """Check that a new run's folder is empty, but for its tokenizer. Raises: ValueError."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={str(folder)!r} is a file, not a folder for a run")

    # A start that is killed before it writes run.json leaves some of these.
    may_be_there = (
        LOCK_FILE,
        TOKENIZER_FILE,
        tokenizer.TIKTOKEN_FILE,
        tokenizer.CONFIG_FILE,
        tokenizer.SPECIALS_FILE,
    )
    there = list(folder.iterdir()) if folder.exists() else []
    if any(path.name not in may_be_there and path.suffix != PART for path in there):
        raise ValueError(
            f"out={str(folder)!r} holds other files and no {RUN_FILE}; choose another --out"
        )


def _record(folder: Path, held: RunConfig, run: RunConfig, made: dict[str, Any] | None) -> None:
    """Write changed settings into run.json and its history, and a start unlike the last."""
    values = _read(folder)
    if made and [made] != values["made"][-1:]:
        values["made"].append(made)

    # Settings that changed: both values go into the history, the new ones into the run.
    before, now = vars(held), vars(run)
    changed = {name: (before[name], now[name]) for name in MAY_CHANGE if before[name] != now[name]}
    if changed:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        values["history"].append({"time": time, "changed": changed})
        values["run"] |= {name: now[name] for name in changed}
    write_atomic(folder / RUN_FILE, json.dumps(values, indent=1) + "\n")


def made_from(data: str, words: str, checker: str = "") -> dict[str, Any]:
    """Return the commit, versions, fingerprints of text, tokenizer and checker, imported programs.

    `commit` and `dirty` are None for a package that git does not track. `dirty` says that tracked
    files of the package differ from the commit.

    Example:
        >>> list(made_from("0123", "4567"))
        ['commit', 'dirty', 'version', 'jax', 'corpus', 'tokenizer']
    """
    commit, dirty = _commit()
    made: dict[str, Any] = {
        "commit": commit,
        "dirty": dirty,
        "version": importlib.metadata.version("dsv3-jax"),
        "jax": importlib.metadata.version("jax"),
        "corpus": data,
        "tokenizer": words,
    }
    # Most runs have no programs of the user's own.
    if IMPORTED:
        made["imports"] = list(IMPORTED)
    if checker:
        made["checker"] = checker
    return made


def check_registered(run: RunConfig, folder: str | Path) -> None:
    """Check that a run's router and rule are registered, if programs did that when it was trained.

    The programs are not imported: the folder may be a stranger's. `read_run` checks the attention.

    Raises: ConfigError that names them.
    """
    model = run.model
    _check_names(
        folder, ("router", model.router, ROUTERS), ("balance rule", model.balance.rule, RULES)
    )


def _check_names(folder: str | Path, *settings: tuple[str, str, Mapping[str, Any]]) -> None:
    """Check (setting, value, table); a value that is not in its table is a program's."""
    unknown = [
        f"{setting}={value!r:.80}" for setting, value, table in settings if value not in table
    ]
    if not unknown:
        return

    # The programs that its starts named; the file may hold anything.
    starts = [start for start in read_made(folder) if isinstance(start, dict)]
    lists = [start["imports"] for start in starts if isinstance(start.get("imports"), list)]
    names = dict.fromkeys(name for names in lists for name in names if isinstance(name, str))
    if names:
        options = " ".join(f"--import {shlex.quote(name)}" for name in names)
        raise ConfigError(
            f"{unknown[0]} of the run in {folder} is registered by a program, "
            "which no folder starts by itself; "
            f"if you trust that program, add {options}"
        )


@lru_cache
def _commit() -> tuple[str | None, bool | None]:
    def git(*words: str) -> str:
        package = Path(__file__).parents[1]
        command = ["git", "-C", str(package), *words]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=20)

    # Only a commit that tracks this package counts: it may be installed inside another repository.
    try:
        if git("ls-files", "--", "."):
            commit = git("rev-parse", "HEAD").strip()
            return commit, bool(git("status", "--porcelain", "--untracked-files=no", "--", "."))
    except (OSError, subprocess.SubprocessError):
        pass
    return None, None


def settled(run: RunConfig, folder: str | Path) -> RunConfig:
    """A run that has claimed a folder: its tokenizer is its copy, and its paths hold anywhere.

    Example:
        >>> from dsv3_jax.config import DataConfig
        >>> from dsv3_jax.presets import recipe
        >>> run = replace(recipe("tiny"), data=DataConfig(paths=("books",)))
        >>> settled(run, "runs/demo").data.paths == (os.path.abspath("books"),)
        True
    """
    run = _with_own_tokenizer(run, folder)
    return replace(run, data=replace(run.data, paths=tuple(map(hub.absolute, run.data.paths))))


def _with_own_tokenizer(run: RunConfig, folder: str | Path) -> RunConfig:
    own = tokenizer.file_of(str(folder))
    if run.data.tokenizer == "bytes" or not own.is_file():
        return run
    return replace(run, data=replace(run.data, tokenizer=str(own)))


def difference(a: RunConfig, b: RunConfig) -> tuple[str, Any, Any] | None:
    """As `first_difference`, of what makes a run this one.

    Not compared: execution, how paths of the text and of the other run are written, and
    `MAY_CHANGE`. Tokenizers are compared by their ids.

    Example:
        >>> from dsv3_jax.presets import recipe
        >>> run = recipe("tiny")
        >>> executed = replace(run, execution=Execution("bfloat16"))
        >>> difference(run, replace(run, seed=9)), difference(run, executed)
        (('seed', 0, 9), None)
    """

    def identity(run: RunConfig) -> dict:
        # Paths from any directory; tokenizers are compared below.
        data = replace(run.data, paths=tuple(map(hub.absolute, run.data.paths)), tokenizer="bytes")
        trunk = run.trunk and (url_of(run.trunk) or os.path.abspath(run.trunk))
        start = run.start and (url_of(run.start) or os.path.abspath(run.start))
        run = replace(run, execution=Execution(), data=data, trunk=trunk, start=start)
        return {key: value for key, value in to_dict(run).items() if key not in MAY_CHANGE}

    found = first_difference(identity(a), identity(b))
    if found is None and not same_tokenizer(a.data.tokenizer, b.data.tokenizer):
        return "data.tokenizer", a.data.tokenizer, b.data.tokenizer
    return found


def same_tokenizer(a: str, b: str) -> bool:
    """Whether two tokenizers give ids the same meaning; a missing file counts as equal.

    Example:
        >>> same_tokenizer("bytes", "bytes"), same_tokenizer("bytes", "tokenizer.json")
        (True, False)
    """
    if a == b or "bytes" in (a, b):
        return a == b
    if not Path(a).exists() or not Path(b).exists():
        return True
    return tokenizer.load(a).same_ids(tokenizer.load(b))
