"""Measures of runs against slow, obvious forms."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import replace
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.balance import load
from dsv3_jax.ops.dispatch import capacity_swiglu
from dsv3_jax.presets import recipe
from experiments.lab.measuring import expert_ids, first_below, overflow, skip_top, steps_until


@pytest.mark.parametrize("factor", [0.6, 1.25, 2.0])
def test_overflow_is_what_experts_with_a_capacity_drop(factor):
    """37 tokens of 2 choices leave no whole even share of 5 experts."""
    num_experts, rng = 5, np.random.default_rng(0)
    ids = jnp.array(np.minimum(rng.integers(num_experts + 4, size=(37, 2)), num_experts - 1))
    weights = [jnp.ones((num_experts, 1, 1))] * 3
    run = jax.jit(partial(capacity_swiglu, factor=factor))
    _, dropped = run(jnp.ones((37, 1)), ids, jnp.ones((37, 2)), *weights)
    found = overflow(np.asarray(load(ids, num_experts)), factor)
    assert dropped > 0 and found == pytest.approx(float(dropped), abs=1e-6)


def test_steps_until_by_looking_at_each_step():
    rng, found = np.random.default_rng(0), set()
    for bound in (0.1, 0.4, 0.5, 0.6):
        values = rng.random(40)
        wanted = len(values)
        for step in reversed(range(len(values) - 2)):
            if sum(values[step : step + 3]) / 3 <= bound:
                wanted = step + 1
        assert steps_until(values, bound, window=3) == wanted
        found.add(wanted)
    assert len(found) > 2 and 40 in found
    assert steps_until(np.zeros(2), 1.0, window=3) == 2  # no window is complete
    rows = [{"step": step, "loss": 1.3} for step in (10, 20, 30)]
    trained = SimpleNamespace(metrics=lambda: rows, run=SimpleNamespace(steps=30))
    assert first_below(trained, bits=1.25) == 30  # 0.87 nats
    rows += [{"step": step, "loss": loss} for step, loss in ((40, 0.1), (50, 0.1), (60, 0.0))]
    assert first_below(trained, bits=1.25) == 50  # the last of the first five with a lower mean


def test_skip_top_routes_to_the_experts_after_the_best():
    """The first sparse layer has the same inputs: its first choice is the model's second one."""
    cfg = replace(recipe("lab").model, num_layers=2, num_dense_layers=1, mtp_depth=0)
    model = Transformer(cfg, rngs=nnx.Rngs(0))
    batch = {"tokens": jnp.arange(8)[None], "segment_ids": None, "positions": None}
    own, after = (expert_ids(one, batch)[0] for one in (model, skip_top(model, 1)))
    assert (after[..., :-1] == own[..., 1:]).all()
    assert not (after[..., -1:] == own).any()
