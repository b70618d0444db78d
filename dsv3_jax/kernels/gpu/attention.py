"""Causal attention on NVIDIA GPUs by kernels of two libraries: tokamax on Hopper, and cuDNN.

Both read keys and values of fewer heads than the queries' as they are, and both scale the scores in
float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.gpu import tokamax_library
from dsv3_jax.ops.attention import RESULTS

# the first compute capability on which cuDNN's attention has keys and values of different widths
CUDNN_CHIP = (9, 0)
CUDNN_VERSION = 91000  # 9.10, likewise
ROWS, KEYS = 64, 128  # tokamax: rows of a warpgroup's block, and keys read at a time
SHARED_MEMORY = 227 << 10  # bytes of it that a block of threads may use on Hopper
MIN_WIDTH = 64  # of a head: below, most of a product's columns are padding
MIN_LENGTH = 128  # of a sequence: below, most of a block's rows are padding


def fits(q: Array, k: Array, v: Array, **settings) -> bool:
    """Whether heads are wide and sequences long enough that the kernel is faster than XLA."""
    widths = (q.shape[-1], v.shape[-1])
    alike = q.dtype == k.dtype == v.dtype
    return (
        alike
        and min(widths) >= MIN_WIDTH
        and all(n % 8 == 0 for n in widths)
        and q.shape[1] >= MIN_LENGTH
    )


def first_of_segment(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of the first token of each token's segment. Equal ids must be neighbours.

    >>> first_of_segment(jnp.array([[4, 4, 7, 7, 7, 0]]))
    Array([[0, 0, 2, 2, 2, 5]], dtype=int32)
    """
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(starts, position, 0), axis=1)


def tokamax_attention(
    q: Float[Array, "B T H X"],
    k: Float[Array, "B T G X"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H V"]:
    """Compute `ops.attention.causal_attention` in bfloat16 by tokamax's kernels for Hopper.

    Departs from the op: a segment's tokens must be neighbours, since a query sees all keys from its
    segment's first on.
    """
    length = q.shape[1]
    pad = -length % KEYS  # later keys than any real query's, and queries whose gradient is zero

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))

    first = None if segment_ids is None else padded(first_of_segment(segment_ids))[:, None]
    return _tokamax(padded(q), padded(k), padded(v), first, scale)[:, :length]


def tokamax_blocks(key: int, value: int) -> tuple[int, int]:
    """(Keys the forward kernel reads at a time, blocks the backward kernels read ahead), by width.

    The larger ones of two if a core's shared memory holds them; its authors' timings are best with
    these.

    >>> tokamax_blocks(192, 128), tokamax_blocks(256, 256)
    ((128, 2), (64, 1))
    """
    key, value = (-(-width // 64) * 64 for width in (key, value))
    both = 2 * (key + value)  # bytes of a row of keys and values in bfloat16
    two = 2  # blocks at a time
    forward = two * KEYS * both + 2 * ROWS * 2 * key
    backward = 2 * ROWS * both + two * ROWS * (both + 12) + 2 * ROWS * 12
    return KEYS if forward < SHARED_MEMORY else KEYS // 2, 2 if backward < SHARED_MEMORY else 1


def _asked(scale: float) -> dict[str, Any]:
    return dict(is_causal=True, logits_soft_cap=None, logits_scale=scale)


def _tokamax_forward(q, k, v, first, scale, *, residuals: bool):
    """(The output, (maxima and sums of each row [B, H, T]) or None)."""
    forward, _ = tokamax_library.flash_attention()
    keys, _ = tokamax_blocks(q.shape[-1], v.shape[-1])
    config = forward.Config(block_q=ROWS, block_kv=keys, num_stages=2, persistent=False)

    def attend(q, k, v, first):
        return forward.flash_attention_kernel(
            q, k, v, None, None, first, None, **_asked(scale), out_dtype=q.dtype,
            normalize_output=True, return_residuals=residuals, use_stable_softmax=True,
            rescale_threshold=1.0, config=config,
        )  # fmt: skip

    return jax.vmap(attend)(q, k, v, first)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tokamax(q, k, v, first, scale):
    return _tokamax_forward(q, k, v, first, scale, residuals=False)[0]


def _tokamax_fwd(q, k, v, first, scale):
    out, rows = checkpoint_name(_tokamax_forward(q, k, v, first, scale, residuals=True), RESULTS)
    return out, (q, k, v, first, out, rows)


def _tokamax_bwd(scale, saved, d_out):
    _, backward = tokamax_library.flash_attention()
    q, k, v, first, out, rows = saved
    _, stages = tokamax_blocks(q.shape[-1], v.shape[-1])
    config = backward.Config(
        block_q_dkv=ROWS, block_kv_dkv=ROWS, block_q_dq=ROWS, block_kv_dq=ROWS, num_stages=stages
    )

    def gradients(q, k, v, first, out, rows, d_out):
        arrays = q, k, v, rows, out, d_out, None, None, first, None
        return backward.flash_attention_vjp_kernel(
            *arrays, **_asked(scale), ds_dtype=None, config=config
        )[:3]

    return *jax.vmap(gradients)(q, k, v, first, out, rows, d_out), None


_tokamax.defvjp(_tokamax_fwd, _tokamax_bwd)


def why_not_cudnn(target: Any) -> str:
    """Why cuDNN's attention cannot run on a target; "" if it can.

    Args: target: a `kernels.choose.Target`, of which the chip is read.
    """
    chip = tuple(int(n) for n in target.chip.split(".") if n.isdigit())
    if chip < CUDNN_CHIP:
        found = f"the chip has {target.chip}" if chip else "the chip is not known"
        needed = ".".join(map(str, CUDNN_CHIP))
        return f"its attention needs compute capability {needed} or newer, and {found}"
    try:
        from jax._src.lib import cuda_versions

        library: Any = cuda_versions  # None without CUDA
        version = library.cudnn_get_version()
    except Exception as error:
        # The names are private, and what a missing library raises differs between versions.
        return f"this process has no cuDNN ({type(error).__name__})"
    if version < CUDNN_VERSION:
        return f"its attention needs cuDNN {CUDNN_VERSION} or newer, and this process has {version}"
    return ""


def fits_cudnn(
    q: Array, k: Array, v: Array, *, segment_ids: Array | None = None, **settings
) -> bool:
    """As `fits`, for rows of one document, and heads of at most 256 numbers."""
    return fits(q, k, v) and segment_ids is None and max(q.shape[-1], v.shape[-1]) <= 256


def cudnn_attention(
    q: Float[Array, "B T H X"],
    k: Float[Array, "B T G X"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: None = None,
) -> Float[Array, "B T H V"]:
    """Compute `ops.attention.causal_attention` in bfloat16 by cuDNN, for rows of one document.

    Documents in one row would need their largest number at compile time, which is not known.
    """
    if q.shape[-1] == v.shape[-1]:
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, implementation="cudnn"
        )
    # jax.nn refuses values of another width; the function below it takes them.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    return dot_product_attention(q, k, v, scale=scale, mask_type=MaskType.CAUSAL)
