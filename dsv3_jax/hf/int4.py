"""Weights of 4 bits as compressed-tensors packs them: Kimi K2-Thinking's experts.

Eight numbers of a row share an int32, the first in its lowest four bits, each stored as number + 8.
A group of numbers of a row has one scale: weight = number · scale.
Source: the compressed-tensors format "pack-quantized", symmetric, of integers.
"""

from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError

METHOD = "compressed-tensors"
# suffixes of the three tensors that replace a weight
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
IN_ONE = 8  # numbers in an int32
_WANTED = {
    "format": "pack-quantized",
    "input_activations": None,
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
}


def shapes(shape: tuple[int, ...], group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the packed numbers and of the scales of a weight [out, in].

    Example:
        >>> shapes((2, 64), group=32)
        ((2, 8), (2, 2))
    """
    rows, columns = shape
    return (rows, -(-columns // IN_ONE)), (rows, -(-columns // group))


def unpack(
    packed: np.ndarray, scales: np.ndarray, shape: tuple[int, ...], group: int
) -> np.ndarray:
    """Return the weight of 4-bit numbers.

    Args:
        packed: int32 [out, ⌈in / 8⌉].
        scales: float [out, ⌈in / group⌉].
        shape: (out, in).
        group: numbers with one scale.
    Returns: float32 [out, in].

    Example:
        >>> numbers = np.array([[0x76543210]], np.int32)  # stored with 8 added: -8, -7, … -1
        >>> unpack(numbers, np.array([[0.5, 2.0]]), (1, 8), group=4).astype(int).tolist()
        [[-4, -3, -3, -2, -8, -6, -4, -2]]
    """
    # Four bits of each int32 after the other, the lowest first; a row's last int32 may be partial.
    bits = packed.view(np.uint32)[:, :, None] >> (4 * np.arange(IN_ONE, dtype=np.uint32))
    numbers = (bits & 15).astype(np.float32).reshape(len(packed), -1)[:, : shape[1]] - 8
    return numbers * np.repeat(scales.astype(np.float32), group, axis=1)[:, : shape[1]]


def group_size(config: dict[str, Any]) -> int:
    """Return how many numbers share a scale, by a quantization_config of compressed-tensors.

    Raises: ConfigError when it is of another form.

    Example:
        >>> weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
        >>> groups = {"group_0": {"weights": weights | {"group_size": 32}}}
        >>> group_size({"format": "pack-quantized", "config_groups": groups})
        32
    """
    # One group of weights, so that all matrices are packed alike.
    try:
        [group] = config["config_groups"].values()
        found = {
            **group["weights"],
            "format": config["format"],
            "input_activations": group.get("input_activations"),
        }
        size = found["group_size"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"quantization_config={config!r:.80} is not one group of packed weights"
        ) from error

    # Other formats, signs and groupings would be read as wrong numbers.
    for key, value in _WANTED.items():
        if found.get(key) != value:
            raise ConfigError(
                f"quantization_config has {key}={found.get(key)!r} of weights; use {value!r}"
            )
    if type(size) is not int or size < 1:
        raise ConfigError(
            f"quantization_config has group_size={size!r}, which is not a positive number; use 32"
        )
    return size
