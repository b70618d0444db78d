"""Rows of the embedding table, and their gradient: the sum of what comes back to each token's row.

A GPU adds the rows of one token in whatever order its threads come to it, so two runs differ in
their last bits. `look_up_in_order` adds them in an order that depends on the tokens alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.varying import as_varying, zeros

BLOCK = 128  # sorted rows that are added by one product


def look_up(table: Float[Array, "W D"], tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """Return the rows of `tokens`, in the table's dtype. The gradient is a scatter that adds."""
    return jnp.take(table, tokens, axis=0, mode="clip")


def look_up_in_order(table: Float[Array, "W D"], tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """Compute `look_up` with a gradient that is the same to the last bit each time.

    The gradient's rows are sorted by token and cut into blocks. A product with zeros and ones adds
    up each token's rows in a block, and another one adds what blocks before hold of a block's first
    token. Each sum is then written once.
    """
    return _rows(as_varying(table, tokens), tokens)


@jax.custom_vjp
def _rows(table, tokens):
    return look_up(table, tokens)


def _rows_fwd(table, tokens):
    return look_up(table, tokens), (tokens, table[:, :0])


def _rows_bwd(saved, d_rows):
    tokens, like_table = saved
    num_tokens = like_table.shape[0]
    dim = d_rows.shape[-1]
    flat = jnp.clip(tokens.reshape(-1), 0, num_tokens - 1)
    order = jnp.argsort(flat, stable=True)
    pad = -flat.size % BLOCK
    ids = jnp.pad(flat[order], (0, pad), constant_values=num_tokens)  # an id after all others
    rows = jnp.pad(d_rows.reshape(-1, dim)[order], ((0, pad), (0, 0))).reshape(-1, BLOCK, dim)
    block = ids.reshape(-1, BLOCK)
    first = block[:, 0]
    last = block[:, -1]

    def add(mask, rows):
        # The products are with 0 and 1, so they are exact, if the rows are not rounded.
        return jnp.matmul(mask.astype(rows.dtype), rows, precision=jax.lax.Precision.HIGHEST)

    # at each row, its token's rows in the block
    sums = add(block[:, :, None] == block[:, None, :], rows)
    # blocks before that end with a block's first token
    earlier = jnp.tril(first[:, None] == last[None, :], -1)
    before = add(earlier, sums[:, -1])
    sums = sums + jnp.where((block == first[:, None])[..., None], before[:, None], 0)
    # A token's last row holds its sum. Other rows are dropped: their places are beyond the table,
    # and distinct too.
    ends = (ids != jnp.append(ids[1:], num_tokens)) & (ids < num_tokens)
    place = jnp.where(ends, ids, num_tokens + jnp.arange(ids.size, dtype=ids.dtype))
    d_table = zeros((num_tokens, dim), d_rows)
    sums = sums.reshape(-1, dim)
    return d_table.at[place].set(sums, mode="drop", unique_indices=True), None


_rows.defvjp(_rows_fwd, _rows_bwd)
