"""muP: its factors by shapes alone, a step with them, and how logits move at three widths."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, small
from runs import documents

from dsv3_jax.config import DataConfig, OptimConfig, RunConfig
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import abstract
from dsv3_jax.training import mup, optim
from dsv3_jax.training.state import Job, abstract_state
from dsv3_jax.training.step import make_step

WIDTHS = {"dim": 16, "dense_dim": 24, "num_heads": 2, "q_latent_dim": 8, "kv_latent_dim": 12}
WIDTHS["expert_dim"] = 8
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.5, clip_norm=1e6)


def run_of(m: int, base_width: int | None, *, layers: int = 1) -> RunConfig:
    """A run whose widths are m times the base's; heads' widths and the number of experts stay."""
    widths = {name: m * width for name, width in WIDTHS.items()}
    model = small(num_layers=layers, num_dense_layers=layers - 1, init_std=0.1, **widths)
    optim = replace(OPTIM, base_width=base_width)
    data = DataConfig(seq_len=16, batch_size=4)
    return RunConfig(replace(model, norm_eps=1e-6), execution=DENSE, data=data, optim=optim)


def split(run: RunConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    return nnx.split(abstract(run.model, run.execution), nnx.Param, RouterBias)


BATCH = documents(4, 16, 1, vocab_size=37)


def test_factors_follow_from_which_axes_grow():
    """By shapes at two widths: inputs that grow divide the rate."""
    m = 4
    narrow, wide = (dict(nnx.to_flat_state(split(run_of(k, None, layers=2))[1])) for k in (1, m))
    found = {}
    for path, v in wide.items():
        grows = np.flatnonzero(np.array(v.shape) > np.array(narrow[path].shape))
        want = (m**-0.5, 1 / m)  # a matrix: inputs and outputs grow
        if path[-1] == "scale" or path == ("embed",):
            want = (1.0, 1.0)
        elif len(grows) == 1:  # the unembedding and the router: the outputs do not
            assert grows.tolist() == [len(v.shape) - 2], path
            want = (1 / m, 1 / m)
        assert mup.factors(v, float(m)) == pytest.approx(want), path
        found[path[-1]] = want
    assert found["w_router"] == found["head"] != found["w_down"] == found["w_uk"]


def test_at_the_base_width_nothing_changes():
    """Initial states and steps are the same programs as without muP; at another width others."""
    jobs = [Job(run_of(1, base_width)) for base_width in (None, 16, 8)]
    texts = [make_step(job).lower(abstract_state(job), BATCH).as_text() for job in jobs]
    assert texts[0] == texts[1] != texts[2]
    params = split(run_of(1, 16))[1]
    assert mup.scale_initial(params, mup.growth(run_of(1, 16))) is params


def test_a_step_is_that_of_a_divided_rate(rng):
    """The update has AdamW's length times the factor; weight decay takes the same share."""
    v = nnx.Param(jnp.asarray(rng.standard_normal((4, 3)), jnp.float32), axes=("dim", "hidden"))
    params = nnx.State({"w": v})
    grads = nnx.State({"w": v.replace(jnp.asarray(rng.standard_normal((4, 3)), jnp.float32))})
    moved = {}
    for m, decay in ((1.0, 0.0), (8.0, 0.0), (8.0, 0.5)):
        optimizer = optim.make(replace(OPTIM, weight_decay=decay), 10, growth=m)
        arguments = jnp.int32(0), params, optimizer.init(params), grads
        new, _ = optimizer.update(*arguments, jnp.float32(1), jnp.bool_(True))
        moved[m, decay] = np.asarray(new["w"][...] - v[...])
    np.testing.assert_allclose(moved[8.0, 0.0], moved[1.0, 0.0] / 8, rtol=1e-3)
    shrunk = moved[8.0, 0.5] - moved[8.0, 0.0]
    np.testing.assert_allclose(shrunk, -1e-2 * 0.5 * np.asarray(v[...]), rtol=1e-3)


def changes_of_logits(m: int, base_widths: tuple, rng) -> list[float]:
    """The root mean square by which the first step moves logits, for each base_width."""
    tokens = BATCH["tokens"]
    graph, shapes, biases = split(run_of(m, None))
    biases = jax.tree.map(lambda b: jnp.zeros(b.shape, b.dtype), biases)
    drawn = jax.tree.map(lambda p: jnp.asarray(0.1 * rng.standard_normal(p.shape), p.dtype), shapes)

    @jax.jit
    def read(params):
        def loss(params):
            logits = nnx.merge(graph, params, biases)(tokens).logits
            scores = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    def step(p, g, growth):
        """Adam's first step has the length of the rate, whatever the gradient."""
        rate = OPTIM.learning_rate * mup.factors(p, growth)[1]
        return p.replace(np.asarray(p[...]) - np.float32(rate) * np.sign(g[...]))

    found = []
    for base_width in base_widths:
        growth = mup.growth(run_of(m, base_width))
        params = mup.scale_initial(drawn, growth)
        grads, before = read(params)
        pairs = zip(nnx.to_flat_state(params), nnx.to_flat_state(grads), strict=True)
        moved = nnx.from_flat_state([(path, step(p, g, growth)) for (path, p), (_, g) in pairs])
        found.append(float(jnp.sqrt(jnp.mean((read(moved)[1] - before) ** 2))))
    return found


@pytest.mark.long
def test_logits_move_alike_at_every_width(rng):
    """The coordinate check: the change of logits by a step, over three widths.

    With one rate for all it grows with the width.
    """
    moved = np.array([changes_of_logits(m, (None, 16), rng) for m in (1, 4, 16)])
    standard, mup_s = (moved / moved[0]).T
    # Measured 1, 3.9 and 32; with muP 1, 0.7 and 0.6.
    assert standard[1] > 3 and standard[2] > 16
    assert np.all(mup_s < 1.2) and np.all(mup_s > 0.4)
