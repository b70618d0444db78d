"""The cost of a checkpoint's checksums: CPU time of a save without them and with each library's, in turns.

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
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import dsv3_jax as ds
from dsv3_jax.training import checkpoint, checksums
from dsv3_jax.training.step import Job, abstract_state


def random_state(run: ds.RunConfig):
    """A training state of random numbers, which do not compress, as trained weights do not."""
    rng = np.random.default_rng(0)

    def fill(like):
        if jnp.issubdtype(like.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(like.shape, np.float32), like.dtype)
        return jnp.zeros(like.shape, like.dtype)

    return jax.tree.map(fill, abstract_state(Job(run)))


def libraries() -> dict[str, Callable | None]:
    """Return the functions that compute the CRC-32, by the name of their library. None means no checksums."""
    found: dict[str, Callable | None] = {"none": None, "zlib": zlib.crc32}
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        print("zlib-ng is not installed, and is left out")
        return found
    return found | {"zlib-ng": zlib_ng.crc32}


def one_save(run: ds.RunConfig, state, folder: Path, crc32: Callable | None) -> tuple[float, float, float]:
    """Save once into an empty folder.

    Returns: CPU seconds of all threads, of which in the checksums, and seconds that pass.
    """
    spent = [0.0]

    def timed(place: Path) -> None:
        begin = time.process_time()  # of all threads; the others wait here for the manifest
        if crc32 is not None:
            checksums.crc32 = crc32
            checksums.write_manifest(place)
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
    kinds = libraries()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory(dir=args.place) as name:
        one_save(run, state, Path(name, "run"), zlib.crc32)  # not counted
        for _ in range(args.saves):
            for kind, crc32 in kinds.items():
                found[kind].append(one_save(run, state, Path(name, "run"), crc32))
    result: dict[str, Any] = {"megabytes": round(size / 1e6)}
    for kind, rows in found.items():
        cpu, own, wall = (statistics.median(column) for column in zip(*rows, strict=True))
        result[kind] = {"save_cpu_s": round(cpu, 3), "save_wall_s": round(wall, 2)}
        if kinds[kind] is not None:
            share = statistics.median(spent / whole for whole, spent, _ in rows)
            result[kind] |= {"checksums_cpu_s": round(own, 3), "share": round(share, 4)}
            result[kind]["GB_per_cpu_s"] = round(size / 1e9 / own, 2)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
