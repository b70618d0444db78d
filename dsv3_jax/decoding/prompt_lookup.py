"""Prompt look-up: where the last tokens of a text occurred before in it."""

import jax.numpy as jnp
from jaxtyping import Array, Int

LONGEST_MATCH = 8  # tokens that are compared


def earlier_match(text: Int[Array, "B S"], newest: Int[Array, " B"]) -> Int[Array, " B"]:
    """Find the last tokens of a text earlier in it.

    Args: newest: the position of each text's last token, at least 1; later slots are not read.
    Returns: the last position before `newest` where the longest run of the last tokens ends.

    Example:
        >>> text = jnp.array([[7, 5, 6, 9, 5, 6, 0, 0]])
        >>> earlier_match(text, jnp.array([5]))  # 5, 6 ends at position 2
        Array([2], dtype=int32)
    """
    before = LONGEST_MATCH - 1
    slots = text.shape[1]
    padded = jnp.pad(text, ((0, 0), (before, 0)), constant_values=-1)  # no token

    # At each earlier position: how many tokens back from it are those back from the newest.
    earlier_BS = jnp.arange(slots, dtype=jnp.int32)[None] < newest[:, None]
    same_BS = earlier_BS
    length_BS = jnp.zeros(text.shape, jnp.int32)
    for back in range(LONGEST_MATCH):
        wanted = jnp.take_along_axis(padded, newest[:, None] + before - back, axis=1)
        shifted = padded[:, before - back : before - back + slots]
        same_BS = same_BS & (shifted == wanted) & (shifted >= 0)
        length_BS = length_BS + same_BS.astype(jnp.int32)

    # The longest, and the latest of those.
    from_the_end = jnp.where(earlier_BS, length_BS, -1)[:, ::-1]
    return slots - 1 - jnp.argmax(from_the_end, axis=1).astype(jnp.int32)
