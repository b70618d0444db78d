"""muP: its factors by shapes alone, and a first state and a step with them."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, small
from runs import documents

from dsv3_jax.config import DataConfig, OptimConfig, RunConfig
from dsv3_jax.model.transformer import abstract
from dsv3_jax.training import mup, optim
from dsv3_jax.training.state import Job, abstract_state, init_state
from dsv3_jax.training.step import make_step
from dsv3_jax.training.transformation import AtStep

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


def shapes_of(run: RunConfig) -> dict[tuple, nnx.Param]:
    return dict(nnx.to_flat_state(nnx.state(abstract(run.model, run.execution), nnx.Param)))


BATCH = documents(4, 16, 1, vocab_size=37)


def test_factors_follow_from_which_axes_grow():
    """By shapes at two widths: inputs that grow divide the rate."""
    m = 4
    narrow, wide = (shapes_of(run_of(k, None, layers=2)) for k in (1, m))
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


@pytest.mark.long
def test_at_the_base_width_nothing_changes():
    jobs = [Job(run_of(1, base_width)) for base_width in (None, 16, 8)]
    texts = [make_step(job).lower(abstract_state(job), BATCH).as_text() for job in jobs]
    assert texts[0] == texts[1] != texts[2]
    assert mup.growth(jobs[1].run) == 1
    plain, scaled = (dict(nnx.to_flat_state(init_state(jobs[i]).params)) for i in (0, 2))
    for path, v in plain.items():
        want = mup.factors(v, 2.0)[0] * v[...]
        np.testing.assert_allclose(scaled[path][...], want, rtol=1e-6, err_msg=str(path))


def test_a_step_is_that_of_a_divided_rate(rng):
    v = nnx.Param(jnp.asarray(rng.standard_normal((4, 3)), jnp.float32), axes=("dim", "hidden"))
    params = nnx.State({"w": v})
    grads = nnx.State({"w": v.replace(jnp.asarray(rng.standard_normal((4, 3)), jnp.float32))})
    moved = {}
    for m, decay in ((1.0, 0.0), (8.0, 0.0), (8.0, 0.5)):
        optimizer = optim.make(replace(OPTIM, weight_decay=decay), 10, growth=m)
        at = AtStep(jnp.int32(0), jnp.float32(1), jnp.bool_(True))
        new, _ = optimizer.update(at, params, optimizer.init(params), grads)
        moved[m, decay] = np.asarray(new["w"][...] - v[...])
    np.testing.assert_allclose(moved[8.0, 0.0], moved[1.0, 0.0] / 8, rtol=1e-3)
    shrunk = moved[8.0, 0.5] - moved[8.0, 0.0]
    np.testing.assert_allclose(shrunk, -1e-2 * 0.5 * np.asarray(v[...]), rtol=1e-3)
