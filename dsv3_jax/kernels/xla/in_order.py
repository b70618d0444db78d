"""Rows of the embedding table, with a gradient that is the same to the last bit each time.

A GPU's scatter adds the rows of one token in whatever order its threads come to it, so two runs
differ in their last bits. Here the order depends on the tokens alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.embedding import look_up
from dsv3_jax.ops.varying import as_varying, zeros

BLOCK = 128  # sorted rows that are added by one product


def look_up_in_order(table: Float[Array, "W D"], tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """Compute `ops.embedding.look_up`.

    The gradient's rows are sorted by token and cut into J blocks of b rows. A product with zeros
    and ones adds up each token's rows in a block, and another one adds what blocks before hold of a
    block's first token. Each sum is then written once.
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

    # Sort the rows by token, and cut them into blocks. The last block is padded with an id after
    # all others.
    flat = jnp.clip(tokens.reshape(-1), 0, num_tokens - 1)
    order = jnp.argsort(flat, stable=True)
    pad = -flat.size % BLOCK
    ids = jnp.pad(flat[order], (0, pad), constant_values=num_tokens)
    sorted_rows = jnp.pad(d_rows.reshape(-1, dim)[order], ((0, pad), (0, 0)))
    ids_Jb = ids.reshape(-1, BLOCK)
    rows_JbD = sorted_rows.reshape(-1, BLOCK, dim)

    # In each block, give every row the sum of its token's rows.
    sums_JbD = _add_up(ids_Jb[:, :, None] == ids_Jb[:, None, :], rows_JbD)

    # To the rows of a block's first token, add the last sums of the blocks before that end with it.
    first_J = ids_Jb[:, 0]
    last_J = ids_Jb[:, -1]
    earlier_JJ = jnp.tril(first_J[:, None] == last_J[None, :], -1)
    before_JD = _add_up(earlier_JJ, sums_JbD[:, -1])
    of_first = (ids_Jb == first_J[:, None])[..., None]
    sums = (sums_JbD + jnp.where(of_first, before_JD[:, None], 0)).reshape(-1, dim)

    # A token's last row holds its sum. Other rows are dropped: their places are beyond the table,
    # and distinct too.
    ends = (ids != jnp.append(ids[1:], num_tokens)) & (ids < num_tokens)
    place = jnp.where(ends, ids, num_tokens + jnp.arange(ids.size, dtype=ids.dtype))
    d_table = zeros((num_tokens, dim), d_rows)
    return d_table.at[place].set(sums, mode="drop", unique_indices=True), None


_rows.defvjp(_rows_fwd, _rows_bwd)


def _add_up(mask: Array, rows: Array) -> Array:
    """Add rows where the mask is true; with zeros and ones the products are exact."""
    return jnp.matmul(mask.astype(rows.dtype), rows, precision=jax.lax.Precision.HIGHEST)
