"""Checkpoints of a run in a bucket: each process writes its shards, and the run's index commits.

Orbax needs a file system: it has Google's buckets by further packages, and Amazon's not at all. So
JAX's serialization writes the arrays here, as Zarr in TensorStore's OCDBT, with a CRC-32C in each
chunk that is checked when it is read. A save has a folder of its own, STEP.START, that counts the
starts of the run. A killed one leaves a folder that the index does not name; the next start deletes
it.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tensorstore as ts
from jax.experimental.array_serialization.serialization import GlobalAsyncCheckpointManager

from dsv3_jax.config import RunConfig
from dsv3_jax.host.files import parse_json
from dsv3_jax.host.mirror import mirror_of
from dsv3_jax.mesh import processes
from dsv3_jax.runs.saved_state import parts, read_state, settings_of
from dsv3_jax.training.state import Job, TrainState

SETTINGS = "run.json"  # of a checkpoint: the run's, the position in the data, the arrays' shapes
TIMEOUT = 3600  # seconds that processes wait for the slowest to write
CHUNK = 128 << 20  # bytes of a chunk, and about those of an object
CODECS = ({"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"})


class InBucket:
    """What `Checkpoints` does otherwise in a bucket. Its folder is that of the copy."""

    folder: Path
    run: RunConfig
    _pool: ThreadPoolExecutor
    _saving: int | None
    _read_only: bool

    def _open(self) -> None:
        mirror = mirror_of(self.folder.parent)
        assert mirror is not None
        self._mirror = mirror
        self._bucket = mirror.bucket
        self._start = mirror.index()["starts"]
        self._manager = GlobalAsyncCheckpointManager(timeout_secs=TIMEOUT)

    def _begin(self, state: TrainState, data: dict[str, Any]) -> None:
        place = f"checkpoints/{self._saving}.{self._start}"
        arrays = _by_name(parts(state))
        part = _store(self._bucket.spec(f"{place}/{jax.process_index()}"))
        specs = [_spec(part, name) | _format(array) for name, array in arrays.items()]

        shapes = {name: array.shape for name, array in arrays.items()}
        settings = {"run": settings_of(self.run, state), "data": data, "arrays": shapes}
        commit = partial(self._commit, place, json.dumps(settings).encode())
        write = partial(self._manager.serialize, on_commit_callback=commit)
        # In a thread: JAX runs an event loop, which it cannot beside the one of a notebook.
        self._pool.submit(write, list(arrays.values()), specs).result()

    def _commit(self, place: str, settings: bytes) -> None:
        """Complete a checkpoint, in process 0, once all processes have written their shards."""
        context = ts.Context()  # one: parts of the same bucket are joined without a copy
        whole = ts.KvStore.open(_store(self._bucket.spec(place)), context=context).result()
        for index in range(jax.process_count()):
            part = _store(self._bucket.spec(f"{place}/{index}"))
            shards = ts.KvStore.open(part, context=context).result()
            shards.experimental_copy_range_to(whole).result()
        self._bucket.write(f"{place}/{SETTINGS}", settings)
        self._mirror.put(steps=self._mirror.index()["steps"] | {str(self._saving): place})

    def _seal(self) -> None:
        self._manager.wait_until_finished()

    _close = _seal

    def _tidy(self, keep: int | None = None) -> None:
        if self._read_only or not processes.is_first():
            return
        index = self._mirror.index()
        steps = index["steps"]
        kept = steps
        if keep is not None and len(steps) > keep:
            kept = {step: steps[step] for step in sorted(steps, key=int)[-keep:]}
            self._mirror.change(steps=kept)
        old = {*steps.values()} - {*kept.values()}

        # At the start also what dead processes left.
        if self._saving is None:
            there = {"/".join(name.split("/")[:2]) for name in self._bucket.names("checkpoints")}
            old |= there - {*kept.values(), *index["aside"].values()}
        for place in old:
            self._bucket.delete(place)

    def _rename(self, name: str, aside: str) -> None:
        index = self._mirror.index()
        steps = dict(index["steps"])
        self._mirror.change(aside=index["aside"] | {aside: steps.pop(name)}, steps=steps)

    def _find_damage(self, step: int) -> str:
        """Name the settings if they are absent; arrays are checked when they are read."""
        name = f"{self._mirror.index()['steps'][str(step)]}/{SETTINGS}"
        there = self._bucket.read(name)[0] is not None
        return "" if there else f"file='{self._bucket.url}/{name}' is absent"

    def _read(self, step: int, job: Job, *how: Any) -> tuple[TrainState, dict[str, Any]]:
        place = self._mirror.index()["steps"][str(step)]
        saved = parse_json(self._bucket.read(f"{place}/{SETTINGS}")[0] or b"")
        restore = partial(self._restore, place, saved["arrays"])
        return read_state(restore, saved["run"], job, *how), saved["data"]

    def _restore(self, place: str, shapes: dict[str, Any], _: Any, how: Any) -> dict[str, Any]:
        """Read trees of arrays by the shapes, dtypes and shardings that `how` has for Orbax."""
        asked = _by_name(how)
        for name, array in asked.items():
            if shapes.get(name) != list(array.global_shape):
                raise ValueError(f"{name} has shape {shapes.get(name)}, not {array.global_shape}")
        specs = [_spec(_store(self._bucket.spec(place)), name) for name in asked]
        asks = [(array.sharding, array.global_shape, array.dtype) for array in asked.values()]
        shardings, sizes, dtypes = map(list, zip(*asks, strict=True))
        read = self._manager.deserialize
        found = self._pool.submit(read, shardings, specs, sizes, dtypes).result()
        return jax.tree.unflatten(jax.tree.structure(how), found)


def _by_name(tree: Any) -> dict[str, Any]:
    """A tree's leaves by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _store(base: dict[str, Any]) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": base, "target_data_file_size": CHUNK}


def _spec(store: dict[str, Any], name: str) -> dict[str, Any]:
    """Where an array is, as TensorStore's JSON; no chunk is kept in memory."""
    cache = {"total_bytes_limit": 0}
    return {"driver": "zarr3", "kvstore": store | {"path": f"{name}/"}, "cache_pool": cache}


def _format(array: jax.Array) -> dict[str, Any]:
    """How an array is written. A chunk is of one shard, so that one process alone writes it."""
    chunk = list(array.sharding.shard_shape(array.shape))
    for axis in range(array.ndim):
        if math.prod(chunk) * array.dtype.itemsize > CHUNK:
            chunk[axis] = 1
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    names = {"shape": array.shape, "data_type": array.dtype.name}
    return {"metadata": names | {"chunk_grid": grid, "codecs": CODECS}}
