"""Disks that are full or cannot be written, and files that may not grow.

Training must end in a sentence and leave whole checkpoints. With room, the same command must end as the undisturbed
run. Small disks are tmpfs, which only root can mount. For other users they are left out with a line.
"""

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import runs

from tests.campaign.small_runs import Base, base, ends_the_same, half_written, limit_of
from tests.campaign.trials import Table, faults_of, report, trials, watch

LIMITED = runs.dsv3(f"""{runs.SPEND_NO_SECONDS}
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
del sys.argv[1]
""")


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a disk of `size` bytes."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a small disk."""
    try:
        with small_disk(folder, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        shutil.rmtree(folder)


def full_disk(made: Base, folder: Path, rng: random.Random) -> tuple[list[str], str]:
    """Train on a disk that fills up; then give it room."""
    with small_disk(folder, rng.randrange(100, 1500) << 10):
        process = runs.start(made.train(folder / "run"), made.root)
        ended = watch(process, limit_of(made))
        faults = faults_of(ended, (0, 2)) + half_written(folder / "run")
        remount(folder, "size=64m")
        return faults + finish(made, folder / "run"), ended.err


def file_size(made: Base, folder: Path, rng: random.Random) -> tuple[list[str], str]:
    """Train where no file may be larger than some bytes; then without that."""
    size = int(10 ** rng.uniform(2, 5.3))
    ended = watch(runs.start([str(size), *made.train(folder / "run")], made.root, LIMITED), limit_of(made))
    faults = faults_of(ended, (0, 2)) + half_written(folder / "run")
    return faults + finish(made, folder / "run"), f"{size} bytes: {ended.err}"


def finish(made: Base, folder: Path, program: tuple[str, ...] | None = None) -> list[str]:
    """Run the command again, and compare the end."""
    ended = watch(runs.start(made.train(folder), made.root, program), limit_of(made))
    faults = faults_of(ended)
    if faults:
        print(ended.err[-600:])
    return faults or ends_the_same(made, folder)


def run(until: float, seed: int, table: Table, least: int) -> None:
    """Fill disks until a time."""
    made = base()
    cases = {"full disk": full_disk, "file size": file_size}
    if not can_mount(made.root / "disk"):
        print("disks: full ones are left out: this user cannot mount a tmpfs")
        del cases["full disk"]
    for number, rng in trials("disks", until, seed, least):
        folder, case = made.root / "disk", list(cases)[number % len(cases)]
        faults, said = cases[case](made, folder, rng)
        table.add(f"disks: {case}", faults)
        report("disks", seed, number, case, faults, said)
        shutil.rmtree(folder, ignore_errors=True)
