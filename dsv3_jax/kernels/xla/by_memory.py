"""Cross-entropy in few, large chunks of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.ops.cross_entropy import chunked_cross_entropy
from dsv3_jax.ops.dtypes import sum_dtype

LOGITS_BYTES = 1 << 32  # of a chunk


def cross_entropy_by_memory(
    h: Float[Array, "n D"],
    w: Float[Array, "D W"],
    targets: Int[Array, " n"],
    mask: Bool[Array, " n"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute `ops.cross_entropy.chunked_cross_entropy` in chunks of LOGITS_BYTES of logits.

    Each chunk reads and writes the head's complete gradient in float32. An accelerator has memory
    for few, large chunks; with a single one there is no loop.
    """
    chunk = max(1, LOGITS_BYTES // (sum_dtype(h.dtype).itemsize * w.shape[1]))
    return chunked_cross_entropy(h, w, targets, mask, chunk=chunk, log_sums=log_sums_in_one_pass)


def log_sums_in_one_pass(
    logits: Float[Array, "n W"],
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Compute `ops.cross_entropy.log_sums_in_two_passes`, but read the logits once.

    A part of a row has its maximum, and a sum that counts from it. A CPU is faster in two passes.

    Example:
        >>> log_sums_in_one_pass(jnp.zeros((1, 4)))  # ln 4, and 0
        (Array([1.3862944], dtype=float32), Array([0.], dtype=float32))
    """

    def join(a, b):
        top = jnp.maximum(a[0], b[0])
        return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

    lowest = jnp.array(np.finfo(logits.dtype).min, logits.dtype)
    nothing = (lowest, jnp.array(0, logits.dtype))
    top, total = jax.lax.reduce((logits, jnp.ones_like(logits)), nothing, join, (1,))
    return top + jnp.log(total), top
