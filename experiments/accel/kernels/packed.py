"""The cache that the kernels here read: latent and rotated key of a token side by side, in one array of all layers."""

from typing import NamedTuple

from jaxtyping import Array


class Packed(NamedTuple):
    """Rows [c_kv, k_rope] of L layers, B sequences and S slots. `Stored` has them in two arrays."""

    rows: Array  # [L, B, 1, S, X] float32, bfloat16, int8 or float8_e4m3fn; may end in zeros
    scales: Array | None  # float32 [L, B, 1, S, 2] of 8-bit rows: one for each of the two
