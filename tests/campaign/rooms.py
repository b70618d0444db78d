"""Rooms: each changes one thing around a command, and says how the command must end then."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import runs

from dsv3_jax.data.manifest import sealed
from dsv3_jax.host.files import file_hash
from dsv3_jax.runs.checksums import write_manifest
from tests.campaign import grammar
from tests.campaign.judging import RESUME, WITH_CHECKSUMS, Draws, Home, kind_of
from tests.campaign.running import LIMIT_S, Trial

TERMINALS = ({}, {"out": "terminal", "err": "terminal"})


def files(made: Home, rng: Draws) -> Trial:
    """Change a file's content; half of the changes below a checksum are sealed again."""
    kinds = [kind for kind, found in made.readers.items() if (made.home / found[0][0]).is_file()]
    # JSON and jinja count twice
    kind = rng.turn(kinds + [kind for kind in kinds if ".j" in kind])
    path, command = rng.choice(made.readers[kind])
    trial = made.trial(command, streams=rng.choice(TERMINALS), path=path)
    how, after = grammar.change(before := (trial.folder / path).read_bytes(), rng)
    (trial.folder / path).write_bytes(after)
    trial.limit += len(after) * 2e-6  # a core splits and tokenizes 0.9 MB/s
    guarded = bool(WITH_CHECKSUMS & set(path.parts))
    again = guarded and rng.random() < 0.5 and seal(trial.folder, path)
    trial.name, trial.same = f"files: {how}{', sealed' if again else ''}", guarded and not again
    at = len(os.path.commonprefix([before[:10_000], after[:10_000]]))
    was, now = before[at : at + 60], after[at : at + 60]
    trial.what = f"{path}, byte {at}: {was!r} -> {now!r}, {len(after):,} bytes"
    return trial


def seal(folder: Path, path: Path) -> bool:
    """Let checksums agree with a changed file. Returns: whether they do now."""
    with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError, OSError):
        if "checkpoints" in path.parts:
            if path.name != "checksums.json":
                write_manifest(folder.joinpath(*path.parts[:3]))
            return True
        manifest = (folder / path).with_name("manifest.json")
        values = json.loads(manifest.read_bytes())
        values.pop("seal")
        if path.name != manifest.name:
            facts = {"bytes": (folder / path).stat().st_size, "hash": file_hash(folder / path)}
            values["files"][path.name] |= facts
        manifest.write_text(sealed(values))
        return True
    return False


DEVICES = ["/dev/zero", "/dev/full"]
PLACES = {
    "pipe": ["pipe"],
    "renamed": ["renamed"],
    "endless": [*DEVICES, "hole"],
    "other": ["empty", "folder", "nowhere", ".", "absent", "unreadable"],
}


def places(made: Home, rng: Draws) -> Trial:
    """Put something else in the place of a file or folder, also of one that is only looked for."""
    kind = rng.turn(made.readers)
    path, command = rng.choice(made.readers[kind])
    place = rng.turn(["pipe", "other"] if kind.startswith("absent") else PLACES)
    trial = made.trial(command, streams=rng.choice(TERMINALS[place == "renamed" :]), path=path)
    file, kind = trial.folder / path, rng.choice(PLACES[place])
    trial.name, trial.what = f"places: {place}", f"{path}: {kind}"
    trial.same = bool(WITH_CHECKSUMS & set(path.parts))
    if path.parent.name == "checkpoints" and kind in ("renamed", "absent"):
        trial.same = False  # a run with one checkpoint less is one of an earlier step
    if kind == "unreadable" and file.exists():
        trial.request = as_nobody(trial.folder)
        file.chmod(rng.choice([0o000, 0o444]))
    elif kind == "renamed":
        name = file.name[:1] + rng.choice([x for x in grammar.NAMES if "/" not in x])
        trial.what += f" to {name!r}"
        file.rename(file.with_name(name))
    else:
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind in (*DEVICES, "nowhere", "."):
            file.symlink_to(kind)
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        elif kind in ("empty", "hole"):
            file.touch()
            os.truncate(file, 20 << 30 if kind == "hole" else 0)
    return trial


def as_nobody(folder: Path) -> dict[str, Any]:
    """Give a folder to a user without rights. Returns: words for the server."""
    subprocess.run(["chmod", "-R", "a+rwX", folder], check=True)
    return {"nobody": os.getuid() == 0}


def names(made: Home, rng: Draws) -> Trial:
    """Give a hostile name to what a command reads or writes, or to the folder in which it runs."""
    name = rng.turn(grammar.NAMES + grammar.LONG_NAMES)
    command = rng.turn(c for c in made.weighted if c.code == 0)
    trial = made.trial(command, streams=rng.choice(TERMINALS), again=True, early=True, same=True)
    paths = [x for x in command.argv if x == command.out or (made.home / x).exists()]
    word = rng.choice([".", *paths])
    trial.name = f"names: {'folder' if word == '.' else 'argument'}"
    trial.what = f"{word} is {name[:300]!r}"
    new = (trial.folder.parent if word == "." else trial.folder) / name
    with contextlib.suppress(OSError):  # a name that the system itself refuses
        new.parent.mkdir(parents=True, exist_ok=True)
        (trial.folder / word).resolve().rename(new)
    if word == ".":
        trial.folder = new if new.exists() else trial.folder
    elif new.exists() or word == command.out:
        trial.out = name if word == command.out else trial.out
        trial.argv = [f"./{name}" if x == word else x for x in command.argv]
        # a result may have the name of what it was made of
        trial.same = trial.again = word == command.out
    return trial


def options(made: Home, rng: Draws) -> Trial:
    """Give options other values: near limits, of other types, hostile texts."""
    command = rng.turn(c for c in made.weighted if c.often > 1)
    found = made.options(command)
    trial = made.trial(command, streams=rng.choice(TERMINALS), name="options", limit=3 * LIMIT_S)
    some = [rng.turn(found), *rng.sample(found, rng.choice([0, 0, 1]))] if found else []
    for name, choices, usual in some:
        with contextlib.suppress(ValueError):
            usual = json.loads(usual or "")
        near = str(grammar.value_near(usual, rng))[:100_000]
        value = rng.choice([*choices, near, "nowhere", "run", ""])
        is_flag = usual is None and rng.random() < 0.5
        trial.argv = [*trial.argv, name, *([] if is_flag else [value])]
    trial.argv = [word.replace("\0", "\1").encode(errors="replace").decode() for word in trial.argv]
    return trial


def streams(made: Home, rng: Draws) -> Trial:
    """Close or fill stdin, stdout, stderr; half of the commands are to print an error."""
    command, wrong = rng.turn(made.weighted), rng.random() < 0.5
    which = rng.sample(["out", "err"], rng.choice([1, 1, 2]))
    given = {name: rng.choice([None, "/dev/full", "head", "terminal"]) for name in which}
    trial = made.trial(command, streams=given, name="streams", codes=(0, 2, 141))
    if wrong:
        trial.argv = ["nowhere" if (made.home / word).exists() else word for word in command.argv]
    elif given.get("out") == "/dev/full" and made.usual(command).answer.out:
        trial.codes = (2, 141)
    trial.stdin = None if rng.random() < 0.3 else command.stdin
    trial.what = f"{given}, stdin {'closed' if trial.stdin is None else 'open'}"
    return trial


SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
ERRORS = ["EIO", "EACCES", "ENOSPC", "EMFILE", "EROFS"]
MOMENTS = [*ERRORS, *SIGNALS, "delete", "link"]
SURPRISES = ["clock", "SIGSTOP", "write"]


def disturb(actions: list[str], made: Home, rng: Draws) -> Trial:
    """Disturb a command when it touches a path."""
    action = rng.turn(actions)
    command = rng.turn(made.weighted)
    kinds, touched = dict[str, list[int]](), made.usual(command).touched
    for i, path in enumerate(touched):
        there = (made.home / path).exists()
        unfit = {"write": not (made.home / path).is_file(), "link": there or ".part/" in path}
        if not unfit.get(action):  # no link in the command's own folder
            kinds.setdefault(kind_of(Path(path)), []).append(i + 1)
    at = rng.choice(kinds[rng.choice(sorted(kinds))]) if kinds else 1
    action, path = action if kinds else "clock", [*touched, ""][at - 1]
    trial = made.trial(command, again=action not in ("delete", "link"))
    trial.request = {"at": at, "action": action}
    trial.name, trial.what = f"moment: {action}", f"at touch {at} ({path})"
    trial.codes = (0, 2, SIGNALS.get(action, 0))
    if action == "clock":
        trial.request["jump"] = rng.choice([-1e9, -7200, 3600, 1e8])
        trial.what += f", by {trial.request['jump']} s"
    elif action == "write":
        after = grammar.change_slightly((made.home / path).read_bytes() * 2, rng)
        trial.changed = {Path(path): after}
        (trial.folder / "written").write_bytes(after)
    return trial


# What the system refuses: the powers of ten between which its limit lies.
LIMITS = {"FSIZE": (2, 5.3), "NPROC": (0, 1.95), "NOFILE": (0.6, 1.95), "AS": (8.5, 10)}


def stop(ways: list[str], made: Home, rng: Draws) -> Trial:
    """Kill a command once or more, or let the system refuse something; then run it again."""
    how = rng.turn(ways)
    command = rng.turn(c for c in made.weighted if c.out in c.argv)
    trial = made.trial(command, name=f"stop: {how}", again=True)
    if how == "killed":
        often = rng.choice([1, 1, 2, 3]) if command.argv[0] in RESUME else 1
        trial.kills = [rng.random() * made.usual(command).answer.cpu for _ in range(often)]
        trial.codes, trial.what = (0, 2, -9), f"after {trial.kills} s"
    else:
        # NPROC does not bind root
        trial.request = as_nobody(trial.folder) if how == "NPROC" else {}
        trial.request["ulimits"] = {how: int(10 ** rng.uniform(*LIMITS[how]))}
        # threads that cannot start end a process in C++
        trial.codes = (0, 2) if how == "FSIZE" else ()
        trial.what = f"{trial.request}"
    return trial


def surroundings(made: Home, rng: Draws) -> Trial:
    """Kill a command that resumes, and change something that its result depends on."""
    resumes = {"train", "data", "--prompts"}
    writers = [c for c in made.weighted if c.out in c.argv and c.code == 0]
    command = rng.turn(c for c in writers if resumes & set(c.argv))
    own = (command.out, f"{command.out}.part")
    touched = enumerate(made.usual(command).touched, 1)
    kinds = dict[str, list[Path]]()
    for path in made.inputs(command):
        file = made.home / path
        if file.is_file() and file.stat().st_size > 9 and not WITH_CHECKSUMS & set(path.parts):
            kinds.setdefault(kind_of(path), []).append(path)
    at = rng.choice([i for i, path in touched if Path(path).parts[0] in own] or [1])
    trial = made.trial(command, again=True, codes=(0, -9), name="surroundings")
    trial.request = {"at": at, "action": "SIGKILL"}
    path = trial.path = rng.choice(kinds[rng.turn(sorted(kinds))])
    after = grammar.change_slightly((made.home / path).read_bytes(), rng)
    trial.changed = {path: after}
    trial.between = lambda: (trial.folder / path).write_bytes(after) and set()
    trial.what = f"stopped at touch {at}, then {path} is changed"
    return trial


def numbers(made: Home, rng: Draws) -> Trial:
    """Train so that numbers overflow, losses jump, and experts have no tokens or all of them."""
    trains = [c for c in made.commands if c.words.startswith("train tiny --out out")]
    command, settings = rng.turn(trains), grammar.HOSTILE["numbers"]
    chosen = [rng.turn(settings), *rng.sample(settings, rng.choice([0, 1, 2]))]
    trial = made.trial(command, name="numbers", limit=3 * LIMIT_S)
    trial.argv = [*command.argv, *" ".join(chosen).split()]

    def by_other_kernels() -> set[str]:
        words = {"out": "other", "grouped_swiglu=dense": "auto"}
        made.server.run(replace(trial, argv=[words.get(word, word) for word in trial.argv]))
        losses = []
        for top in ("out", "other"):
            with contextlib.suppress(OSError, LookupError):
                losses.append(runs.rows_of(trial.folder / top)[0]["loss"])
        part = 0.05 if {"bfloat16", "fp8"} & set(trial.argv) else 1e-3
        apart = len(losses) == 2 and not abs(losses[0] - losses[1]) <= part * losses[0]
        return {"silent"} if apart else set()

    trial.between = by_other_kernels
    return trial


# How many of a round, what they do, and the words of a command that they need.
ROOMS: dict[str, tuple[int, Callable[[Home, Draws], Trial], str]] = {
    "files": (10, files, ""),
    "places": (6, places, ""),
    "names": (4, names, ""),
    "options": (3, options, ""),
    "streams": (2, streams, ""),
    "moments": (4, partial(disturb, MOMENTS), ""),
    "surprises": (4, partial(disturb, SURPRISES), ""),
    "kills": (2, partial(stop, ["killed", "FSIZE"]), "--out"),
    "limits": (1, partial(stop, ["NPROC", "NOFILE", "AS"]), "--out"),
    "surroundings": (3, surroundings, "--out"),
    "numbers": (2, numbers, "train tiny"),
}
