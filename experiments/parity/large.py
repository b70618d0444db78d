"""Measure time and peak memory with a synthetic released folder of 2.4 GB.

python experiments/parity/large.py     # loading, and conversions between dtypes

Each step runs in its own process, of which this is the peak resident memory. Pages that a memory
map has read count as resident until the map is closed.
"""

import argparse
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import jax
import numpy as np

from dsv3_jax import hf
from dsv3_jax.config import replace
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
# Functions of the folder.
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


def write_folder(folder: Path) -> float:
    """Write a bfloat16 folder of random weights, one tensor at a time. Returns: its GB."""
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
    return table_bytes(table) / 1e9


def case(step: str, folder: str) -> list[float]:
    """Return a step's seconds, and the most memory of its process in GB."""
    jax.devices()
    start = time.perf_counter()
    kept = STEPS[step](Path(folder))  # what is loaded counts
    seconds = time.perf_counter() - start
    del kept
    return [seconds, apart.peak_memory() / 1e9]


def main() -> None:
    """Measure STEPS. The first one, importing the package, is taken off the others' memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", help="parent of the temporary folder, which takes 6 GB at most")
    rows, base = [], 0.0
    with tempfile.TemporaryDirectory(dir=parser.parse_args().root) as root:
        folder = Path(root) / "bf16"
        print(f"{write_folder(folder):.2f} GB in bfloat16, {size(CFG).total:,} parameters\n")
        for step in STEPS:
            seconds, peak = apart.result(apart.command(__file__, step=step, folder=str(folder)))
            base = base or peak
            rows.append([step, f"{seconds:.1f}", f"{peak - base:.2f}"])
    print(markdown_table(["step", "seconds", "peak memory, GB"], rows))


if __name__ == "__main__":
    apart.main(case, main)
