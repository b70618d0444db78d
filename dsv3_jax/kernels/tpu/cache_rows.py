"""Writing 8-bit rows to a cache on TPUs, without copies of it.

XLA's scatter, and its dynamic_update_slice, keep 8-bit numbers in tiles of 8 rows. Products and the program's arguments
have tiles of 32. So each write would copy a layer's cache into the other tiling, and back. A selection between old and
new rows reads and writes that cache once, in place, whatever the tiling.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dsv3_jax.ops import cached_attention as op
from dsv3_jax.ops.cached_attention import Stored


def write_rows(stored: Stored, new: Stored, layer: Int[Array, ""], first: Int[Array, " B"]) -> Stored:
    """Compute `ops.cached_attention.write_rows`, for 8-bit rows by a selection.

    Wider rows are scattered, and so are all rows of a stack of several layers.
    """
    if stored.rows.dtype.itemsize > 1 or stored.rows.shape[0] > 1:
        return op.write_rows(stored, new, layer, first)
    assert stored.scales is not None and new.scales is not None
    place = jnp.arange(stored.rows.shape[3], dtype=jnp.int32)[None] - first[:, None]  # which new row goes to each slot
    rows = stored.rows[0]
    for t in range(new.rows.shape[2]):
        rows = jnp.where((place == t)[:, None, :, None], new.rows[:, :, t, None], rows)
    rows = jax.lax.optimization_barrier(rows)  # else both products that read it would select for themselves as well
    return Stored(rows[None], _write_scales(stored.scales, new.scales, first))


def _write_scales(old: Array, new: Array, first: Array) -> Array:
    """Scatter scales one by one: TPUs keep [S, 2] transposed, so a row's two scales are not neighbours."""
    _, batch, groups, _, count = old.shape
    b, g, p, t = np.ogrid[:batch, :groups, :count, : new.shape[2]]
    at = (0, b, g, p, first[:, None, None, None] + t)
    turned, values = old.swapaxes(3, 4), new.swapaxes(2, 3)
    turned = turned.at[at].set(values, mode="drop", unique_indices=True, wrap_negative_indices=False)
    return turned.swapaxes(3, 4)
