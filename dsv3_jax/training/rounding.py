"""Weights in fewer bits than they train in, for the sampler of GRPO.

An engine that holds weights of 8 or 4 bits samples from another policy than the trainer's, and its
routers choose other experts. Here the rounded numbers stay in the dtype of the weights: this shows
what the rounding does, and saves neither time nor memory. Activations are not rounded.

Sources: FlashRL (Liu, Yao et al., 2025) for the practice; DeepSeek-V3 report, section 3.3, for
FP8's blocks; Kimi K2-Thinking's folder for groups of 4 bits; GPTQ, arXiv 2210.17323, for 3.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dsv3_jax.kernels.low_precision import LARGEST, round_to_tiles, spread, tile_scales
from dsv3_jax.mesh.sharding import names_of
from dsv3_jax.model.counting import ADAPTED
from dsv3_jax.training.lora import sides

BLOCK = 128  # rows and columns of FP8 with one scale
GROUP = 32  # inputs of an output with one scale of 4 or 3 bits


def rounded(params: nnx.State, kind: str) -> nnx.State:
    """Round the matrices of attention and feed-forward layers; embedding, head and routers stay.

    So do matrices that are packed already.

    Args: kind: a value of `Grpo.sampler_weights`.

    Example:
        >>> w = nnx.Param(jnp.array([[7.0, 14.0], [-3.4, 1.2]]), axes=("dim", "hidden"))
        >>> rounded(nnx.State({"ffn": {"w": w}}), "int4")["ffn"]["w"][...]
        Array([[ 7., 14.],
               [-3.,  2.]], dtype=float32)
    """

    def of(path: tuple, v: nnx.Variable) -> nnx.Variable:
        w, names = v.get_value(), names_of(v)
        if not {*ADAPTED.values()} & {*path} or not names or not isinstance(w, jax.Array):
            return v
        return v.replace(_rounded(w, names, kind))

    return nnx.from_flat_state((path, of(path, v)) for path, v in nnx.to_flat_state(params))


@partial(jax.jit, static_argnums=(1, 2))
def _rounded(w: Array, names: tuple[str | None, ...], kind: str) -> Array:
    if kind == "bfloat16":
        return jax.lax.reduce_precision(w, 8, 7)

    # A weight with heads is one matrix over all heads: [*layers, *experts, left, right].
    left, right, input_is_right = sides(names)
    first, second = (w.ndim - len(names) + axis for axis in (left, right))
    x = w.reshape(*w.shape[:first], math.prod(w.shape[first:second]), -1)
    if kind == "fp8":
        x = round_to_tiles(x, (BLOCK, BLOCK))
    else:
        # Whole numbers of ± 7 or ± 3 times a scale.
        tile = (1, GROUP) if input_is_right else (GROUP, 1)
        most = {"int4": 7, "int3": 3}[kind]
        scale = spread(tile_scales(x, tile) * (LARGEST / most), tile, x.shape)
        x = jnp.round(x / scale) * scale
    return x.reshape(w.shape).astype(w.dtype)
