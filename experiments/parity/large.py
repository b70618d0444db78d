"""Measure time and peak memory with a synthetic released folder of 2.4 GB.

python experiments/parity/large.py convert     # loading, and conversions between dtypes
python experiments/parity/large.py generate    # `dsv3 generate`, with the time to the first token

Each step runs in its own process, of which this is the peak resident memory. Pages that a memory
map has read count as resident until the map is closed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import jax
import numpy as np

from dsv3_jax import hf
from dsv3_jax.config import replace
from dsv3_jax.data.tokenizer import byte_tokenizer_json
from dsv3_jax.hf.config_writing import config_to_dict
from dsv3_jax.hf.released_folder import BF16
from dsv3_jax.hf.tensor_files import CONFIG, table_bytes, write_json, write_shards
from dsv3_jax.hf.tensor_names import entries
from dsv3_jax.model.counting import size
from dsv3_jax.presets import preset
from experiments import apart
from experiments.markdown import markdown_table

# About 1.1e9 parameters: 4.4 GB in float32, 2.2 GB in bfloat16. Experts' stacks are the largest.
CFG = replace(
    preset("mini"), vocab_size=32768, dim=1024, num_layers=10, dense_dim=2816, num_heads=8,
    expert_dim=512, num_experts=64, mtp_depth=1, max_positions=4096,
)  # fmt: skip
# Of `convert`: functions of the folder.
STEPS: dict[str, Callable[[Path], Any]] = {
    "import": lambda folder: hf.convert,  # it is imported when it is named
    "load bfloat16 → float32": lambda folder: hf.load(folder, quiet=True),
    "load bfloat16 → bfloat16": lambda folder: hf.load(folder, dtype="bfloat16", quiet=True),
    "bfloat16 → FP8": lambda folder: hf.convert(folder, folder / "../fp8", dtype="fp8"),
    "FP8 → bfloat16": lambda folder: hf.convert(
        folder / "../fp8", folder / "../back", dtype="bfloat16"
    ),
    "load FP8 → float32": lambda folder: hf.load(folder / "../fp8", quiet=True),
}
# Of `generate`: bytes of a number, options.
DTYPES: dict[str, tuple[int, list[str]]] = {
    "float32, the default on a CPU": (4, []),
    "bfloat16": (2, ["--dtype", "bfloat16"]),
}
NEW, PROMPT = 33, "the quick brown fox " * 8


def write_folder(folder: Path) -> float:
    """Write a bfloat16 folder of random weights, one tensor at a time. Returns: its GB.

    Its tokenizer is of bytes; further ids, which no text gives, fill the vocabulary.
    """
    table = hf.tensor_table(CFG)
    source = {e.name: e.copy_of or e.name for e in entries(CFG)}

    def random(name: str) -> np.ndarray:
        shape, dtype = table[name]
        rng = np.random.default_rng(zlib.crc32(source[name].encode()))
        value = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        return value.astype(BF16 if dtype == "bfloat16" else dtype)

    folder.mkdir()
    write_shards(folder, table, 500_000_000, map(random, table))
    write_json(folder / CONFIG, config_to_dict(CFG))
    values = json.loads(byte_tokenizer_json())
    first = len(values["model"]["vocab"]) + len(values["added_tokens"])
    values["model"]["vocab"] |= {f"Ġ{i}": i for i in range(first, CFG.vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return table_bytes(table) / 1e9


def case(step: str, folder: str) -> list[float]:
    """Return a step's seconds, and the most memory of its process in GB."""
    jax.devices()
    start = time.perf_counter()
    kept = STEPS[step](Path(folder))  # what is loaded counts
    seconds = time.perf_counter() - start
    del kept
    return [seconds, apart.peak_memory() / 1e9]


def convert(folder: Path) -> str:
    """Measure STEPS. The first one, importing the package, is taken off the others' memory."""
    rows, base = [], 0.0
    for step in STEPS:
        seconds, peak = apart.result(apart.command(__file__, step=step, folder=str(folder)))
        base = base or peak
        rows.append([step, f"{seconds:.1f}", f"{peak - base:.2f}"])
    return markdown_table(["step", "seconds", "peak memory, GB"], rows)


def generate(folder: Path) -> str:
    """Measure `dsv3 generate` by DTYPES."""
    rows = []
    for name, (nbytes, options) in DTYPES.items():
        first, seconds, peak = run_generate(folder, options)
        held = size(CFG).total * nbytes / 2**30
        rows.append([name, f"{held:.2f}", f"{peak:.2f}", f"{peak - held:.2f}"])
        rows[-1] += [f"{first:.1f}", f"{seconds:.1f}"]
    head = "dtype in memory | parameters, GiB | peak, GiB | above the parameters | first token, s"
    return markdown_table([*head.split(" | "), "all, s"], rows)


def run_generate(folder: Path, options: list[str]) -> tuple[float, float, float]:
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("convert", "generate"))
    parser.add_argument("--root", help="parent of the temporary folder, which takes 6 GB at most")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.root) as root:
        folder = Path(root) / "bf16"
        print(f"{write_folder(folder):.2f} GB in bfloat16, {size(CFG).total:,} parameters\n")
        print({"convert": convert, "generate": generate}[args.what](folder))


if __name__ == "__main__":
    apart.main(case, main)
