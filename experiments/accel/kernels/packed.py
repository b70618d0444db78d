"""The cache that the kernels here read: latent and rotated key of a token side by side, in one array of all layers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv3_jax.ops.cached_attention import Stored


class Packed(NamedTuple):
    """Rows [c_kv, k_rope] of L layers, B sequences and S slots. `Stored` has them in two arrays."""

    rows: Array  # [L, B, 1, S, X] float32, bfloat16, int8 or float8_e4m3fn; may end in zeros
    scales: Array | None  # float32 [L, B, 1, S, 2] of 8-bit rows: one for each of the two


def in_the_table(kernel: Callable[..., Array], multiple: int) -> Callable[..., Array]:
    """`ops.cached_attention.cached_attention` by a kernel of packed rows. It packs the cache each time: for checks.

    Args: multiple: of a packed row's width.
    """

    def attend(queries: Sequence[Any], keys: Sequence[Stored], values: Stored, last: Any, *, scale: float) -> Array:
        parts = tuple(q.shape[-1] for q in queries)
        rows = jnp.concatenate([key.rows for key in keys], axis=-1)[None]
        rows = jnp.pad(rows, [(0, 0)] * 4 + [(0, -sum(parts) % multiple)])
        scales = None if values.scales is None else jnp.concatenate([key.scales for key in keys], axis=-1)[None]
        q = jnp.concatenate(list(queries), axis=-1)
        return kernel(q, Packed(rows, scales), np.int32(0), last, parts=parts, scale=scale)

    return attend


def is_latent(queries: Sequence[Any], keys: Sequence[Stored], values: Stored, last: Any, **settings: Any) -> bool:
    """Whether a cache is latents and rotated keys, of one head."""
    return len(keys) == 2 and values.rows.shape == keys[0].rows.shape and values.rows.shape[1] == 1
