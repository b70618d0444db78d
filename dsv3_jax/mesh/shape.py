"""The shape of a mesh: as text, and as slices of devices.

A mesh has three axes, see `sharding.py`. An axis may have size 1.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import ConfigError

AXES = ("data", "expert", "tensor")
MOST_DEVICES = 65536  # of a mesh: more is a typing error, and JAX would try to make them


def parse_mesh(text: str) -> dict[str, int]:
    """Read `data=2,expert=4` as {"data": 2, "expert": 4, "tensor": 1}; an absent axis has size 1.

    Raises: ConfigError for other axes, one that is named twice, sizes that are not positive whole
        numbers, or more than MOST_DEVICES devices in all.

    >>> parse_mesh("data=2,expert=4")
    {'data': 2, 'expert': 4, 'tensor': 1}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if not found or found[1] not in AXES:
            form = ",".join(f"{axis}=N" for axis in AXES)
            raise ConfigError(f"mesh={text!r} is not of the form {form}")
        if found[1] in sizes:
            raise ConfigError(f"mesh={text!r} names {found[1]} twice")
        sizes[found[1]] = int(found[2])

    if math.prod(sizes.values()) > MOST_DEVICES:
        raise ConfigError(f"mesh={text!r} has more than {MOST_DEVICES:,} devices")
    return dict.fromkeys(AXES, 1) | sizes


def format_mesh(mesh: Mesh | AbstractMesh) -> str:
    """Write `data=2,expert=4,tensor=1`, as `parse_mesh` reads it.

    Example:
        >>> format_mesh(AbstractMesh((2, 4, 1), AXES))
        'data=2,expert=4,tensor=1'
    """
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def over_slices(sizes: Sequence[int], devices: Sequence[Any], slices: dict[int, int]) -> np.ndarray:
    """Arrange devices of several slices, nodes of GPUs or TPU pods, with slower networks between.

    Slices are counted along "data", and along "expert" and "tensor" only as far as "data" is not
    divisible by them.

    Args:
        sizes: of the axes.
        slices: the number of devices by slice.
    Raises: ConfigError if the mesh does not divide evenly over the slices.
    """
    # How many slices each axis extends over.
    left = len(slices)
    over = []
    for size in sizes:
        over.append(math.gcd(size, left))
        left //= over[-1]

    # The axes must use up all slices, and slices must be of one size.
    if left > 1 or len(set(slices.values())) > 1:
        mesh = ",".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        counts = " + ".join(map(str, slices.values()))
        raise ConfigError(
            f"mesh {mesh} does not divide evenly over {len(slices)} slices (nodes or pods) of "
            f"{counts} devices"
        )

    # Each axis crosses `over` slices, and has `inside` devices in each of them.
    inside = [size // number for size, number in zip(sizes, over, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inside, over, devices, allow_split_physical_axes=True
    )
