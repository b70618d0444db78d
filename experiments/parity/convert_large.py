"""Measure time and peak memory of conversions of a synthetic checkpoint.

python experiments/parity/convert_large.py

Each step runs in its own process. It reports its peak resident memory, less what importing the
package takes. Pages that a memory map has read count as resident until the map is closed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

# About 1.1e9 parameters: 4.4 GB in float32, 2.2 GB in bfloat16. Experts' stacks are the largest.
CHANGES = dict(
    vocab_size=32768,
    dim=1024,
    num_layers=10,
    dense_dim=2816,
    num_heads=8,
    expert_dim=512,
    num_experts=64,
)
CHANGES |= dict(mtp_depth=1, max_positions=4096)

STEPS = {
    "import": "import dsv3_jax.runs.convert",
    "load bfloat16 → float32": "hf.load(root / 'bf16', quiet=True)",
    "load bfloat16 → bfloat16": "hf.load(root / 'bf16', dtype='bfloat16', quiet=True)",
    "bfloat16 → FP8": "hf.convert(root / 'bf16', root / 'fp8', dtype='fp8')",
    "FP8 → bfloat16": "hf.convert(root / 'fp8', root / 'back', dtype='bfloat16')",
    "load FP8 → float32": "hf.load(root / 'fp8', quiet=True)",
}
WORKER = """
import json, resource, sys, time
from pathlib import Path
import dsv3_jax as ds
from dsv3_jax import hf
import jax
jax.devices()
root = Path(sys.argv[1])
start = time.perf_counter()
{step}
seconds = time.perf_counter() - start
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]))
"""


def make(folder: Path) -> tuple[float, float]:
    """Write a bfloat16 folder of random weights. Returns (its GB, its largest stack in GB).

    It writes one tensor at a time.
    """
    import numpy as np

    from dsv3_jax import hf
    from dsv3_jax.config import replace
    from dsv3_jax.hf.config_writing import config_to_dict
    from dsv3_jax.hf.released_folder import BF16
    from dsv3_jax.hf.tensor_files import CONFIG, table_bytes, write_json, write_shards
    from dsv3_jax.hf.tensor_names import entries
    from dsv3_jax.presets import preset

    cfg = replace(preset("mini"), **CHANGES)
    table = hf.tensor_table(cfg)
    source = {e.name: e.copy_of or e.name for e in entries(cfg)}

    def random(name: str) -> np.ndarray:
        shape, dtype = table[name]
        rng = np.random.default_rng(zlib.crc32(source[name].encode()))
        value = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        return value.astype(BF16 if dtype == "bfloat16" else dtype)

    folder.mkdir()
    write_shards(folder, table, 500_000_000, map(random, table))
    write_json(folder / CONFIG, config_to_dict(cfg))
    stack = cfg.num_sparse_layers * cfg.num_experts * cfg.dim * cfg.expert_dim * 4
    return table_bytes(table) / 1e9, stack / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root", type=Path, help="the parent of the temporary folder, which needs about 6 GB"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.root) as root:
        size, stack = make(Path(root) / "bf16")
        print(
            f"{size:.2f} GB in bfloat16; "
            f"the largest stacked parameter is {stack:.2f} GB in float32\n"
        )
        print("| step | seconds | peak memory, GB |\n|---|---|---|")
        base = 0.0
        for name, step in STEPS.items():
            line = [sys.executable, "-c", WORKER.format(step=step), root]
            done = subprocess.run(line, check=True, capture_output=True, text=True)
            seconds, peak = json.loads(done.stdout.split("\n")[-2])
            base = base or peak
            print(f"| {name} | {seconds:.1f} | {peak - base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
