"""Rooms: each changes one thing around a command, and says how the command must end then."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from dsv3_jax.data.manifest import sealed
from dsv3_jax.host.files import file_hash
from dsv3_jax.runs.checksums import write_manifest
from tests.campaign import grammar
from tests.campaign.judging import RESUME, WITH_CHECKSUMS, Draws, Home
from tests.campaign.running import LIMIT_S, Trial


def files(made: Home, rng: Draws) -> Trial:
    """Change a file's content; half of the changes below a checksum are sealed again."""
    kinds = [kind for kind, found in made.readers.items() if (made.home / found[0][0]).is_file()]
    # JSON and jinja count twice
    kind = rng.turn(kinds + [kind for kind in kinds if ".j" in kind])
    path, command = rng.choice(made.readers[kind])
    trial = made.trial(command, path=path)
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


def options(made: Home, rng: Draws) -> Trial:
    """Give options other values: near limits, of other types, hostile texts."""
    command = rng.turn(c for c in made.weighted if c.often > 1)
    found = made.options(command)
    trial = made.trial(command, name="options", limit=3 * LIMIT_S)
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


def kills(made: Home, rng: Draws) -> Trial:
    """Kill a command once or more at any time, then run it again."""
    command = rng.turn(c for c in made.weighted if c.out in c.argv)
    trial = made.trial(command, name="kills", again=True, codes=(0, 2, -9))
    often = rng.choice([1, 1, 2, 3]) if command.argv[0] in RESUME else 1
    trial.kills = [rng.random() * made.usual(command).answer.cpu for _ in range(often)]
    trial.what = f"after {trial.kills} s"
    return trial


# How many of a round, what they do, and the words of a command that they need.
ROOMS: dict[str, tuple[int, Callable[[Home, Draws], Trial], str]] = {
    "files": (10, files, ""),
    "options": (3, options, ""),
    "kills": (4, kills, "--out"),
}
