"""muP: initial scales and rates by width, so that one learning rate may serve every width.

`init_std` and the learning rate are those of the width `optim.base_width`. A model that is m times
as wide has factors:

    weights                     initial deviation    rate
    embedding, norms' scales    1                    1
    matrices, experts' too      1 / √m               1 / m
    unembedding, routers        1 / m                1 / m

A router's outputs are the experts, which do not become more, so it is scaled as the unembedding.
Weight decay takes the same share of all weights. All inner widths are meant to grow with dim: FFN,
experts, latents, the number of heads. Heads' own widths and the number of experts stay.

Source: Tensor Programs V (arXiv 2203.03466), table 3; for mixtures arXiv 2508.09752, where finer
experts need another rate.
"""

import jax
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.mesh.sharding import names_of


def growth(run: RunConfig) -> float:
    """m: the model's width over that of `optim.base_width`; 1 without one.

    Example:
        >>> import dsv3_jax as ds
        >>> run = ds.recipe("tiny")
        >>> growth(ds.replace(run, optim=ds.replace(run.optim, base_width=32)))
        4.0
    """
    base = run.optim.base_width
    return run.model.dim / base if base else 1.0


def factors(v: nnx.Variable, m: float) -> tuple[float, float]:
    """The factors of a parameter's (initial deviation, rate).

    Example:
        >>> import jax.numpy as jnp
        >>> factors(nnx.Param(jnp.ones((2, 3)), axes=("dim", "hidden")), 4.0)
        (0.5, 0.25)
    """
    names = names_of(v)
    if not names or names[0] == "vocab":
        return 1.0, 1.0
    # Beside the embedding, only routers are exact.
    reads_out = "vocab" in names or v.get_metadata().get("exact", False)
    return 1 / m if reads_out else m**-0.5, 1 / m


def scale_initial(params: nnx.State, m: float) -> nnx.State:
    """Parameters as drawn, times their factors; for m = 1 the same arrays."""
    if m == 1:
        return params
    return jax.tree.map(
        lambda v: v.replace(factors(v, m)[0] * v[...]),
        params,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
