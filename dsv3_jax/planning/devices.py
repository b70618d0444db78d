"""Device types with their manufacturers' figures, and meshes of devices that this machine does not have.

A mesh of fake CPU devices compiles any program, for no particular device. With the package libtpu
(`pip install 'dsv3-jax[tpu]'`), a TPU topology compiles it with the real compiler and without a TPU.
"""

import contextlib
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

from dsv3_jax.config import ConfigError


@dataclass(frozen=True)
class Device:
    """One accelerator. Bandwidths are the sum of all its links, in one direction.

    Example:
        >>> DEVICES["v5e"].memory, DEVICES["v5e"].node is None  # 16 GB; links are equally fast in all of a mesh
        (16000000000.0, True)
    """

    memory: float  # bytes
    flops: float  # FLOP/s in bfloat16, dense
    memory_bandwidth: float  # bytes/s
    node: int | None  # number of devices with fast links to each other; None means all of a mesh
    link: float  # bytes/s to devices of the same node
    network: float  # bytes/s to other devices


# NVIDIA's data sheets give a link's figure for both directions, of which this is half. Each GPU has a network card of
# 400 Gb/s, as in the DeepSeek-V3 report, section 3.1. Google's pages on TPU v5e, v5p and v6e, also halved.
DEVICES = {
    "h800": Device(80e9, 989e12, 3.35e12, 8, 200e9, 50e9),
    "h100": Device(80e9, 989e12, 3.35e12, 8, 450e9, 50e9),
    "v5p": Device(95e9, 459e12, 2.765e12, None, 600e9, 600e9),
    "v5e": Device(16e9, 197e12, 0.819e12, None, 200e9, 200e9),
    "v6e": Device(32e9, 918e12, 1.64e12, None, 400e9, 400e9),
}
_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}


def parse_bytes(text: str) -> float:
    """Convert a size such as `80GB` or `95.7GiB` to bytes.

    Raises: ConfigError for any other text.

    Example:
        >>> parse_bytes("80GB"), parse_bytes("1.5 GiB")
        (80000000000.0, 1610612736.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|TB|MIB|GIB|TIB)", text.strip().upper())
    if not match or not float(match[1]):
        raise ConfigError(f"memory={text!r} is not a size; use the form 80GB or 95.7GiB")
    return float(match[1]) * _UNITS[match[2]]


def fake_cpus(count: int) -> None:
    """Give this process `count` CPU devices and no others, so that it can compile for a mesh of them.

    Once arrays exist, JAX cannot change its devices, and this has no effect.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)


def tpu_mesh(target: str, sizes: dict[str, int]) -> Mesh:
    """Create a mesh of TPUs for ahead-of-time compilation; the TPUs need not exist.

    Args:
        target: `tpu:KIND:TOPOLOGY`, such as tpu:v5p:8x8x8 or tpu:v6e:16x16.
        sizes: of the mesh's axes, in order.
    Raises: ConfigError for another form of target, without libtpu, or if the topology has another number of devices.

    Example:
        >>> tpu_mesh("v5p", {"data": 8})
        Traceback (most recent call last):
            ...
        dsv3_jax.config.ConfigError: target='v5p' is not of the form tpu:KIND:TOPOLOGY; use one such as tpu:v5p:8x8x8
    """
    match = re.fullmatch(r"tpu:(\w+):(\d+(?:x\d+)+)", target)
    if not match:
        raise ConfigError(f"target={target!r} is not of the form tpu:KIND:TOPOLOGY; use one such as tpu:v5p:8x8x8")
    # Without these libtpu asks the network for minutes which TPU it is on, and warns that there is none.
    offline = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in offline.items():
        os.environ.setdefault(name, value)
    from jax.experimental import mesh_utils, topologies

    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{match[1]}:{match[2]}")
    except Exception as error:  # libtpu and JAX raise several types
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"target={target!r} needs libtpu to compile; run pip install 'dsv3-jax[tpu]' ({reason})"
        ) from error
    needed, available = math.prod(sizes.values()), len(topology.devices)
    if available != needed:
        mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(
            f"target={target!r} has {available} devices, but mesh={mesh} needs {needed}; change one of them"
        )
    # An axis of the mesh may be a part of an axis of the torus, as 16 of 8 × 8 × 8.
    devices = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices=topology.devices, allow_split_physical_axes=True
    )
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
