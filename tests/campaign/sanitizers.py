"""The C++ kernels under the compiler's sanitizers, on random shapes: 0 rows, 1 row, and addresses that XLA never gives.

    python -m tests.campaign.sanitizers --minutes 5 --seed 0

The kernels and a program that calls them (sanitized_kernels.cc) are compiled twice: for addresses and undefined
behaviour, and for threads. Each report is a fault, and so is a result that depends on the number of threads.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from dsv3_jax.kernels.cpu import library
from tests.campaign.table import Table
from tests.campaign.trials import main, report, watch

SANITIZERS = {"addresses": "address,undefined", "threads": "thread"}
PROGRAM = Path(__file__).with_name("sanitized_kernels.cc")
FLAGS = ("-O0", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")  # -O1 compiles three times as long
# GCC does not align the stack that this option makes to registers of 64 bytes (its bug 110027).
ENVIRONMENT = os.environ | {
    "ASAN_OPTIONS": "detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1",
    "LD_PRELOAD": "",  # a sanitizer must be loaded first
}  # fmt: skip


def build(folder: Path, sanitizer: str) -> Path | str:
    """Compile the program; the reason instead of its path where that is not possible."""
    words = os.environ.get("CXX", "").strip() or next((c for c in library.COMPILERS if shutil.which(c)), None)
    if words is None:
        return "there is no C++ compiler"
    program = folder / sanitizer.replace(",", "-")
    flags = [flag for flag in library.FLAGS if flag not in ("-O3", "-shared", "-fPIC")]
    command = [*shlex.split(words), *flags, *FLAGS, f"-fsanitize={sanitizer}", "-isystem", jax.ffi.include_dir()]
    empty = folder / "empty.cc"
    empty.write_text("int main() {}\n")
    for source in ([empty], [PROGRAM, *library.SOURCES]):  # the first tells whether the sanitizer works here
        done = subprocess.run([*command, *map(str, source), "-o", str(program)], capture_output=True, text=True)
        if source == [empty] and (done.returncode or not runs(program)):
            return f"{words} has no -fsanitize={sanitizer}, or its programs do not run"
    assert done.returncode == 0, done.stderr
    return program


def runs(program: Path) -> bool:
    return subprocess.run([program], env=ENVIRONMENT, capture_output=True).returncode == 0


def check(program: Path, seconds: float, seed: int, first: int) -> tuple[int, list[str], str]:
    """Run cases from number `first` on.

    Returns: (number of cases, faults of the last, what was printed).
    """
    argv = [str(program), str(seed), str(first), str(seconds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ended = watch(subprocess.Popen(argv, env=ENVIRONMENT, **pipes), seconds + 60)
    cases = len(re.findall(r"^\d+ ", ended.out, re.MULTILINE))
    if ended.code == 0:
        return cases, [], ""
    faults = ["hangs"] if ended.code is None else ["silent"] if ended.code == 3 else ["tracebacks"]
    return cases, faults, "\n".join([*ended.out.splitlines()[-2:], ended.err[:2000]])


def run(seconds: float, seed: int, table: Table, least: int = 1) -> None:
    """Call the kernels for so long, half of it under each sanitizer."""
    del least  # many more fit into a second
    with tempfile.TemporaryDirectory() as root:
        for name, sanitizer in SANITIZERS.items():
            program = build(Path(root), sanitizer)
            if isinstance(program, str):
                print(f"sanitizers: {name} are left out: {program}")
                continue
            campaign = f"sanitizers {name}"
            first = table.first(campaign)
            table.begin(campaign, first)
            cases, faults, said = check(program, seconds / len(SANITIZERS), seed, first)
            table.add(f"sanitizers: {name}", faults, max(1, cases))
            report("sanitizers", seed, first + cases - 1, name, faults, said)


if __name__ == "__main__":
    sys.exit(main("sanitizers", run))
