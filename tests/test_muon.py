"""Muon: each matrix of a stack, of an expert and of a layer's heads by itself, against the algorithm written out."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_model, small
from runs import MODEL, assert_bitwise, cheap_compiles, fresh_state, make_run, packed_batch

import dsv3_jax as ds
from dsv3_jax.config import Layout, OptimConfig
from dsv3_jax.kernels import choose
from dsv3_jax.mesh import sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.ops.newton_schulz import orthogonalize
from dsv3_jax.training import muon, optim
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.step import Job, make_step

CFG = OptimConfig(name="muon", learning_rate=0.1, warmup_steps=0, weight_decay=0.25, clip_norm=3.0, eps=1e-3)
STEPS = 100
# The axes of each weight that make the rows and the columns of a matrix, counted from the last; others are a batch.
MATRICES = {
    "w_q": (1, 2), "w_dq": (1, 1), "w_uq": (1, 2), "w_dkv": (1, 1), "w_uk": (2, 1), "w_uv": (2, 1), "w_o": (2, 1),
    "w_k": (1, 2), "w_v": (1, 2), "w_gate": (1, 1), "w_up": (1, 1), "w_down": (1, 1), "w_eh": (1, 1), "w": (1, 1),
}  # fmt: skip
BY_ADAMW = {"embed", "head", "w_router", "scale"}


@pytest.fixture(scope="module", autouse=True)
def _cheap():
    with cheap_compiles():
        yield


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Jordan's five steps on one matrix, in float64, without the shortcut for tall matrices."""
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def slow_direction(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """0.2 √max(in, out) NewtonSchulz, matrix by matrix in a loop; `rows`, `columns`: numbers of axes."""
    shape = x.shape[x.ndim - rows - columns :]
    m, n = np.prod(shape[:rows]), np.prod(shape[rows:])
    made = [0.2 * np.sqrt(max(m, n)) * newton_schulz(part) for part in x.reshape(-1, m, n)]
    return np.stack(made).reshape(x.shape)


def params_of(**changes) -> nnx.State:
    return nnx.split(random_model(small(**changes)), nnx.Param, RouterBias)[1]


def noise_like(params: nnx.State, seed: int) -> nnx.State:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


def flat(params: nnx.State) -> dict:
    return {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(params)}


# the mathematics


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (2, 3, 5, 5)], ids=str)
def test_singular_values_come_near_one(rng, shape):
    """And each matrix of a batch is the one that it would be alone, tall ones too."""
    x = rng.standard_normal(shape)
    made = np.asarray(jax.jit(orthogonalize)(jnp.asarray(x, jnp.float32)))
    values = np.linalg.svd(made, compute_uv=False)
    assert 0.5 < values.min() and values.max() < 1.3
    slow = np.stack([newton_schulz(part) for part in x.reshape(-1, *shape[-2:])]).reshape(shape)
    np.testing.assert_allclose(made, slow, rtol=0, atol=2e-5)  # float32 through polynomials of slope 3.4 to the fifth
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    assert np.abs(made - u @ vt).max() < 0.35


def test_which_weights_are_matrices():
    params = {**flat(params_of(mtp_depth=1)), **flat(params_of(attention="gqa", num_kv_heads=1, mtp_kind="eagle"))}
    matrices, rest = muon.split(params_of(mtp_depth=1))
    assert {path[-1] for path in flat(rest)} == BY_ADAMW
    assert {path[-1] for path in flat(matrices)} <= MATRICES.keys()
    assert {path[-1] for path in params} <= MATRICES.keys() | BY_ADAMW
    assert ("sparse", "moe", "experts", "w_gate") in flat(matrices) and ("mtp", 0, "w_eh") in flat(matrices)


@pytest.fixture(scope="module")
def two_steps():
    """Parameters before, gradients, and parameters and state after each of two steps."""
    params = params_of(num_layers=2, mtp_depth=1)
    optimizer = optim.make(CFG, STEPS)
    step_fn, found = jax.jit(optimizer.update), [(params, optimizer.init(params))]
    grads = [noise_like(params, seed) for seed in range(2)]
    for step, g in enumerate(grads):
        norm = jnp.asarray([6.0, 2.0][step], jnp.float32)  # taken as given: the first is cut in half
        found.append(step_fn(jnp.asarray(step, jnp.int32), *found[-1], g, norm, jnp.asarray(True)))
    return found, grads


def test_two_steps_are_the_equations(two_steps):
    """Every matrix of every stack, expert and head-by-head weight: 2-D, 3-D, 4-D; and AdamW on the rest."""
    found, grads = two_steps
    before, after = flat(found[0][0]), [flat(params) for params, _ in found[1:]]
    grads = [flat(g) for g in grads]
    plain = optim.make(replace(CFG, name="adamw"), STEPS)
    p, s = found[0][0], plain.init(found[0][0])
    for step, norm in enumerate([6.0, 2.0]):
        args = jnp.asarray(step, jnp.int32), p, s, noise_like(p, step), jnp.asarray(norm, jnp.float32)
        p, s = jax.jit(plain.update)(*args, jnp.asarray(True))
    by_adamw = flat(p)
    dims = set()
    for path, w in before.items():
        if path[-1] in BY_ADAMW:
            np.testing.assert_array_equal(after[1][path], by_adamw[path], str(path))
            continue
        w, mean = w.astype(np.float64), np.zeros(w.shape)
        for step, cut in enumerate([0.5, 1.0]):
            g = grads[step][path] * cut
            mean, t = 0.95 * mean + 0.05 * g, step + 1
            nesterov = 0.95 * mean / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
            w = w - 0.1 * (slow_direction(nesterov, *MATRICES[path[-1]]) + 0.25 * w)
            # float32: 2e-5 of an orthogonal matrix, times 0.1 · 0.2 √20
            np.testing.assert_allclose(after[step][path], w, rtol=0, atol=3e-6, err_msg=str(path))
        dims.add((w.ndim, *MATRICES[path[-1]]))
    assert {(3, 1, 1), (4, 1, 1), (4, 1, 2), (4, 2, 1), (2, 1, 1)} <= dims


def test_a_step_that_is_not_taken_keeps_everything_even_from_nan(two_steps):
    params, state = two_steps[0][1]
    bad, nan = jax.tree.map(lambda x: x * jnp.nan, params), jnp.asarray(jnp.nan, jnp.float32)
    got = jax.jit(optim.make(CFG, STEPS).update)(jnp.asarray(1, jnp.int32), params, state, bad, nan, jnp.asarray(False))
    assert_bitwise(got, (params, state))


# runs


BATCH, LENGTH = 16, 12
RUN = make_run(
    "nowhere",
    model=replace(MODEL, init_std=0.6, num_layers=1, mtp_depth=0),
    optim=replace(CFG, learning_rate=1e-2, eps=0.1, qk_clip=0.5),
)
RUN = replace(RUN, data=replace(RUN.data, batch_size=BATCH, seq_len=LENGTH))


@pytest.mark.long
def test_a_clipped_step_of_microbatches_on_eight_devices_is_a_single_devices():
    """The largest logit is over all devices and parts, and so is the clip that follows."""
    rng = np.random.default_rng(0)
    batch = packed_batch(rng, np.sort(rng.integers(1, 4, (BATCH, LENGTH)), axis=1))
    want, alone = jax.device_get(make_step(Job(RUN))(fresh_state(RUN), batch))
    assert alone["max_logit"] > RUN.optim.qk_clip
    execution, parts = ds.Execution(layout=Layout(fsdp=True)), replace(RUN.optim, microbatches=2)
    run, mesh = replace(RUN, execution=execution, optim=parts), sharding.make_mesh(2, 2, 2)
    state = fresh_state(run)
    where = sharding.state_sharding(state, mesh, fsdp=True)
    with jax.set_mesh(mesh):
        rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        new, metrics = make_step(Job(run, kernels=choose.prepare(execution, mesh=mesh)))(
            jax.device_put(state, where), rows
        )
    np.testing.assert_allclose(metrics["max_logit"], alone["max_logit"], rtol=1e-5)
    for leaf, at in zip(jax.tree.leaves(new), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
    assert any(not at.is_fully_replicated for at in jax.tree.leaves(where.opt.momentum))
    for a, b in zip(jax.tree.leaves(jax.device_get(new)), jax.tree.leaves(want), strict=True):
        # Newton-Schulz makes small singular values, and the rounding in them, up to 3.4^5 = 485 times larger.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


@pytest.mark.long
def test_experts_stay_on_their_devices():
    """No collective of the compiled update is as large as the experts of a layer."""
    mesh = sharding.make_mesh(1, 8, 1)
    shape = (2, 8, 32, 48)
    params = nnx.State({"w": nnx.Param(jnp.ones(shape), axes=("expert", "dim", "hidden"))})
    optimizer = optim.make(CFG, STEPS)
    state = optimizer.init(params)
    where = sharding.state_sharding((params, state), mesh)
    with jax.set_mesh(mesh):
        args = jax.device_put((params, state), where)
        one = jnp.asarray(1.0)
        text = jax.jit(optimizer.update, out_shardings=where).lower(
            jnp.asarray(0, jnp.int32), *args, args[0], one, jnp.asarray(True)
        ).compile().as_text()  # fmt: skip
    assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text


@pytest.mark.long
def test_muon_resumes_where_it_stopped(tmp_path):
    """Three steps are two, a checkpoint, and one; the state's layout survives the checkpoint."""
    rng = np.random.default_rng(0)
    batch = packed_batch(rng, np.sort(rng.integers(1, 4, (BATCH, LENGTH)), axis=1))
    step, state = make_step(Job(RUN)), fresh_state(RUN)
    for _ in range(2):
        state, _ = step(state, batch)
    with Checkpoints(tmp_path, RUN) as checkpoints:
        checkpoints.save(state, {}, wait=True)
        restored, _ = checkpoints.restore()
    assert_bitwise(restored, state)
    assert type(restored.opt) is optim.MuonState
    (want, _), (got, _) = step(state, batch), step(restored, batch)
    assert_bitwise(got, want)
