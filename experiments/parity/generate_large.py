"""Measure `dsv3 generate`, time to the first token and peak memory, on a synthetic folder of 2 GB.

python experiments/parity/generate_large.py

The folder is that of convert_large.py, with a tokenizer. Each line runs the command in its own
process. Peak memory is that of the process: the package, JAX, its compiler and the pages of the
files count too.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

from convert_large import make

CASES = {"float32, the default on a CPU": [], "bfloat16": ["--dtype", "bfloat16"]}
NEW, PROMPT = 33, "the quick brown fox " * 8
BYTES = {"float32": 4, "bfloat16": 2}


def write_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of bytes whose further ids, which no text gives, fill the vocabulary."""
    from dsv3_jax.data.tokenizer import byte_tokenizer_json

    values = json.loads(byte_tokenizer_json())
    first = len(values["model"]["vocab"]) + len(values["added_tokens"])
    values["model"]["vocab"] |= {f"Ġ{i}": i for i in range(first, size)}
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")


def measure(folder: Path, options: list[str]) -> tuple[float, float, int]:
    """Run the command. Returns: (seconds to the first text, to the end, peak bytes of memory)."""
    line = [sys.executable, "-m", "dsv3_jax.cli", "generate", str(folder)]
    line += ["--temperature", "0", *options]
    line += ["--max-new-tokens", str(NEW), "--prompt", PROMPT]
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
    return first, time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root", type=Path, help="the parent of the temporary folder, which needs about 2.4 GB"
    )
    args = parser.parse_args()
    from dsv3_jax import hf
    from dsv3_jax.model.counting import size

    with tempfile.TemporaryDirectory(dir=args.root) as root:
        folder = Path(root) / "model"
        stored, _ = make(folder)
        cfg = hf.released_folder.ReleasedFolder(folder).cfg
        write_tokenizer(folder, cfg.vocab_size)
        count = size(cfg).total
        print(f"{stored:.2f} GB in bfloat16, {count / 1e9:.2f}e9 parameters\n")
        print(
            "| dtype in memory | parameters, GiB | peak, GiB | above the parameters "
            "| first token, s | all, s |"
        )
        print("|---|---|---|---|---|---|")
        for name, options in CASES.items():
            first, seconds, peak = measure(folder, options)
            held, peak = count * BYTES[name.split(",")[0]] / 2**30, peak / 2**30
            print(
                f"| {name} | {held:.2f} | {peak:.2f} | {peak - held:.2f} "
                f"| {first:.1f} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
