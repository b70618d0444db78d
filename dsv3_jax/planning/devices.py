"""Devices that a plan is made for: what they hold, compute and send, and meshes of them that are not there.

A mesh of fake CPU devices compiles any program, for no device in particular. A TPU topology, where the package libtpu
is installed (`pip install 'dsv3-jax[tpu]'`), compiles it with the real compiler, and needs no TPU.
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
    """One accelerator, by its maker's figures. Bandwidths are of all its links together, one way."""

    memory: float  # bytes
    flops: float  # FLOP/s in bfloat16, dense
    memory_bandwidth: float  # bytes/s
    node: int | None  # devices that have the fast links to one another; None: all of a mesh
    link: float  # bytes/s to devices of the same node
    network: float  # bytes/s to others


# NVIDIA's data sheets, half of a link's figure for both ways, and a 400 Gb/s network card for each GPU, as the cluster
# of the DeepSeek-V3 report, section 3.1, has. Google's pages on TPU v5e, v5p and v6e; likewise half.
DEVICES = {
    "h800": Device(80e9, 989e12, 3.35e12, 8, 200e9, 50e9),
    "h100": Device(80e9, 989e12, 3.35e12, 8, 450e9, 50e9),
    "v5p": Device(95e9, 459e12, 2.765e12, None, 600e9, 600e9),
    "v5e": Device(16e9, 197e12, 0.819e12, None, 200e9, 200e9),
    "v6e": Device(32e9, 918e12, 1.64e12, None, 400e9, 400e9),
}
_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}


def parse_bytes(text: str) -> float:
    """`80GB` or `95.7GiB` in bytes.

    Raises: ConfigError for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|TB|MIB|GIB|TIB)", text.strip().upper())
    if not found or not float(found[1]):
        raise ConfigError(f"memory {text!r} is not of the form 80GB or 95.7GiB")
    return float(found[1]) * _UNITS[found[2]]


def fake_cpus(count: int) -> None:
    """Make this process one of `count` CPU devices and no other, so that a mesh of them can be compiled for.

    Too late where arrays were made before: what devices there are must do.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)


def tpu_mesh(target: str, sizes: dict[str, int]) -> Mesh:
    """A mesh of TPUs that need not be there, for ahead-of-time compilation.

    Args:
        target: `tpu:KIND:TOPOLOGY`, such as tpu:v5p:8x8x8 or tpu:v6e:16x16.
        sizes: of the mesh's axes, in order.
    Raises: ConfigError for another target, without libtpu, or a topology that has another number of devices.
    """
    found = re.fullmatch(r"tpu:(\w+):(\d+(?:x\d+)+)", target)
    if not found:
        raise ConfigError(f"target {target!r} is not of the form tpu:v5p:8x8x8")
    # Else libtpu asks the network, for minutes, on which TPU it is, and complains that it is on none.
    nowhere = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in nowhere.items():
        os.environ.setdefault(name, value)
    from jax.experimental import mesh_utils, topologies

    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{found[1]}:{found[2]}")
    except Exception as error:  # what libtpu and JAX raise is of no one type
        said = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"target {target!r} cannot be compiled for; it needs libtpu, as in pip install 'dsv3-jax[tpu]': {said}"
        ) from error
    needed, there = math.prod(sizes.values()), len(topology.devices)
    if there != needed:
        spelled = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(f"target {target!r} has {there} devices, and mesh {spelled} needs {needed}")
    # A mesh's axis may be a part of the torus's: 16 of 8 × 8 × 8.
    placed = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices=topology.devices, allow_split_physical_axes=True
    )
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
