"""Rooms: each changes one thing around a command, and says how the command must end then."""

import contextlib
import json
import os
import re
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
from tests.campaign.commands import LIMIT_S, Trial
from tests.campaign.fuzz import WITH_CHECKSUMS, Draws, Home, kind_of

TERMINALS = ({}, {"out": "terminal", "err": "terminal"})


def files(made: Home, rng: Draws) -> Trial:
    """Change a file's content; half of the changes below a checksum are sealed again."""
    kinds = [kind for kind, found in made.readers.items() if (made.home / found[0][0]).is_file()]
    # JSON and jinja count twice
    path, command = rng.choice(
        made.readers[rng.turn(kinds + [kind for kind in kinds if ".j" in kind])]
    )
    trial = made.trial(command, streams=rng.choice(TERMINALS), path=path)
    before = (trial.folder / path).read_bytes()
    how, after = grammar.change(before, rng)
    (trial.folder / path).write_bytes(after)
    trial.limit += len(after) * 2e-6  # a core splits and tokenizes 0.9 MB/s
    is_sealed = (
        rng.random() < 0.5 and bool(WITH_CHECKSUMS & set(path.parts)) and seal(trial.folder, path)
    )
    trial.name = f"files: {how}{', sealed' if is_sealed else ''}"
    trial.same = bool(WITH_CHECKSUMS & set(path.parts)) and not is_sealed
    if how == "mood":
        trial.again, trial.between = True, lambda: written(trial.folder / path, before)
    at = len(os.path.commonprefix([before[:10_000], after[:10_000]]))
    was, now = before[at : at + 60], after[at : at + 60]
    trial.what = f"{path}, byte {at}: {was!r} -> {now!r}, {len(after):,} bytes"
    return trial


def written(path: Path, data: bytes) -> set[str]:
    path.write_bytes(data)
    return set()


def seal(folder: Path, path: Path) -> bool:
    """Let checksums agree with a changed file. Returns: whether they do now."""
    with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError, OSError):
        if path.parts[1:2] == ("checkpoints",):
            if path.name != "checksums.json":
                write_manifest(folder.joinpath(*path.parts[:3]))
            return True
        manifest = folder / path
        if path.suffix == ".array_record":
            manifest = manifest.with_name("manifest.json")
        values = json.loads(manifest.read_bytes())
        values.pop("seal")
        if path != manifest.relative_to(folder):
            facts = {"bytes": (folder / path).stat().st_size, "hash": file_hash(folder / path)}
            values["files"][path.name] |= facts
        manifest.write_text(sealed(values))
        return True
    return False


PLACES = {
    "pipe": ["pipe"],
    "many": ["many"],
    "renamed": ["renamed"],
    "endless": ["/dev/zero", "/dev/full", "hole"],
    "other": ["empty", "folder", "nowhere", ".", "absent", "unreadable"],
}


def places(made: Home, rng: Draws) -> Trial:
    """Put something else in the place of a file or folder, also of one that is only looked for."""
    kind = rng.turn(made.readers)
    path, command = rng.choice(made.readers[kind])
    place = rng.turn(["pipe", "other"] if kind.startswith("absent") else PLACES)
    if path.name == "mood.py":  # the user's own program reads it, for as long as it likes
        place = "renamed"
    trial = made.trial(command, streams=rng.choice(TERMINALS[place == "renamed" :]), path=path)
    file, kind = trial.folder / path, rng.choice(PLACES[place])
    trial.name = f"places: {place}"
    trial.what = f"{path}: {kind}"
    trial.same = bool(WITH_CHECKSUMS & set(path.parts))
    if kind == "unreadable" and file.exists():
        trial.request = as_nobody(trial.folder)
        file.chmod(rng.choice([0o000, 0o444]))
    elif kind == "many":
        for i in range(500):
            copy = file.with_name(f"{file.stem}-{i}{file.suffix}")
            if file.is_file():
                os.link(file, copy)
            else:
                shutil.copytree(file, copy, copy_function=os.link)
    elif kind == "renamed":
        trial.what = f"{path}: renamed {(name := file.name[:1] + rng.choice(grammar.NAMES))!r}"
        file.rename(file.with_name(name))
    else:
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        make = {
            "pipe": os.mkfifo,
            "empty": Path.touch,
            "folder": Path.mkdir,
            "absent": bool,
            "hole": Path.touch,
        }
        make.get(kind, lambda file: file.symlink_to(kind))(file)
        os.truncate(file, 20 << 30) if kind == "hole" else None
    return trial


def as_nobody(folder: Path) -> dict[str, Any]:
    """Give a folder to a user without rights. Returns: words for the server."""
    subprocess.run(["chmod", "-R", "a+rwX", folder], check=True)
    return {"nobody": os.getuid() == 0}


def names(made: Home, rng: Draws) -> Trial:
    """Give a hostile name to what a command reads or writes, or to the folder in which it runs."""
    name = rng.turn(grammar.NAMES + grammar.LONG_NAMES)
    command = rng.turn(c for c in made.weighted if c.code == 0)
    trial = made.trial(command, streams=rng.choice(TERMINALS), again=True, early=True)
    word = rng.choice(
        [".", *(x for x in command.argv if x == command.out or (made.home / x).exists())]
    )
    trial.name = f"names: {'folder' if word == '.' else 'argument'}"
    trial.what = f"{word} is {name[:300]!r}"
    new = trial.folder.parent / name if word == "." else trial.folder / name
    with contextlib.suppress(OSError):  # a name that the system itself refuses
        new.parent.mkdir(parents=True, exist_ok=True)
        (trial.folder if word == "." else trial.folder / word).rename(new)
    if word == ".":
        trial.folder = new if new.exists() else trial.folder
    elif new.exists() or word == command.out:
        trial.out = name if word == command.out else trial.out
        trial.argv = [f"./{name}" if x == word else x for x in command.argv]
    trial.same = True
    return trial


def options(made: Home, rng: Draws) -> Trial:
    """Give options other values: near limits, of other types, hostile texts."""
    command = rng.turn(c for c in made.weighted if c.often > 1)
    trial = made.trial(command, streams=rng.choice(TERMINALS), name="options")
    found = made.options(command)
    for name, choices, usual in (
        [rng.turn(found), *rng.sample(found, rng.choice([0, 0, 1]))] if found else ()
    ):
        with contextlib.suppress(ValueError):
            usual = json.loads(usual or "")
        value = rng.choice(
            [*choices, str(grammar.value_near(usual, rng))[:100_000], "nowhere", "run", ""]
        )
        trial.argv = trial.argv + (
            [name] if usual is None and rng.random() < 0.5 else [name, value]
        )
    trial.argv = [word.replace("\0", "\1").encode(errors="replace").decode() for word in trial.argv]
    trial.limit = 3 * LIMIT_S
    return trial


def streams(made: Home, rng: Draws) -> Trial:
    """Close or fill stdin, stdout, stderr; half of the commands are to print an error."""
    command, wrong = rng.turn(made.weighted), rng.random() < 0.5
    which = rng.sample(["out", "err"], rng.choice([1, 1, 2]))
    given = {name: rng.choice([None, "/dev/full", "head", "terminal"]) for name in which}
    trial = made.trial(command, streams=given, name="streams", codes=(0, 2, 141))
    if wrong:
        trial.argv = ["nowhere" if (made.home / word).exists() else word for word in command.argv]
    trial.stdin = None if rng.random() < 0.3 else command.stdin
    if given.get("out") == "/dev/full" and made.usual(command).answer.out and not wrong:
        trial.codes = (2, 141)
    trial.what = f"{given}, stdin {'closed' if trial.stdin is None else 'open'}"
    return trial


SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
ERRORS = ["EIO", "EACCES", "ENOSPC", "EMFILE", "EROFS"]
MOMENTS = [*ERRORS, *SIGNALS, "delete", "link", "link", "power", "power"]
# another time, Ctrl-Z, a folder that moves, an input that changes
SURPRISES = ["clock", "suspend", "move", "write"]


def disturb(actions: list[str], made: Home, rng: Draws) -> Trial:
    """Disturb a command when it touches a path."""
    action = rng.turn(actions)
    writers = [c for c in made.weighted if c.out in c.argv and c.code == 0]
    command = rng.turn(writers if action == "power" and writers else made.weighted)
    kinds, touched = dict[str, list[int]](), made.usual(command).touched
    for i, path in enumerate(touched):
        if action == "write" and not (made.home / path).is_file():
            continue
        # nor in the command's own folder
        if action != "link" or not ((made.home / path).exists() or ".part/" in path):
            kinds.setdefault(kind_of(Path(path)), []).append(i + 1)
    at = rng.choice(kinds[rng.choice(sorted(kinds))]) if kinds else 1
    action, path = action if kinds else "clock", [*touched, ""][at - 1]
    trial = made.trial(
        command, request={"at": at, "action": action}, again=action not in ("delete", "link")
    )
    trial.name, trial.what = f"moment: {action}", f"at touch {at} ({path})"
    trial.codes = (0, 2, SIGNALS.get(action, 0))
    if action == "suspend":
        trial.streams = TERMINALS[1]
    elif action == "clock":
        trial.request["jump"] = rng.choice([-1e9, -7200, 3600, 1e8])
        trial.what += f", by {trial.request['jump']} s"
    elif action == "move":
        trial.between = lambda: moved_back(trial.folder, path)
    elif action == "write":
        trial.changed = {
            Path(path): grammar.change_slightly((made.home / path).read_bytes() * 2, rng)
        }
        (trial.folder / "written").write_bytes(trial.changed[Path(path)])
        trial.request["written"] = str(trial.folder / "written")
    elif action == "power":
        stop = rng.random() < 0.7
        trial.request |= {
            "synced": True,
            "log": str(made.log),
            "at": at if stop else None,
            "action": "SIGKILL",
        }
        trial.codes = (0, -9)
        known = {path.lstat().st_ino: path.lstat() for path in trial.folder.rglob("*")}
        made.log.write_bytes(b"")
        trial.between = lambda: lose(trial.folder, known, made.log.read_text(errors="replace"), rng)
    return trial


def moved_back(folder: Path, path: str) -> set[str]:
    """Move a folder back to its place. Returns: the fault if something has grown there."""
    top = folder / Path(path).parts[0]
    if (folder / "moved").exists():
        if top.is_dir() and any(x.is_file() for x in top.rglob("*")):
            return {"recreated"}
        shutil.rmtree(top) if top.is_dir() else top.unlink(missing_ok=True)
        (folder / "moved").rename(top)
    return set()


def lose(folder: Path, known: dict[int, os.stat_result], log: str, rng: Draws) -> set[str]:
    """Let files end where they were last synced, as at a power loss; TensorStore syncs its own."""
    synced = {
        int(inode): int(size)
        for inode, size in re.findall(r"^synced (\d+) (\d+)$", log, re.MULTILINE)
    }
    for path in folder.rglob("*"):
        status = path.lstat()
        before = known.get(status.st_ino)
        is_named = {"d", "manifest.ocdbt"} & {path.name, path.parent.name}
        is_array = "checkpoints" in path.parts and is_named
        if (
            path.is_file()
            and not is_array
            and (before is None or before.st_mtime_ns != status.st_mtime_ns)
        ):
            sure = synced.get(status.st_ino, before.st_size if before else 0)
            if sure < status.st_size:
                os.truncate(path, rng.randint(sure, status.st_size))
                # the rest may be zeros
                os.truncate(path, rng.choice([path.stat().st_size, status.st_size]))
    return set()


def stop(ways: list[str], made: Home, rng: Draws) -> Trial:
    """Kill a command once or more, or let the system refuse something; then run it again."""
    how = rng.turn(ways)
    command = rng.turn(c for c in made.weighted if c.out in c.argv)
    times = [rng.random() * made.usual(command).answer.cpu for _ in range(rng.choice([1, 1, 2, 3]))]
    trial = made.trial(command, name=f"stop: {how}", again=True)
    if how == "killed":
        trial.kills = times if command.argv[0] in ("train", "data") else times[:1]
        trial.codes = (0, 2, -9)
    else:
        most = {
            "NPROC": rng.randrange(90),
            "NOFILE": rng.randrange(4, 90),
            "AS": 10 ** rng.uniform(8.5, 10),
        }
        trial.request = {"ulimits": {how: int(most.get(how, 10 ** rng.uniform(2, 5.3)))}}
        # threads that cannot start end a process in C++
        trial.codes = (0, 2) if how == "FSIZE" else ()
        # NPROC does not bind root
        trial.request |= as_nobody(trial.folder) if how == "NPROC" else {}
    trial.what = f"after {times} s" if how == "killed" else f"{trial.request}"
    return trial


def surroundings(made: Home, rng: Draws) -> Trial:
    """Kill a command that resumes, and change something that its result depends on."""
    resumes = {"train", "data", "--prompts"}
    command = rng.turn(
        c for c in made.weighted if c.out in c.argv and resumes & set(c.argv) and c.code == 0
    )
    touched = made.usual(command).touched
    own = [
        i + 1
        for i, path in enumerate(touched)
        if Path(path).parts[0] in (command.out, f"{command.out}.part")
    ]
    kinds = dict[str, list[Path]]()
    for path in made.inputs(command):
        file = made.home / path
        if file.is_file() and file.stat().st_size > 9 and not WITH_CHECKSUMS & set(path.parts):
            kinds.setdefault(kind_of(path), []).append(path)
    stop = {"at": rng.choice(own or [1]), "action": "SIGKILL"}
    trial = made.trial(command, again=True, codes=(0, -9), request=stop)
    trial.path = rng.choice(kinds[rng.turn(sorted(kinds))])
    after = grammar.change_slightly((made.home / trial.path).read_bytes(), rng)
    trial.changed = {trial.path: after}
    trial.between = lambda: written(trial.folder / trial.path, after)
    trial.name = "surroundings"
    trial.what = f"stopped at touch {trial.request['at']}, then {trial.path} is changed"
    return trial


def numbers(made: Home, rng: Draws) -> Trial:
    """Train so that numbers overflow, losses jump, and experts have no tokens or all of them."""
    command = rng.turn(
        c
        for c in made.commands
        if c.words.startswith("train tiny") and c.code == 0 and c.out == "out"
    )
    settings = grammar.HOSTILE["numbers"]
    chosen = [rng.turn(settings), *rng.sample(settings, rng.choice([0, 1, 2]))]
    trial = made.trial(command, name="numbers")
    trial.argv, trial.limit = [*command.argv, *" ".join(chosen).split()], 3 * LIMIT_S
    trial.between = lambda: by_other_kernels(made, trial)
    return trial


def by_other_kernels(made: Home, trial: Trial) -> set[str]:
    """Name the fault if the first loss is not that of other kernels."""
    words = {"out": "other", "grouped_swiglu=dense": "auto"}
    made.server.run(replace(trial, argv=[words.get(word, word) for word in trial.argv]))
    losses = []
    for top in ("out", "other"):
        with contextlib.suppress(OSError, LookupError):
            losses.append(runs.rows_of(trial.folder / top)[0]["loss"])
    part = 0.05 if {"bfloat16", "fp8"} & set(trial.argv) else 1e-3
    return (
        {"silent"}
        if len(losses) == 2 and not abs(losses[0] - losses[1]) <= part * losses[0]
        else set()
    )


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
    "limits": (1, partial(stop, ["NPROC", "NOFILE", "NPROC", "AS"]), "--out"),
    "surroundings": (3, surroundings, "--out"),
    "numbers": (2, numbers, "train tiny"),
}
