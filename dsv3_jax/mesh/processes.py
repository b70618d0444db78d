"""Several processes of one run: join them, exchange messages, agree, find each one's batch rows.

Every process runs the same program. All processes must call the functions here that communicate, in
the same order. With one process they cost nothing and return the answer for one process.
"""

import json
import re
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from dsv3_jax.config import ConfigError, Layout, first_difference
from dsv3_jax.mesh import sharding

T = TypeVar("T")

START_TIMEOUT = 300  # seconds to wait for the other processes
# seconds without a sign of life, until JAX counts a process as lost and ends the others
HEARTBEAT_TIMEOUT = 30


def join(address: str, count: int | None, index: int | None, devices: int | None) -> None:
    """Join the other processes of a run before the first array is created.

    JAX ends this process with a stack trace if the others do not arrive, and later if one of them
    is lost.

    Args:
        address: HOST:PORT of process 0; "auto" asks SLURM, Kubernetes, Open MPI or the TPU pod.
        count: number of processes. None means that "auto" finds it.
        index: of this process, from 0. None means that "auto" finds it.
        devices: of the mesh. On CPU each process creates its share of them. None means one for each
            process on CPU.
    Raises: ConfigError when an argument is not valid, or no cluster is found.
    """
    if address != "auto" and not re.fullmatch(r"([\w.-]+|\[[\da-fA-F:]+\]):[1-9]\d{0,4}", address):
        raise ConfigError(
            f"cluster={address!r} is neither auto nor of the form HOST:PORT; use one of them"
        )

    # JAX fixes the number of CPU devices when it starts its client, so this comes first.
    if devices is not None and count is not None:
        if count < 1 or devices % count:
            raise ConfigError(
                f"devices={devices} of the mesh are not divisible by processes={count}; change one"
            )
        jax.config.update("jax_num_cpu_devices", devices // count)

    # Wait for the others. JAX ends the process if they do not come, so this is said before.
    print(
        f"joining cluster={address!r}; JAX ends this process after {START_TIMEOUT} seconds alone",
        file=sys.stderr,
    )
    try:
        # This adds the devices of all processes to `jax.devices`.
        jax.distributed.initialize(
            None if address == "auto" else address,
            count,
            index,
            initialization_timeout=START_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cluster={address!r}, processes={count}, process_id={index} cannot be used: {error} "
            "auto needs SLURM, Kubernetes, Open MPI or a TPU pod; elsewhere give "
            "--cluster HOST:PORT --processes N --process-id I"
        ) from error

    # programs of JAX's cache mix up two collectives' messages
    if jax.local_devices()[0].platform == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
    # JAX's handler only sets a flag that nothing here reads
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_connection_error(error: Exception) -> bool:
    """Say whether an error is XLA's, as of a collective with a lost process, not this package's.

    Example:
        >>> lost, other = ValueError("UNAVAILABLE: connection reset"), ValueError("steps=0")
        >>> is_connection_error(lost), is_connection_error(other)
        (True, False)
    """
    return re.match(r"[A-Z_]{5,}: ", str(error)) is not None


def is_first() -> bool:
    """Say whether this is process 0, the only one that prints and writes.

    Example:
        >>> is_first()  # with one process
        True
    """
    return jax.process_index() == 0


def gather(message: bytes) -> list[bytes]:
    """Exchange messages: return those of all processes in their order.

    Example:
        >>> gather(b"hello")  # with one process
        [b'hello']
    """
    lengths = _gather_arrays(np.array(len(message), np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = _gather_arrays(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def any_of(flag: bool) -> bool:
    """Return True in all processes if the flag is True in one.

    Example:
        >>> any_of(False), any_of(True)  # with one process
        (False, True)
    """
    return bool(_gather_arrays(np.array(flag, np.int32)).any())


def _gather_arrays(array: np.ndarray) -> np.ndarray:
    """Stack the processes' arrays of one shape."""
    if jax.process_count() * jax.local_device_count() != jax.device_count():
        raise ConfigError(
            "the processes have different numbers of devices; start all with the same --mesh"
        )
    with jax.transfer_guard("allow"):  # meant, though JAX calls it implicit
        return process_allgather(array)


def by_first(work: Callable[[], None]) -> None:
    """Let process 0 do work that may fail; all processes get its outcome.

    Raises: ValueError in all processes if `work` raises ValueError or OSError in process 0.

    Example:
        >>> by_first(lambda: print("done once"))
        done once
    """
    by_each(lambda: work() if is_first() else None)


def by_each(work: Callable[[], T]) -> T:
    """Let every process do work that may fail in some of them; all processes get the outcome.

    Returns: this process's result of `work`.
    Raises: the error of `work` in a process where it raises ValueError or OSError. ConfigError in
        all others, with the number of that process and its sentence.

    Example:
        >>> by_each(lambda: 2 + 3)
        5
    """
    try:
        result = work()
    except (ValueError, OSError) as error:
        gather((str(error) or type(error).__name__).encode(errors="backslashreplace"))
        raise

    # Every process gathers exactly once: an empty message says that its work is done.
    errors = gather(b"")
    for i, sentence in enumerate(errors):
        if sentence:
            raise ConfigError(f"process {i} of {len(errors)}: {sentence.decode()}")
    return result


def agree(facts: Mapping[str, Any]) -> None:
    """Check that all processes were started with the same settings.

    Args:
        facts: plain JSON that must be equal.
    Raises: ConfigError in all processes, naming those that differ from process 0 and the first
        difference.

    Example:
        >>> agree({"steps": 400})  # one process agrees with itself
    """
    by_process = [json.loads(text) for text in gather(json.dumps(facts).encode())]
    others = [i for i, theirs in enumerate(by_process) if theirs != by_process[0]]
    if others:
        difference = first_difference(by_process[0], by_process[others[0]])
        assert difference is not None
        key, first, other = difference
        numbers = ", ".join(map(str, others))
        names = f"process {numbers}" if len(others) == 1 else f"processes {numbers}"
        raise ConfigError(
            f"{key}={other!r} in process {others[0]} differs from {key}={first!r} in process 0; "
            f"{names} of {len(by_process)} must be started as process 0"
        )


def make_mesh(sizes: Mapping[str, int] | None) -> Mesh:
    """Create a mesh of all processes' devices.

    Args: sizes: of the axes. None means all devices along "data".
    Raises: ConfigError when processes disagree on it, or the mesh does not use every device: each
        process must have a part of it.
    """
    agree({"mesh": sizes})
    count = jax.device_count()
    sizes = sizes or {"data": count}
    mesh = sharding.make_mesh(**sizes)
    if mesh.size != count:
        name = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(
            f"mesh={name} has {mesh.size} devices, but the cluster has {count}; use all of them"
        )
    return mesh


def check_layout(layout: Layout) -> None:
    """Check that processes cannot deadlock under a layout.

    Raises: ConfigError when they can.

    Example:
        >>> check_layout(Layout(fsdp=True))  # one process cannot deadlock with another
    """
    count = jax.local_device_count()
    if layout.fsdp and jax.process_count() > 1 and count > 1 and jax.devices()[0].platform == "cpu":
        # XLA's CPU client may run two collectives in different orders in two processes.
        raise ConfigError(
            f"layout.fsdp=True with {count} CPU devices in each process can deadlock; "
            "use one device in each"
        )


def rows_held(mesh: Mesh, size: int) -> np.ndarray:
    """Return the rows of a global batch of `size` rows that this process holds, in ascending order.

    Example:
        >>> rows_held(sharding.make_mesh(), 4)  # one process holds all rows
        array([0, 1, 2, 3])
    """
    parts = sharding.batch_sharding(mesh, size).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in parts]))


def put(batch: Mapping[str, np.ndarray], mesh: Mesh | None, size: int) -> dict[str, jax.Array]:
    """Put a batch on devices; each process provides the rows that its devices hold.

    Args:
        batch: arrays [R, …] of this process's rows of the global batch, as `rows_held`, or of all
            its rows.
        mesh: None means the default device.
        size: rows of the global batch.

    Example:
        >>> put({"tokens": np.array([[3, 1]], np.int32)}, mesh=None, size=1)["tokens"]
        Array([[3, 1]], dtype=int32)
    """
    if mesh is None:
        return {name: jax.device_put(array) for name, array in batch.items()}
    make = jax.make_array_from_process_local_data
    rows = sharding.batch_sharding(mesh, size)
    with jax.transfer_guard("allow"):  # meant, though JAX calls it implicit
        return {name: make(rows, array, (size, *array.shape[1:])) for name, array in batch.items()}


def fetch(tree: Any, mesh: Mesh | None) -> Any:
    """Return a tree's arrays as complete NumPy arrays in every process, however they are sharded.

    Example:
        >>> fetch({"loss": jax.numpy.zeros(2)}, mesh=None)
        {'loss': array([0., 0.], dtype=float32)}
    """
    if jax.process_count() == 1 or mesh is None:
        return jax.device_get(tree)
    with jax.transfer_guard("allow"):  # meant, though JAX calls it implicit
        return process_allgather(tree, tiled=True)
