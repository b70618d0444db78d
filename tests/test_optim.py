"""The schedules corner by corner, and AdamW against its equations."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_model, small
from runs import assert_bitwise

from dsv3_jax.config import Execution, OptimConfig
from dsv3_jax.kernels import choose
from dsv3_jax.kernels.cpu import library
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.training import optim

CFG = OptimConfig(
    learning_rate=3e-2, final_learning_rate=3e-3, warmup_steps=10, decay_start=0.5, decay_end=0.9, bias_freeze=0.8
)
STEPS = 100


def slow_rate(cfg: OptimConfig, step: int) -> float:
    high, low = cfg.learning_rate, cfg.final_learning_rate
    if step < 10:
        return high * (step + 1) / 10
    if step < 50:
        return high
    if step < 90:
        return low + (high - low) * (1 + math.cos(math.pi * (step - 50) / 40)) / 2
    return low


def at(schedule, steps) -> np.ndarray:
    return np.asarray(jax.vmap(schedule)(jnp.asarray(list(steps), jnp.int32)))


def test_learning_rate_warm_up_constant_cosine_constant():
    found = at(lambda s: optim.learning_rate(CFG, STEPS, s), range(STEPS + 20))
    want = [slow_rate(CFG, step) for step in range(STEPS + 20)]
    np.testing.assert_allclose(found, want, rtol=2e-6)  # float32: 1 + cos is rounded at 1, the result is above a tenth
    assert found.dtype == np.float32
    corners = found[[0, 9, 10, 49, 50, 90, 99]] / np.float32(3e-2)
    np.testing.assert_allclose(corners, [0.1, 1, 1, 1, 1, 0.1, 0.1], rtol=1e-6)
    assert found[9] < found[10] * (1 + 1e-6) and found[51] < found[50] and found[90] < found[89]


def test_wsd_falls_on_a_line_and_cosine_to_the_last_step():
    low, high = CFG.final_learning_rate, CFG.learning_rate
    wsd, cosine = (
        at(lambda s, name=name: optim.learning_rate(replace(CFG, schedule=name), STEPS, s), range(STEPS + 20))
        for name in ("wsd", "cosine")
    )
    line = [high + (low - high) * min(max((step - 50) / 40, 0), 1) for step in range(STEPS + 20)]
    wave = [low + (high - low) * (1 + math.cos(math.pi * min(max((step - 10) / 90, 0), 1))) / 2 for step in range(120)]
    rise = [min(1, (step + 1) / 10) for step in range(STEPS + 20)]
    np.testing.assert_allclose(wsd, np.multiply(rise, line), rtol=2e-6)
    np.testing.assert_allclose(cosine, np.multiply(rise, wave), rtol=2e-6)
    np.testing.assert_allclose(cosine[[10, 55, 100]], [high, (high + low) / 2, low], rtol=1e-6)


def test_mtp_weight_falls_when_the_cosine_begins():
    found = at(lambda s: optim.mtp_weight(CFG, STEPS, s), range(STEPS))
    assert found.tolist() == [np.float32(0.3)] * 50 + [np.float32(0.1)] * 50


@pytest.mark.parametrize(("freeze", "moving"), [(0.8, 80), (0.0, 0), (1.0, 100)])
def test_bias_rate_is_zero_at_the_end(freeze, moving):
    cfg = OptimConfig(bias_freeze=freeze)
    found = at(lambda s: optim.bias_rate(cfg, 1e-3, STEPS, s), range(STEPS))
    assert found.tolist() == [np.float32(1e-3)] * moving + [0.0] * (100 - moving)


@pytest.fixture(params=["cpu", "xla"])
def kernels(request, monkeypatch) -> choose.Kernels:
    """Both implementations of the update, for arrays of any size."""
    if request.param == "cpu" and (why := library.why_not()):
        pytest.skip(why)
    monkeypatch.setattr(choose, "LARGE_UPDATE", 0)
    kernels = choose.prepare(Execution(kernels=f"optimizer={request.param}"))
    assert kernels.pick("optimizer", *4 * [jnp.zeros(1)]).name == request.param
    return kernels


@pytest.mark.parametrize("shape", [(4, 3), (301, 577)], ids=str)  # the second is more than a thread's part
def test_adamw_is_the_equations(kernels, rng, shape):
    """Five steps over the warm-up's end, one of them not taken, against the paper's algorithm in float64."""
    cfg = OptimConfig(learning_rate=0.1, warmup_steps=3, clip_norm=3.0, eps=1e-3)
    w, grads = rng.standard_normal(shape), rng.standard_normal((5, *shape))
    norms = np.array([2.0, 4.0, 2.5, 9.0, 3.1])  # taken as given: some below the clip, some above
    m, v = np.zeros_like(w), np.zeros_like(w)

    def state(array):
        return nnx.State({"w": nnx.Param(jnp.asarray(array, jnp.float32))})

    step_fn = jax.jit(optim.make(cfg, STEPS, kernels).update)
    params, adam = state(w), optim.make(cfg, STEPS).init(state(w))
    for step, (g, norm) in enumerate(zip(grads, norms, strict=True)):
        args = jnp.asarray(step, jnp.int32), params, adam, state(g), jnp.asarray(norm, jnp.float32)
        assert_bitwise(step_fn(*args, jnp.asarray(False)), (params, adam))
        params, adam = step_fn(*args, jnp.asarray(True))
        g = g * min(1.0, cfg.clip_norm / norm)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        rate = 0.1 * min(1.0, (step + 1) / 3)
        t = step + 1
        w = w - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + cfg.eps) + cfg.weight_decay * w)
        np.testing.assert_allclose(params["w"][...], w, atol=2e-6)  # float32, numbers of about 1


def test_a_step_that_is_not_taken_keeps_everything_even_from_nan(kernels):
    cfg, steps = OptimConfig(), jnp.asarray(0, jnp.int32)
    params = nnx.State({"w": nnx.Param(jnp.ones((2, 2), jnp.float32))})
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    adam = optim.make(cfg, STEPS).init(params)
    nan, keep = jnp.asarray(jnp.nan, jnp.float32), jnp.asarray(False)
    found = optim.make(cfg, STEPS, kernels).update(steps, params, adam, bad, nan, keep)
    assert_bitwise(found, (params, adam))


def test_decay_is_on_matrices_and_not_on_norms(kernels):
    """With no gradient at all, what moves is decay: every matrix by rate · decay, no norm scale; no bias is there."""
    cfg = OptimConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.25)
    params = nnx.split(random_model(small(mtp_depth=1)), nnx.Param, RouterBias)[1]

    @jax.jit
    def step(params):
        zero, grads = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
        args = jnp.zeros((), jnp.int32), params, optim.make(cfg, STEPS).init(params), grads, zero, jnp.asarray(True)
        return optim.make(cfg, STEPS, kernels).update(*args)[0]

    new = dict(nnx.to_flat_state(step(params)))
    norms = 0
    for path, variable in nnx.to_flat_state(params):
        assert not isinstance(variable, RouterBias)
        before, after, name = np.asarray(variable[...]), np.asarray(new[path][...]), ".".join(map(str, path))
        if path[-1] == "scale":  # a norm's
            assert variable.get_metadata()["decay"] is False
            norms += 1
            np.testing.assert_array_equal(after, before, name)
        else:
            assert "norm" not in name and before.ndim >= 2
            np.testing.assert_allclose(after, before * (1 - 0.125), rtol=1e-6, err_msg=name)
    assert norms == 4 + 4 + 1 + (4 + 3)  # a block has two and its attention two; an MTP module three and a block


@pytest.mark.parametrize("shape", [(4, 3), (31, 7)], ids=str)
def test_means_in_bfloat16_are_rounded_to_the_nearest_and_move_the_parameter_unrounded(rng, shape):
    """Ten steps against the equations, where a mean is rounded when it is stored and at no other time."""
    cfg = OptimConfig(learning_rate=0.1, warmup_steps=0, eps=1e-3, moments_dtype="bfloat16")
    kernels = choose.prepare(Execution())
    w, grads = rng.standard_normal(shape), rng.standard_normal((10, *shape))
    m, v = np.zeros_like(w), np.zeros_like(w)

    def state(array):
        return nnx.State({"w": nnx.Param(jnp.asarray(array, jnp.float32))})

    step_fn = jax.jit(optim.make(cfg, STEPS, kernels).update)
    params, adam = state(w), optim.make(cfg, STEPS).init(state(w))
    for step, g in enumerate(grads):
        args = jnp.asarray(step, jnp.int32), params, adam, state(g), jnp.asarray(1.0, jnp.float32)
        assert_bitwise(step_fn(*args, jnp.asarray(False)), (params, adam))
        params, adam = step_fn(*args, jnp.asarray(True))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(adam)} == {"bfloat16"}
        m, v, t = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g, step + 1
        rate = float(optim.learning_rate(cfg, STEPS, jnp.asarray(step)))
        w = w - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + cfg.eps) + cfg.weight_decay * w)
        m, v = (x.astype(jnp.bfloat16).astype(np.float64) for x in (m, v))
        # float32 rounds what lies half-way between two bfloat16 numbers elsewhere than float64, once in 2^16 numbers
        np.testing.assert_array_equal(np.asarray(adam.mu["w"][...], np.float64), m)
        np.testing.assert_array_equal(np.asarray(adam.nu["w"][...], np.float64), v)
        np.testing.assert_allclose(params["w"][...], w, atol=2e-6)


def test_the_cpp_optimizer_leaves_bfloat16_means_to_xla():
    kernels = choose.Kernels(choose.Target("cpu"), ())
    large = jnp.zeros(choose.LARGE_UPDATE)
    means = large.astype(jnp.bfloat16)
    assert kernels.pick("optimizer", large, large, large, large).name == "cpu"
    assert kernels.pick("optimizer", large, means, means, large).name == "xla"
