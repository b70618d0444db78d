"""What the checksums of a checkpoint cost: CPU time of a save with and without them, in turns in one process.

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
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import dsv3_jax as ds
from dsv3_jax.training import checkpoint
from dsv3_jax.training.checksums import write_manifest
from dsv3_jax.training.step import abstract_state


def random_state(run: ds.RunConfig):
    """A training state of random numbers, which do not compress, as trained weights do not."""
    rng = np.random.default_rng(0)

    def fill(like):
        if jnp.issubdtype(like.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(like.shape, np.float32), like.dtype)
        return jnp.zeros(like.shape, like.dtype)

    return jax.tree.map(fill, abstract_state(run))


def one_save(run: ds.RunConfig, state, folder: Path, checksums: bool) -> tuple[float, float, float]:
    """Save once into an empty folder.

    Returns: CPU seconds of all threads, of which in the checksums, and seconds that pass.
    """
    spent = [0.0]

    def timed(place: Path) -> None:
        begin = time.process_time()  # of all threads; the others wait here for the manifest
        if checksums:
            write_manifest(place)
        spent[0] += time.process_time() - begin

    checkpoint.write_manifest = timed
    shutil.rmtree(folder, ignore_errors=True)
    with checkpoint.Checkpoints(folder, run) as checkpoints:
        cpu, wall = time.process_time(), time.perf_counter()
        checkpoints.save(state, {"piece": 0}, wait=True)
        return time.process_time() - cpu, spent[0], time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=470.0, help="about the size of the state")
    parser.add_argument("--saves", type=int, default=5, help="of each kind")
    parser.add_argument("--place", help="folder for the files; None means the system's for temporary ones")
    args = parser.parse_args()
    run = ds.recipe("tiny")
    width = int(args.megabytes * 1e6 / 12 / (2 * 4096))  # an embedding and a head of 4,096 tokens, AdamW's two means
    run = ds.replace(run, model=ds.replace(run.model, dim=width, vocab_size=4096, num_layers=1, mtp_depth=0))
    state = random_state(run)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    kinds: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(dir=args.place) as name:
        one_save(run, state, Path(name, "run"), True)  # not counted
        for _ in range(args.saves):
            for checksums, found in kinds.items():
                found.append(one_save(run, state, Path(name, "run"), checksums))
    medians = {
        kind: [statistics.median(column) for column in zip(*found, strict=True)] for kind, found in kinds.items()
    }
    own = medians[True][1]
    result = {
        "megabytes": round(size / 1e6),
        "save_cpu_s": round(medians[True][0], 3),
        "save_without_cpu_s": round(medians[False][0], 3),
        "checksums_cpu_s": round(own, 3),
        "share": round(own / medians[True][0], 4),
        "GB_per_cpu_s": round(size / 1e9 / own, 2),
        "save_wall_s": round(medians[True][2], 2),
        "save_without_wall_s": round(medians[False][2], 2),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
