"""Measure time and peak memory of conversions of a synthetic checkpoint.

python experiments/parity/convert_large.py

Each step runs in its own process. It reports its peak resident memory, less what importing the
package takes. Pages that a memory map has read count as resident until the map is closed.
"""

import argparse
import contextlib
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import jax
import numpy as np

from dsv3_jax import hf
from dsv3_jax.config import replace
from dsv3_jax.hf.config_writing import config_to_dict
from dsv3_jax.hf.released_folder import BF16
from dsv3_jax.hf.tensor_files import CONFIG, table_bytes, write_json, write_shards
from dsv3_jax.hf.tensor_names import entries
from dsv3_jax.presets import preset
from experiments import apart

# About 1.1e9 parameters: 4.4 GB in float32, 2.2 GB in bfloat16. Experts' stacks are the largest.
CFG = replace(
    preset("mini"), vocab_size=32768, dim=1024, num_layers=10, dense_dim=2816, num_heads=8,
    expert_dim=512, num_experts=64, mtp_depth=1, max_positions=4096,
)  # fmt: skip
STEPS = {
    "import": lambda root: hf.convert,  # it is imported when it is named
    "load bfloat16 → float32": lambda root: hf.load(root / "bf16", quiet=True),
    "load bfloat16 → bfloat16": lambda root: hf.load(root / "bf16", dtype="bfloat16", quiet=True),
    "bfloat16 → FP8": lambda root: hf.convert(root / "bf16", root / "fp8", dtype="fp8"),
    "FP8 → bfloat16": lambda root: hf.convert(root / "fp8", root / "back", dtype="bfloat16"),
    "load FP8 → float32": lambda root: hf.load(root / "fp8", quiet=True),
}


def case(step: str, root: str) -> list[float]:
    """Return a step's seconds, and the most memory of its process in GB."""
    jax.devices()
    start = time.perf_counter()
    kept = STEPS[step](Path(root))  # what is loaded counts
    seconds = time.perf_counter() - start
    del kept
    return [seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]


@contextlib.contextmanager
def synthetic_folder(description: str | None, needs: str) -> Iterator[tuple[Path, float]]:
    """Make a bfloat16 folder of random weights, below a temporary one. Yields (it, its GB).

    It writes one tensor at a time. The command line's `--root` names the temporary folder's parent.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--root", type=Path, help=f"the parent of the temporary folder, which needs about {needs}"
    )
    table = hf.tensor_table(CFG)
    source = {e.name: e.copy_of or e.name for e in entries(CFG)}

    def random(name: str) -> np.ndarray:
        shape, dtype = table[name]
        rng = np.random.default_rng(zlib.crc32(source[name].encode()))
        value = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        return value.astype(BF16 if dtype == "bfloat16" else dtype)

    with tempfile.TemporaryDirectory(dir=parser.parse_args().root) as root:
        folder = Path(root) / "bf16"
        folder.mkdir()
        write_shards(folder, table, 500_000_000, map(random, table))
        write_json(folder / CONFIG, config_to_dict(CFG))
        yield folder, table_bytes(table) / 1e9


def main() -> None:
    with synthetic_folder(__doc__, "6 GB") as (folder, size):
        stack = CFG.num_sparse_layers * CFG.num_experts * CFG.dim * CFG.expert_dim * 4 / 1e9
        print(f"{size:.2f} GB in bfloat16; ", end="")
        print(f"the largest stacked parameter is {stack:.2f} GB in float32\n")
        print("| step | seconds | peak memory, GB |\n|---|---|---|")
        base = 0.0
        for step in STEPS:
            case_of = dict(step=step, root=str(folder.parent))
            seconds, peak = apart.result(apart.command(__file__, **case_of))
            base = base or peak
            print(f"| {step} | {seconds:.1f} | {peak - base:.2f} |", flush=True)


if __name__ == "__main__":
    apart.main(case, main)
