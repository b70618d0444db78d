"""Writing 8-bit rows to a cache on TPUs, without copies of it.

XLA's scatter, and its dynamic_update_slice, keep 8-bit numbers in tiles of 8 rows. Products and the
program's arguments have tiles of 32. So each write would copy a layer's cache into the other
tiling, and back. A selection between old and new rows reads and writes that cache once, in place,
whatever the tiling.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax.ops import cached_attention as op


def write_rows(stored: Any, new: Any, layer: Int[Array, ""], first: Int[Array, " B"]) -> Any:
    """Compute `ops.cached_attention.write_rows`, for 8-bit rows by a selection.

    Wider numbers are scattered, and so are all of a stack of several layers.
    """

    def put(old: Array, new: Array) -> Array:
        if old.dtype.itemsize > 1 or old.shape[0] > 1:
            return op.write_rows(old, new, layer, first)

        # The new row t of a sequence goes to the slot first + t.
        place_BS = jnp.arange(old.shape[3], dtype=jnp.int32)[None] - first[:, None]
        rows = old[0]
        for t in range(new.shape[2]):
            here = (place_BS == t)[:, None, :, None]
            rows = jnp.where(here, new[:, :, t, None], rows)

        # Without the barrier the products that read it would each select for themselves as well.
        return jax.lax.optimization_barrier(rows)[None]

    return jax.tree.map(put, stored, new)
