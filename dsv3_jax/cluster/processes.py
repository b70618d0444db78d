"""Several processes, one run: joining them, what they tell each other, and which rows of a batch each one holds.

Every process runs the same program, and every function here that speaks to the others must be called by all of them,
in the same order. In a process of its own they cost nothing and say what is true of one.
"""

import json
import re
import secrets
import signal
import socket
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.cluster.supervisor import Cluster, Meeting
from dsv3_jax.config import ConfigError, Layout, first_difference
from dsv3_jax.mesh import sharding

T = TypeVar("T")


def join(cluster: Cluster, devices: int | None, port: int) -> Meeting:
    """Join the other processes, before the first array is made, and agree with them where their watches meet.

    Args:
        devices: of the whole mesh; on CPU each process makes its share of them. None: one a process there.
        port: at which this process's watch listens.
    Raises: ConfigError when no cluster is found, or it cannot be served; ValueError when the devices cannot be shared.
    """
    if devices is not None and cluster.processes is not None:
        if devices % cluster.processes:
            raise ConfigError(f"a mesh of {devices} devices cannot be shared by {cluster.processes} processes")
        jax.config.update("jax_num_cpu_devices", devices // cluster.processes)
    try:
        # The watch keeps the time of joining, for JAX ends the process itself when its own is over.
        jax.distributed.initialize(
            None if cluster.address == "auto" else cluster.address,
            cluster.processes,
            cluster.process_id,
            initialization_timeout=10 * cluster.timeout,
        )
    except (ValueError, RuntimeError) as error:
        if "should be defined" in str(error) or "must be defined" in str(error):
            raise ConfigError(
                "--cluster auto finds no SLURM, Kubernetes, Open MPI or TPU pod here; "
                "give --cluster HOST:PORT --processes N --process-id I"
            ) from error
        said = " ".join(str(error).split())
        raise ConfigError(f"process {cluster.process_id} cannot join the cluster {cluster.address}: {said}") from error
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's own note of it would be read by nobody
    hosts = [cluster.host] if cluster.host else _own_addresses()
    mine = Meeting(jax.process_index(), jax.process_count(), hosts, port, secrets.token_hex(16))
    first = json.loads(gather(mine.to_json().encode())[0])
    return Meeting(mine.process_id, mine.processes, first["hosts"], first["port"], first["token"])


def _own_addresses() -> list[str]:
    """Names by which other hosts may know this one: the address of its default route, and its name."""
    found = [socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of a range for documentation; nothing is sent
            found.insert(0, probe.getsockname()[0])
        except OSError:  # no such route
            pass
    return found


def is_of_connection(error: Exception) -> bool:
    """Whether an error is XLA's, as when a collective meets a process that is gone, and none of this package's own."""
    return re.match(r"[A-Z_]{5,}: ", str(error)) is not None


def is_first() -> bool:
    """True in the one process that prints and writes."""
    return jax.process_index() == 0


def gather(mine: bytes) -> list[bytes]:
    """What each process brought, in their order."""
    if jax.process_count() == 1:
        return [mine]
    lengths = _gather(np.array([len(mine)], np.int32))[:, 0]
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    return [row[:length].tobytes() for row, length in zip(_gather(padded), lengths, strict=True)]


def any_of(flag: bool) -> bool:
    """True in all processes where it is true in one."""
    return flag if jax.process_count() == 1 else bool(_gather(np.array([flag], np.int32)).any())


def _gather(mine: np.ndarray) -> np.ndarray:
    """Equal shapes of all processes, stacked. Over one device of each: it holds before a mesh is agreed on."""
    firsts: dict[int, jax.Device] = {}
    for device in jax.devices():
        firsts.setdefault(device.process_index, device)
    mesh = Mesh(np.array([firsts[i] for i in range(jax.process_count())]), ("process",))
    where = NamedSharding(mesh, P("process"))
    whole = jax.make_array_from_process_local_data(where, mine[None], (len(firsts), *mine.shape))
    with jax.set_mesh(mesh):
        return np.asarray(_replicated(mesh)(whole))


def by_first(work: Callable[[], None]) -> None:
    """Have the first process do a work that may be refused; all share the verdict.

    Raises: ValueError, in all of them, where `work` raises ValueError or OSError in the first.
    """
    _, said = _told(lambda: work() if is_first() else None)
    if said[0]:
        raise ValueError(said[0])


def by_each(work: Callable[[], T]) -> T:
    """Have each process do a work that may be refused in some of them; all share the verdict.

    Returns: what this process's `work` gave.
    Raises: in all of them, where `work` raises ValueError or OSError in one: there this error, elsewhere ConfigError
        with its sentence and the process's number.
    """
    done, said = _told(work)
    for i, sentence in enumerate(said):
        if sentence:
            raise ConfigError(f"process {i} of {len(said)}: {sentence}")
    return done


def _told(work: Callable[[], T]) -> tuple[T, list[str]]:
    """(What `work` gave, why it was refused in each process; "" where it was not); here a refusal is raised itself."""
    try:
        done = work()
    except (ValueError, OSError) as error:
        gather((str(error) or type(error).__name__).encode())
        raise
    return done, [said.decode() for said in gather(b"")]


def agree(facts: Mapping[str, Any]) -> None:
    """Find out whether all processes were started alike.

    Args:
        facts: what must be equal, as plain JSON.
    Raises: ConfigError, in all of them, naming the processes that differ from the first, and the first difference.
    """
    told = [json.loads(text) for text in gather(json.dumps(facts).encode())]
    others = [i for i, theirs in enumerate(told) if theirs != told[0]]
    if others:
        found = first_difference(told[0], told[others[0]])
        assert found is not None
        key, a, b = found
        who = f"process {others[0]}" if len(others) == 1 else f"processes {', '.join(map(str, others))}"
        more = "" if len(others) == 1 else f" in process {others[0]}"
        raise ConfigError(f"{who} of {len(told)} disagree with process 0: {key} is {b!r}{more}, not {a!r}")


def make_mesh(sizes: Mapping[str, int] | None) -> Mesh:
    """A mesh of all processes' devices; None lays them all along "data".

    Raises: ConfigError when processes disagree on it, or it is of fewer or more devices than there are: each process
        must have its part in it.
    """
    agree({"mesh": sizes})
    count = jax.device_count()
    sizes = sizes or {"data": count}
    mesh = sharding.make_mesh(**sizes)
    if mesh.size != count:
        name = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(f"mesh {name} is of {mesh.size} devices, and the cluster has {count}")
    return mesh


def check_layout(layout: Layout) -> None:
    """Raises: ConfigError for a layout under which processes may come to wait for each other."""
    own = jax.local_device_count()
    if layout.fsdp and jax.process_count() > 1 and own > 1 and jax.default_backend() == "cpu":
        # XLA's CPU client may run two collectives in different orders in two processes.
        raise ConfigError(f"layout.fsdp with {own} CPU devices in each process can deadlock: let each have one")


def rows_held(mesh: Mesh, size: int) -> np.ndarray:
    """Which of a global batch's `size` rows this process's devices hold, in ascending order."""
    parts = sharding.batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in parts]))


def put(
    batch: Mapping[str, np.ndarray], mesh: Mesh | None, size: int, rows: np.ndarray | None = None
) -> dict[str, jax.Array]:
    """Put a batch on devices, of each process the rows that its own devices hold.

    Args:
        batch: arrays [R, …]: this process's rows of the global batch, or all of them.
        size: rows of the global batch.
        rows: which of them `batch` holds, as `rows_held`; None: all.
    """
    if mesh is None:
        return {name: jax.device_put(array) for name, array in batch.items()}
    where = sharding.batch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:  # a slice of each axis
            start, stop, _ = index[0].indices(size)
            at = start if rows is None else int(np.searchsorted(rows, start))
            return array[at : at + stop - start]

        return jax.make_array_from_callback((size, *array.shape[1:]), where, part)

    return {name: place(array) for name, array in batch.items()}


def fetch(tree, mesh: Mesh | None):
    """The tree's arrays whole on every host, as NumPy's, wherever on the mesh they lie."""
    if jax.process_count() == 1 or mesh is None:
        return jax.device_get(tree)
    return jax.device_get(_replicated(mesh)(tree))


@lru_cache(maxsize=8)
def _replicated(mesh: Mesh):
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
