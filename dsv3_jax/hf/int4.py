"""Weights of 4 bits as compressed-tensors packs them: Kimi K2-Thinking's experts.

Eight numbers of a row share an int32, the first in its lowest four bits, each stored as number + 8. A group of numbers
of a row has one scale: weight = number · scale.
Source: the compressed-tensors format "pack-quantized", symmetric, of integers.
"""

from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"  # suffixes of the three tensors that replace a weight
IN_ONE = 8  # numbers in an int32


def unpack(packed: np.ndarray, scales: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the weight of 4-bit numbers.

    Args:
        packed: int32 [out, ceil(in / 8)].
        scales: float [out, in / group].
        shape: (out, in).
    Returns: float32 [out, in].

    Example:
        >>> numbers = np.array([[0x76543210]], np.int32)  # stored with 8 added: -8, -7, … -1
        >>> unpack(numbers, np.array([[0.5, 2.0]]), (1, 8)).astype(int).tolist()
        [[-4, -3, -3, -2, -8, -6, -4, -2]]
    """
    bits = packed.view(np.uint32)[:, :, None] >> (4 * np.arange(IN_ONE, dtype=np.uint32))
    numbers = (bits & 15).astype(np.int8).reshape(len(packed), -1)[:, : shape[1]] - np.int8(8)
    group = shape[1] // scales.shape[1]
    grouped = numbers.reshape(shape[0], scales.shape[1], group).astype(np.float32)
    return (grouped * scales.astype(np.float32)[..., None]).reshape(shape)


def check(config: dict[str, Any]) -> None:
    """Check that a quantization_config of compressed-tensors is of this form.

    Raises: ConfigError naming what is not.
    """
    groups = config.get("config_groups")
    if config.get("format") != "pack-quantized" or not isinstance(groups, dict) or not groups:
        raise ConfigError(
            f"quantization_config with format={config.get('format')!r} is not supported for compressed-tensors; "
            "use 'pack-quantized' with config_groups"
        )
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
        for key, value in wanted.items():
            if weights.get(key) != value:
                raise ConfigError(
                    f"quantization_config.config_groups.{name}.weights has {key}={weights.get(key)!r}; use {value!r}"
                )
        if group.get("input_activations"):
            raise ConfigError(f"quantization_config.config_groups.{name} quantizes activations, which is not supported")
