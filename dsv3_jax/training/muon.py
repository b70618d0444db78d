"""Muon: the updates of matrices are orthogonalised, and AdamW updates the rest.

    M ← β M + (1−β) G;   O = NewtonSchulz(β M̂ + (1−β) Ĝ);   W ← W − η (0.2 √max(in, out) · O + decay · W)

M̂ and Ĝ are corrected for the first steps, as optax.contrib.muon does. The factor gives an update the root mean square
of AdamW's, so both take the same learning rate η and weight decay.

Which axes make a matrix follows from the names of a parameter's axes (`lora.sides`). Layers and experts are a batch:
each has a matrix of its own. The heads of w_uq, w_uk, w_uv and w_o are one matrix, as in Moonlight and Kimi K2, whose
factor and learning rates then hold here: w_uq is [Q, H·(N+R)], w_uk [H·N, C], w_uv [H·V, C], w_o [H·V, D]. (Heads apart
would be cheaper, and each head would get an update of the same size; GLM-5 does so.) AdamW updates embedding,
unembedding, router and the norms' scales. LoRA's A and B are matrices.

Source: Jordan et al., Muon (kellerjordan.github.io/posts/muon); Moonlight (arXiv 2502.16982), section 2.2.
Departs from optax.contrib.muon, which it equals on matrices: the rest has AdamW without Nesterov, with weight decay on
all but norms; and the batch axes stay apart, so that a mesh shards experts while they are orthogonalised.
"""

import math
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.mesh.sharding import names_of
from dsv3_jax.ops.newton_schulz import orthogonalize
from dsv3_jax.training.lora import sides

RMS = 0.2  # of an update, as AdamW's usually is; arXiv 2502.16982, section 2.2


def split(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Split parameters, or gradients, into (matrices, the rest).

    Example:
        >>> import jax.numpy as jnp
        >>> w = nnx.Param(jnp.ones((2, 3)), axes=("dim", "hidden"))
        >>> matrices, rest = split(nnx.State({"w": w, "embed": nnx.Param(jnp.ones((9, 2)), axes=("vocab", "dim"))}))
        >>> list(matrices), list(rest)
        (['w'], ['embed'])
    """
    matrices, rest = nnx.split_state(params, lambda _, v: _is_matrix(v), ...)
    return matrices, rest


def _is_matrix(v: nnx.Variable) -> bool:
    """Whether Muon updates it: not a norm's scale, embedding, unembedding or router."""
    names = names_of(v)
    return bool(names) and "vocab" not in names and not v.get_metadata().get("exact", False)


def direction(
    mean: Float[Array, "*n"], g: Float[Array, "*n"], step: Array, names: tuple[str | None, ...], beta: float
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """(The new running mean, the orthogonalised and scaled direction.)

    Stacked layers are computed one after the other, so that temporary arrays have the size of one layer.

    Args: names: of the last axes; see `lora.sides`.
    """
    count = (step + 1).astype(g.dtype)
    mean = beta * mean + (1 - beta) * g
    nesterov = beta * mean / (1 - beta ** (count + 1)) + (1 - beta) * g / (1 - beta**count)
    orthogonal = partial(_orthogonal, names=names)
    stacked = g.ndim > len(names)
    return mean, jax.lax.map(orthogonal, nesterov) if stacked else orthogonal(nesterov)


def _orthogonal(x: Float[Array, "*n"], names: tuple[str | None, ...]) -> Float[Array, "*n"]:
    """0.2 √max(in, out) · NewtonSchulz of one layer's weight."""
    left, right, _ = sides(names)
    rows, columns = math.prod(x.shape[left:right]), math.prod(x.shape[right:])
    made = orthogonalize(x.reshape(*x.shape[:left], rows, columns))
    return (RMS * math.sqrt(max(rows, columns)) * made).reshape(x.shape)
