"""QK-clip for MLA: no head's attention logits stay above a threshold τ.

A step's forward pass returns S, the largest logit of each head over the batch: all sequences, parts
and devices. After the optimizer's step, each head with S > τ is scaled by γ = τ / S:

    w_uk ← √γ w_uk;   w_uq, nope part ← √γ w_uq;   w_uq, rope part ← γ w_uq

Both terms of its logits, q_nope · k_nope and q_rope · k_rope, are then multiplied by γ. The shared
k_rope is not touched, so other heads do not change. With the weights of the forward pass and the
same input, a logit would now be τ at most. The optimizer has moved the weights meanwhile, by a
small step.

S costs no further product where the attention kernel returns what its softmax keeps: XLA's and the
C++ one do. Beside libraries' kernels queries and keys are multiplied once more, in blocks
(`kernels.table.kept_maxima`).

Source: Kimi K2 (arXiv 2507.20534), section 2.1, where QK-clip with Muon is MuonClip.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

QUERIES, KEYS = ("w_uq", "w_q"), ("w_uk",)


@jax.named_scope("qk_clip")
def clip(
    params: nnx.State,
    max_logits: dict[str, Array],
    threshold: float,
    nope_head_dim: int,
    keep: Array,
) -> nnx.State:
    """Scale the heads whose largest logit is above the threshold; all others stay bit by bit.

    Args:
        params: those that train, with the optimizer's step taken.
        max_logits: the largest logit of each head, [L, H] or [H], by the path of the block in the
            model.
        nope_head_dim: numbers of a head's queries without positions (N).
        keep: bool []: False changes nothing.

    Example:
        >>> shapes = (2, 1, 1), (1, 2, 2)  # [H, N, C], [Q, H, N + R]
        >>> w_uk, w_uq = (nnx.Param(jnp.ones(shape)) for shape in shapes)
        >>> params = nnx.State({"block": {"attn": {"w_uk": w_uk, "w_uq": w_uq}}})
        >>> largest = {"block": jnp.array([400.0, 50.0])}
        >>> new = clip(params, largest, 100.0, nope_head_dim=1, keep=jnp.bool_(True))
        >>> new["block"]["attn"]["w_uk"].ravel().tolist(), new["block"]["attn"]["w_uq"][0].tolist()
        ([0.5, 1.0], [[0.5, 0.25], [1.0, 1.0]])
    """
    flat = dict(nnx.to_flat_state(params))
    for path, v in flat.items():
        if path[-1] not in QUERIES + KEYS:
            continue

        # The factor of each head: 1 for those below the threshold.
        largest = max_logits[".".join(map(str, path[:-2]))]  # [H], of a stack [L, H]
        gamma = jnp.where(keep & (largest > threshold), threshold / largest, 1.0).astype(v.dtype)
        root = jnp.sqrt(gamma)

        # Keys and queries share γ. k_rope is of all heads, so a head's queries take its whole γ.
        if path[-1] in KEYS:
            factor = root[..., None, None]  # of [H, N, C]
        else:
            is_nope = (jnp.arange(v.shape[-1]) < nope_head_dim).reshape((1,) * gamma.ndim + (-1,))
            # of [Q, H, N + R]
            factor = jnp.where(is_nope, root[..., None], gamma[..., None])[..., None, :, :]
        flat[path] = v.replace(v.get_value() * factor)
    return nnx.from_flat_state(flat)
