"""Accelerators with their makers' figures, and meshes of devices that this machine does not have.

A mesh of fake CPU devices compiles any program, for no particular device. A target compiles it with
the device's own compiler and without the device: GPUs with JAX's CUDA plugin, TPUs with libtpu
(extras `plan-gpu` and `plan-tpu`).
"""

import contextlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from dsv3_jax.config import ConfigError


@dataclass(frozen=True)
class Accelerator:
    """One accelerator. Bandwidths are the sum of all its links, in one direction.

    Example:
        >>> v5e = ACCELERATORS["v5e"]
        >>> v5e.memory, v5e.node is None  # all links are equally fast
        (16900000000.0, True)
    """

    memory: float  # bytes
    flops: float  # FLOP/s in bfloat16, dense
    # FLOP/s of products of float32 numbers at JAX's default precision: TF32, or bfloat16 on TPU
    float32_flops: float
    memory_bandwidth: float  # bytes/s
    node: int | None  # number of devices with fast links to each other; None means all of a mesh
    link: float  # bytes/s to devices of the same node
    network: float  # bytes/s to other devices
    clock: float = 0.0  # cycles/s, for a compiler that estimates cycles; 0 means that it does not


# NVIDIA's data sheets give a link's figure for both directions, of which this is half. Each GPU has
# a network card of 400 Gb/s, as in the DeepSeek-V3 report, section 3.1. Google's pages on TPU v5e,
# v5p and v6e, also halved. A TPU's clock is its FLOP/s over 2 for each cell of its matrix units: 4
# of 128 × 128 in v5e, 8 in v5p, 4 of 256 × 256 in v6e. Its memory is what libtpu's compiler allows
# a program: 95.73, 15.75 and 31.24 GiB.
ACCELERATORS = {
    "h800": Accelerator(80e9, 989e12, 495e12, 3.35e12, 8, 200e9, 50e9),
    "h100": Accelerator(80e9, 989e12, 495e12, 3.35e12, 8, 450e9, 50e9),
    "v5p": Accelerator(102.8e9, 459e12, 459e12, 2.765e12, None, 600e9, 600e9, clock=1.75e9),
    "v5e": Accelerator(16.9e9, 197e12, 197e12, 0.819e12, None, 200e9, 200e9, clock=1.5e9),
    "v6e": Accelerator(33.5e9, 918e12, 918e12, 1.64e12, None, 400e9, 400e9, clock=1.75e9),
}
# XLA's compiler for NVIDIA GPUs needs a description of one, a file beside this one. XLA prints the
# text on a machine with the device.
GPU_FILES = {"h100": "h100.txtpb"}
_GPUS_A_NODE = 8
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
    """Give this process `count` CPU devices and no others, to compile for a mesh of them.

    Once arrays exist, JAX cannot change its devices, and this has no effect.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)


class PlannedDevices(NamedTuple):
    """Devices to compile for that need not exist."""

    text: str  # as the user wrote it
    platform: str  # gpu or tpu
    kind: str  # a name in ACCELERATORS
    shape: str  # a number of GPUs, or a TPU topology such as 2x2x1


def parse_target(text: str) -> PlannedDevices:
    """Read a target such as gpu:h100, gpu:h100:8, tpu:v5p:2x2x1 or tpu:v6e:2x2.

    Raises: ConfigError for another form or device.

    Example:
        >>> parse_target("gpu:h100:8").kind
        'h100'
    """
    match = re.fullmatch(
        r"(gpu):(\w+)(?::([1-9]\d{0,5}))?|(tpu):(\w+):([1-9]\d*(?:x[1-9]\d*)*)", text
    )
    if not match:
        raise ConfigError(
            f"target={text!r} is not of the form gpu:KIND:NUMBER or tpu:KIND:TOPOLOGY; "
            "use one such as gpu:h100:8, tpu:v5p:2x2x1 or tpu:v6e:2x2"
        )
    platform = match[1] or match[4]
    kind = match[2] or match[5]

    # A GPU needs its description; JAX's compiler knows the TPUs.
    if platform == "gpu":
        known = list(GPU_FILES)
    else:
        known = [name for name, device in ACCELERATORS.items() if device.clock]
    if kind not in known:
        raise ConfigError(f"target={text!r}: {kind!r} is not one of {', '.join(known)}")
    return PlannedDevices(text, platform, kind, match[3] or match[6] or "1")


def target_mesh(text: str, sizes: dict[str, int]) -> Mesh:
    """Create a mesh of a target's devices for compilation; the devices need not exist.

    Args:
        text: see `parse_target`.
        sizes: of the mesh's axes, in order. A mesh smaller than the target uses its first devices.
    Raises: ConfigError for another form of target, a compiler that is missing, or a mesh larger
        than the target.

    Example:
        >>> target_mesh("gpu:a100", {"data": 1})
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: target='gpu:a100': 'a100' is not one of h100
    """
    target = parse_target(text)
    devices = _devices(target)

    needed = math.prod(sizes.values())
    if len(devices) < needed:
        mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(
            f"mesh={mesh} needs {needed} devices, but target={text!r} has {len(devices)}; change "
            "one of them"
        )
    shape = tuple(sizes.values())
    kinds = (AxisType.Auto,) * len(sizes)
    if target.platform == "tpu" and len(devices) == needed:
        from jax.experimental import mesh_utils

        # An axis of the mesh may be a part of an axis of the torus, as 16 of 8 × 8 × 8.
        array = mesh_utils.create_device_mesh(
            shape, devices=devices, allow_split_physical_axes=True
        )
        return Mesh(array, tuple(sizes), axis_types=kinds)
    return Mesh(np.array(devices[:needed]).reshape(shape), tuple(sizes), axis_types=kinds)


def _devices(target: PlannedDevices) -> list[Any]:
    """Return the devices of a target, as its compiler describes them."""
    from jax.experimental import topologies

    if target.platform == "gpu":
        count = int(target.shape)
        nodes = -(-count // _GPUS_A_NODE)
        layout = f"1x{nodes}x{_GPUS_A_NODE if nodes > 1 else count}"  # slices × nodes × GPUs
        described = Path(__file__).with_name(GPU_FILES[target.kind]).read_text(encoding="utf-8")
        topology = {"platform": "cuda", "target_config": described, "topology": layout}
        compiler, package = "JAX's CUDA plugin", "jax[cuda13-local]"
    else:
        # Without the first three libtpu asks the network for minutes which TPU it is on, and warns
        # that there is none. It uses no TPU here, so another process may have loaded it too.
        offline = {
            "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8",
            "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }  # fmt: skip
        for name, value in offline.items():
            os.environ.setdefault(name, value)
        topology = {"platform": "tpu", "topology_name": f"{target.kind}:{target.shape}"}
        compiler, package = "libtpu", "jax[tpu]"

    try:
        return topologies.get_topology_desc(**topology).devices
    except Exception as error:  # the plugins and JAX raise several types
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"target={target.text!r} needs {compiler} (pip install '{package}') for a "
            f"known shape: {reason}"
        ) from error
