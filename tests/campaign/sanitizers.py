"""The C++ kernels under the compiler's sanitizers, on random shapes: 0 rows, 1 row, and addresses that XLA never gives.

The kernels and a program that calls them (sanitized_kernels.cc) are compiled twice: for addresses and undefined
behaviour, and for threads. Each report is a fault, and so is a result that depends on the number of threads.
"""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import jax

from dsv3_jax.kernels.cpu import library
from tests.campaign.trials import Table, report, watch

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


def run(until: float, seed: int, table: Table, least: int) -> None:
    """Call the kernels until a time, half of it under each sanitizer."""
    with tempfile.TemporaryDirectory() as root:
        for i, (name, sanitizer) in enumerate(SANITIZERS.items()):
            program = build(Path(root), sanitizer)
            if isinstance(program, str):
                print(f"sanitizers: {name} are left out: {program}")
                continue
            seconds = max((until - time.monotonic()) / (len(SANITIZERS) - i), 1.0)
            argv, log = [str(program), str(seed), "0", str(seconds)], Path(root, name)
            with log.open("w") as out:
                process = subprocess.Popen(argv, env=ENVIRONMENT, stdout=out, stderr=subprocess.PIPE, text=True)
                ended = watch(process, seconds + 60)
            cases = re.findall(r"^\d+ .*", log.read_text(), re.MULTILINE)
            what = {0: [], None: ["hangs"], 3: ["silent"]}.get(ended.code, ["tracebacks"])
            table.add(f"sanitizers: {name}", what, max(1, len(cases)))
            report("sanitizers", seed, len(cases) - 1, f"{name} {cases[-1:]}", what, ended.err)
