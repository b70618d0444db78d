"""Measure `dsv3 generate`, time to the first token and peak memory, on a synthetic folder of 2 GB.

python experiments/parity/generate_large.py

The folder is that of convert_large.py, with a tokenizer. Each line runs the command in its own
process. Peak memory is that of the process: the package, JAX, its compiler and the pages of the
files count too.
"""

import json
import os
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from dsv3_jax.data.tokenizer import byte_tokenizer_json
from dsv3_jax.model.counting import size
from experiments.parity.convert_large import CFG, synthetic_folder

# (dtype, bytes of a number, options)
CASES = (
    ("float32, the default on a CPU", 4, []),
    ("bfloat16", 2, ["--dtype", "bfloat16"]),
)
NEW, PROMPT = 33, "the quick brown fox " * 8
HEADER = (
    "dtype in memory | parameters, GiB | peak, GiB | above the parameters | first token, s | all, s"
)


def write_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of bytes whose further ids, which no text gives, fill the vocabulary."""
    values = json.loads(byte_tokenizer_json())
    first = len(values["model"]["vocab"]) + len(values["added_tokens"])
    values["model"]["vocab"] |= {f"Ġ{i}": i for i in range(first, size)}
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")


def measure(folder: Path, options: list[str]) -> tuple[float, float, float]:
    """Run the command. Returns: (seconds to the first text, to the end, peak GiB of memory)."""
    line = [sys.executable, "-m", "dsv3_jax.cli", "generate", str(folder), *options]
    line += ["--temperature", "0", "--max-new-tokens", str(NEW), "--prompt", PROMPT]
    start = time.perf_counter()
    with Popen(line, stdout=PIPE, stderr=DEVNULL) as process:
        assert process.stdout
        process.stdout.read(1)  # the prompt is printed when the first token has come
        first = time.perf_counter() - start
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with code {process.returncode}")
    return first, time.perf_counter() - start, usage.ru_maxrss / 2**20


def main() -> None:
    with synthetic_folder(__doc__, "2.4 GB") as (folder, stored):
        write_tokenizer(folder, CFG.vocab_size)
        count = size(CFG).total
        print(f"{stored:.2f} GB in bfloat16, {count / 1e9:.2f}e9 parameters\n")
        print(f"| {HEADER} |\n|---|---|---|---|---|---|")
        for name, nbytes, options in CASES:
            first, seconds, peak = measure(folder, options)
            held = count * nbytes / 2**30
            cells = (name, f"{held:.2f}", f"{peak:.2f}", f"{peak - held:.2f}")
            print("|", " | ".join([*cells, f"{first:.1f}", f"{seconds:.1f}"]), "|", flush=True)


if __name__ == "__main__":
    main()
