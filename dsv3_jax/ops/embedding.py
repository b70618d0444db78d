"""Rows of the embedding table, and their gradient: the sum of what comes back to each token's row.

A GPU adds the rows of one token in whatever order its threads come to it, so two runs differ in their last bits.
`look_up_in_order` adds them in an order that depends on the tokens alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.varying import as_varying, zeros


def look_up(table: Float[Array, "W D"], tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """Return the rows of `tokens`, in the table's dtype. The gradient is a scatter that adds."""
    return jnp.take(table, tokens, axis=0, mode="clip")


def look_up_in_order(table: Float[Array, "W D"], tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """Compute `look_up` with a gradient that is the same to the last bit each time.

    The gradient's rows are sorted by token. A scan over the sorted rows adds up each token's rows, in pairs, so its
    rounding errors are smaller than those of adding one by one. The last row of each token then holds its sum.
    """
    return _rows(as_varying(table, tokens), tokens)


@jax.custom_vjp
def _rows(table, tokens):
    return look_up(table, tokens)


def _rows_fwd(table, tokens):
    return look_up(table, tokens), (tokens, table[:, :0])


def _rows_bwd(saved, d_rows):
    tokens, like_table = saved
    num_tokens, dim = like_table.shape[0], d_rows.shape[-1]
    flat = jnp.clip(tokens.reshape(-1), 0, num_tokens - 1)
    order = jnp.argsort(flat, stable=True)
    ids, rows = flat[order], d_rows.reshape(-1, dim)[order]
    edge = jnp.full((1,), -1, ids.dtype)
    first = ids != jnp.concatenate([edge, ids[:-1]])
    last = ids != jnp.concatenate([ids[1:], edge])

    def join(a, b):
        (a_begins, a_sum), (b_begins, b_sum) = a, b
        return a_begins | b_begins, jnp.where(b_begins, b_sum, a_sum + b_sum)

    sums = jax.lax.associative_scan(join, (first[:, None], rows))[1]
    # Rows that are not a token's last are dropped; their places are distinct too, so that none is written twice.
    place = jnp.where(last, ids, num_tokens + jnp.arange(ids.size, dtype=ids.dtype))
    return zeros((num_tokens, dim), d_rows).at[place].set(sums, mode="drop", unique_indices=True), None


_rows.defvjp(_rows_fwd, _rows_bwd)
