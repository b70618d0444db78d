"""Causal attention on NVIDIA GPUs by kernels of two libraries: tokamax on Hopper, and cuDNN.

Both read keys and values of fewer heads than the queries' as they are, and both scale the scores in float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.gpu import tokamax_library

CUDNN_CHIP = (9, 0)  # the first compute capability on which cuDNN's attention has keys and values of different widths
CUDNN_VERSION = 91000  # 9.10, likewise
MIN_WIDTH = 64  # of a head: below, most of a product's columns are padding
MIN_LENGTH = 128  # of a sequence: below, most of a block's rows are padding


def in_bfloat16(*arrays: Array) -> bool:
    """Whether all arrays are bfloat16. The kernels would round float32 to it."""
    return all(a.dtype == jnp.bfloat16 for a in arrays)


def fits(q: Array, k: Array, v: Array, **settings) -> bool:
    """Whether heads are wide and sequences long enough that the kernel is faster than XLA."""
    widths = (q.shape[-1], v.shape[-1])
    return min(widths) >= MIN_WIDTH and all(n % 8 == 0 for n in widths) and q.shape[1] >= MIN_LENGTH


def first_of_segment(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of the first token of each token's segment. Equal ids must be neighbours.

    >>> first_of_segment(jnp.array([[4, 4, 7, 7, 7, 0]]))
    Array([[0, 0, 2, 2, 2, 5]], dtype=int32)
    """
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(starts, position, 0), axis=1)


def tokamax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H V"]:
    """Compute `ops.attention.causal_attention` in bfloat16 by tokamax's kernels for Hopper, forward and backward.

    Departs from the op: a segment's tokens must be neighbours, since a query sees all keys from its segment's first on.
    """
    first = None if segment_ids is None else first_of_segment(segment_ids)[:, None]
    return _tokamax(q, k, v, first, scale)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tokamax(q, k, v, first, scale):
    op, mask = tokamax_library.flash_attention()
    with tokamax_library.tracing_for_hopper():
        return op(q, k, v, logits_scale=scale, mask=mask(is_causal=True, k_start=first))


def _tokamax_fwd(q, k, v, first, scale):
    op, mask = tokamax_library.flash_attention()
    with tokamax_library.tracing_for_hopper():
        return jax.vjp(partial(op, logits_scale=scale, mask=mask(is_causal=True, k_start=first)), q, k, v)


def _tokamax_bwd(scale, pull_back, d_out):
    with tokamax_library.tracing_for_hopper():
        return *pull_back(d_out), None


_tokamax.defvjp(_tokamax_fwd, _tokamax_bwd)


def why_not_cudnn(target: Any) -> str:
    """Why cuDNN's attention cannot run on a target, in words; "" if it can.

    Args: target: a `kernels.choose.Target`, of which the chip is read.
    """
    chip = tuple(int(n) for n in target.chip.split(".") if n.isdigit())
    if chip < CUDNN_CHIP:
        found = f"the chip has {target.chip}" if chip else "the chip is not known"
        return f"its attention needs compute capability {'.'.join(map(str, CUDNN_CHIP))} or newer, and {found}"
    try:
        from jax._src.lib import cuda_versions

        library: Any = cuda_versions  # None without CUDA
        version = library.cudnn_get_version()
    except Exception as error:  # the names are private, and what a missing library raises differs between versions
        return f"this process has no cuDNN ({type(error).__name__})"
    if version < CUDNN_VERSION:
        return f"its attention needs cuDNN {CUDNN_VERSION} or newer, and this process has {version}"
    return ""


def fits_cudnn(q: Array, k: Array, v: Array, *, packed: bool = False, **settings) -> bool:
    """As `fits`, for rows of one document, and heads of at most 256 numbers."""
    return fits(q, k, v) and not packed and max(q.shape[-1], v.shape[-1]) <= 256


def cudnn_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: None = None,
) -> Float[Array, "B T H V"]:
    """Compute `ops.attention.causal_attention` in bfloat16 by cuDNN, for rows of one document.

    Documents in one row would need their largest number at compile time, which is not known.
    """
    if q.shape[-1] == v.shape[-1]:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    # jax.nn refuses values of another width; the function below it takes them.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    return dot_product_attention(q, k, v, scale=scale, mask_type=MaskType.CAUSAL)
