"""The cost of a checkpoint's checksums: CPU time of a save without them and with them, in turns.

python experiments/bench/checkpoint.py                  a state of 470 MB, five saves of each kind
python experiments/bench/checkpoint.py --megabytes 100 --saves 3
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import dsv3_jax as ds
from dsv3_jax.runs import checkpoint
from dsv3_jax.training.state import Job, abstract_state


def random_state(run: ds.RunConfig):
    """A training state of random numbers, which do not compress, as trained weights do not."""
    rng = np.random.default_rng(0)

    def fill(like):
        if jnp.issubdtype(like.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(like.shape, np.float32), like.dtype)
        return jnp.zeros(like.shape, like.dtype)

    return jax.tree.map(fill, abstract_state(Job(run)))


def one_save(
    run: ds.RunConfig, state, folder: Path, write_manifest: Callable[[Path], None]
) -> tuple[float, ...]:
    """Save once into an empty folder.

    Returns: CPU seconds of all threads, of which in the checksums, and seconds that pass.
    """
    spent = [0.0]

    def timed(place: Path) -> None:
        begin = time.process_time()  # of all threads; the others wait here for the manifest
        write_manifest(place)
        spent[0] += time.process_time() - begin

    checkpoint.write_manifest = timed
    shutil.rmtree(folder, ignore_errors=True)
    with checkpoint.Checkpoints(folder, run) as checkpoints:
        cpu, wall = time.process_time(), time.perf_counter()
        checkpoints.save(state, {"piece": 0}, wait=True)
        return time.process_time() - cpu, spent[0], time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megabytes", type=float, default=470.0, help="about the size of the state"
    )
    parser.add_argument("--saves", type=int, default=5, help="of each kind")
    parser.add_argument(
        "--place", help="folder for the files; None means the system's for temporary ones"
    )
    args = parser.parse_args()
    run = ds.recipe("tiny")
    # An embedding and a head of 4,096 tokens, AdamW's two means.
    width = int(args.megabytes * 1e6 / 12 / (2 * 4096))
    run = ds.replace(
        run, model=ds.replace(run.model, dim=width, vocab_size=4096, num_layers=1, mtp_depth=0)
    )
    state = random_state(run)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    kinds = {"none": lambda place: None, "zlib": checkpoint.write_manifest}
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory(dir=args.place) as name:
        one_save(run, state, Path(name, "run"), kinds["zlib"])  # not counted
        for _ in range(args.saves):
            for kind, write in kinds.items():
                found[kind].append(one_save(run, state, Path(name, "run"), write))
    result: dict[str, Any] = {"megabytes": round(size / 1e6)}
    for kind, rows in found.items():
        cpu, own, wall = (statistics.median(column) for column in zip(*rows, strict=True))
        result[kind] = {
            "save_cpu_s": round(cpu, 3),
            "save_wall_s": round(wall, 2),
            "checksums_cpu_s": round(own, 3),
        }
    result["GB_per_cpu_s"] = round(size / 1e9 / own, 2)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
