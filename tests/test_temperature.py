"""A temperature of each token's router."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from models import LIGHT, random_model


def test_a_tokens_temperature_divides_its_routers_logits():
    """With 1 nothing changes; with 2 everywhere the routers' weights may as well be halved."""
    model = random_model(LIGHT)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    run = nnx.jit(lambda model, t: model(tokens, temperature=t).routing)
    plain, one = run(model, None), run(model, jnp.ones((1, 12)))
    np.testing.assert_array_equal(plain.gates, one.gates)
    two = run(model, 2 * jnp.ones((1, 12)))
    model.sparse.moe.w_router[...] = model.sparse.moe.w_router[...] / 2
    np.testing.assert_allclose(run(model, None).gates, two.gates, rtol=1e-6)
    assert np.abs(two.gates - one.gates).max() > 1e-3
