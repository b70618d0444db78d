"""Schedules; AdamW, Muon and optax against their equations; their state on a mesh and resumed."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import flat, needs_cpp, small
from runs import MODEL, assert_bitwise, make_run, refused, rows_of, write_text

import dsv3_jax as ds
from dsv3_jax.config import Execution, OptimConfig
from dsv3_jax.kernels import choose, table
from dsv3_jax.mesh import sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import abstract
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.training import optim, transformation
from dsv3_jax.training.schedules import learning_rate
from dsv3_jax.training.transformation import AtStep

STEPS = 100
OPTIM = OptimConfig(learning_rate=0.1, clip_norm=3.0, eps=1e-3)
TRUE, FALSE = np.True_, np.False_


def shapes_of(**changes) -> nnx.State:
    return nnx.split(abstract(small(**changes)), nnx.Param, RouterBias)[1]


def noise_like(params: nnx.State, seed: int) -> nnx.State:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


FALLS = [  # a schedule, its decay_start; the steps of its decay, from and to
    ("report", 0.5, 50, 90),
    ("report", 0.02, 10, 90),  # not before the end of the warm-up
    ("wsd", 0.5, 50, 90),
    ("wsd", 0.02, 10, 90),
    ("cosine", 0.5, 10, 100),
]


@pytest.mark.parametrize(("name", "share", "start", "end"), FALLS)
def test_the_learning_rate_rises_stays_and_falls(name, share, start, end):
    rates = dict(learning_rate=3e-2, final_learning_rate=3e-3)
    cfg = OptimConfig(schedule=name, warmup_steps=10, decay_start=share, decay_end=0.9, **rates)
    rate_at = jax.vmap(lambda step: learning_rate(cfg, STEPS, step))
    found = np.asarray(rate_at(jnp.arange(STEPS + 20)))
    for step, rate in enumerate(found):
        along = min(max((step - start) / (end - start), 0), 1)
        fall = along if name == "wsd" else (1 - math.cos(math.pi * along)) / 2
        want = min(1, (step + 1) / 10) * (3e-2 - 2.7e-2 * fall)
        assert rate == pytest.approx(want, rel=2e-6), step  # float32


def adamw_by_optax(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The default optimizer as a chain of optax's; its own count is the step."""
    mask = lambda p: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", p)  # noqa: E731
    return optax.adamw(
        lambda count: learning_rate(cfg, steps, count),
        cfg.beta1, cfg.beta2, cfg.eps, weight_decay=cfg.weight_decay, mask=mask,
    )  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param("cpu", marks=needs_cpp), "xla", "optax", "bfloat16"])
def test_adamw_is_the_equations(rng, monkeypatch, name):
    """Steps over the warm-up's end, in float64; those not taken keep everything, even from NaN.

    A mean in bfloat16 is rounded when it is stored, and at no other time.
    """
    # more than a thread's part, or small
    shape = (301, 577) if name in ("cpu", "bfloat16") else (4, 3)
    monkeypatch.setattr(table, "LARGE_UPDATE", 0)
    forced = f"optimizer={name}" if name in ("cpu", "xla") else "auto"
    kernels = choose.prepare(Execution(kernels=forced))
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    cfg = replace(OPTIM, warmup_steps=3, moments_dtype=dtype)
    w, m, v = rng.standard_normal(shape), np.zeros(shape), np.zeros(shape)
    scale = w

    def state(array):
        array = jnp.asarray(array, jnp.float32)
        return nnx.State({"w": nnx.Param(array), "scale": nnx.Param(array, decay=False)})

    by_optax = adamw_by_optax(cfg, STEPS) if name == "optax" else None
    optimizer = optim.make(cfg, STEPS, kernels, by_optax)
    step_fn, params, adam = jax.jit(optimizer.update), state(w), optimizer.init(state(w))
    # taken as given: some below the clip, some above
    for step, norm in enumerate([2.0, 4.0, 2.5, 9.0, 3.1]):
        nan = jnp.asarray(np.nan, jnp.float32)
        g = rng.standard_normal(shape)
        at = AtStep(jnp.asarray(step, jnp.int32), jnp.asarray(norm, jnp.float32), TRUE)
        not_taken = at._replace(norm=nan, keep=FALSE)
        assert_bitwise(step_fn(not_taken, params, adam, state(g * np.nan)), (params, adam))
        params, adam = step_fn(at, params, adam, state(g))
        g, t = g * min(1.0, cfg.clip_norm / norm), step + 1
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        move = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + cfg.eps)
        w = w - 0.1 * min(1.0, t / 3) * (move + cfg.weight_decay * w)
        scale = scale - 0.1 * min(1.0, t / 3) * move
        for key, wanted in {"w": w, "scale": scale}.items():
            # float32, numbers of about 1
            np.testing.assert_allclose(params[key][...], wanted, atol=2e-6)
        if name == "bfloat16":
            # half-way between bfloat16 numbers float32 may round elsewhere: the same from here on
            rounded = [np.asarray(mean["w"][...], np.float64) for mean in adam]
            for a, x in zip(rounded, (m, v), strict=True):
                assert (a == x.astype(jnp.bfloat16)).mean() > 0.999
            m, v = rounded


# Muon

MUON = replace(OPTIM, name="muon", warmup_steps=0, weight_decay=0.25)
# The axes of each weight that are a matrix's rows and columns, from the last; others are a batch.
MATRICES = {
    "w_q": (1, 2), "w_dq": (1, 1), "w_uq": (1, 2), "w_dkv": (1, 1),
    "w_uk": (2, 1), "w_uv": (2, 1), "w_o": (2, 1), "w_k": (1, 2), "w_v": (1, 2),
    "w_gate": (1, 1), "w_up": (1, 1), "w_down": (1, 1), "w_eh": (1, 1), "w": (1, 1),
}  # fmt: skip
BY_ADAMW = {"embed", "head", "w_router", "scale"}


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Jordan's five steps on one matrix, in float64, without the shortcut for tall matrices."""
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def slow_direction(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """0.2 √max(in, out) NewtonSchulz, by matrix in a loop; `rows`, `columns`: numbers of axes."""
    shape = x.shape[x.ndim - rows - columns :]
    m, n = np.prod(shape[:rows]), np.prod(shape[rows:])
    made = [0.2 * np.sqrt(max(m, n)) * newton_schulz(part) for part in x.reshape(-1, m, n)]
    return np.stack(made).reshape(x.shape)


def names_in(params: nnx.State) -> set:
    return {path[-1] for path, _ in nnx.to_flat_state(params)}


def test_which_weights_are_matrices_and_which_decay():
    matrices, rest = optim.split_matrices(shapes_of(mtp_depth=1))
    assert names_in(rest) == BY_ADAMW and names_in(matrices) <= MATRICES.keys()
    for path, v in nnx.to_flat_state(shapes_of(mtp_depth=1)):
        assert v.get_metadata().get("decay", True) == (path[-1] != "scale"), path
    others = shapes_of(attention="gqa", num_kv_heads=1, mtp_kind="eagle", mtp_depth=1)
    assert names_in(optim.split_matrices(others)[0]) <= MATRICES.keys()
    assert names_in(others) >= {"w_k", "w_v"}


def test_two_steps_of_muon_are_the_equations():
    """Matrices of stacks, experts and heads: 2-D, 3-D, 4-D; and AdamW on the rest."""
    paths = [
        ("sparse", "attn", "w_uq"),
        ("sparse", "attn", "w_uk"),
        ("sparse", "moe", "experts", "w_gate"),
        ("mtp", 0, "w_eh"),
        ("embed",),
        ("sparse", "attn_norm", "scale"),
    ]
    shapes = dict(nnx.to_flat_state(shapes_of(mtp_depth=1)))
    params = noise_like(nnx.from_flat_state({path: shapes[path] for path in paths}), 7)
    # as given: the first is cut in half
    grads, norms = [noise_like(params, seed) for seed in range(2)], (6.0, 2.0)
    rest, found = optim.split_matrices(params)[1], {}
    for name, p in (("muon", params), ("adamw", rest)):
        optimizer = optim.make(replace(MUON, name=name), STEPS)
        step_fn, state, found[name] = jax.jit(optimizer.update), optimizer.init(p), []
        for step, norm in enumerate(norms):
            g = grads[step] if name == "muon" else optim.split_matrices(grads[step])[1]
            at = AtStep(jnp.asarray(step, jnp.int32), jnp.asarray(norm, jnp.float32), TRUE)
            assert_bitwise(step_fn(at._replace(keep=FALSE), p, state, g), (p, state))
            p, state = step_fn(at, p, state, g)
            found[name].append(flat(p))
    after, grads, before, dims = found["muon"], [flat(g) for g in grads], flat(params), set()
    for path, w in found["adamw"][1].items():
        np.testing.assert_array_equal(after[1][path], w, str(path))
    assert {path[-1] for path in found["adamw"][1]} == {"embed", "scale"}
    for path in paths[:4]:
        w, mean = before[path].astype(np.float64), np.zeros(before[path].shape)
        for step, cut in enumerate([0.5, 1.0]):
            g = grads[step][path] * cut
            mean, t = 0.95 * mean + 0.05 * g, step + 1
            nesterov = 0.95 * mean / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
            w = w - 0.1 * (slow_direction(nesterov, *MATRICES[path[-1]]) + 0.25 * w)
            # float32: 2e-5 of an orthogonal matrix, times 0.1 · 0.2 √20
            np.testing.assert_allclose(after[step][path], w, rtol=0, atol=3e-6, err_msg=str(path))
        dims.add((w.ndim, *MATRICES[path[-1]]))
    assert dims == {(4, 1, 2), (4, 2, 1), (4, 1, 1), (2, 1, 1)}


# optax

CFG = OptimConfig(learning_rate=1e-2, warmup_steps=3, eps=1e-3, clip_norm=0.5)


def test_the_state_is_sharded_like_the_parameters_that_it_mirrors():
    """Adam's means are; adafactor's rows and columns, which have other shapes, are replicated."""
    params, mesh = shapes_of(mtp_depth=1), jax.sharding.AbstractMesh((2, 4, 1), sharding.AXES)

    def state_of(tx):
        return jax.eval_shape(optim.make(CFG, STEPS, transformation=tx).init, params)

    at_all = sharding.state_sharding(params, mesh, fsdp=True)
    want = {path: v.get_value() for path, v in nnx.to_flat_state(at_all)}
    sharded = [path for path, at in want.items() if any(at.spec)]
    assert len(sharded) > 10
    found: dict = {}
    at_all = sharding.state_sharding(state_of(optax.adam(1e-3)), mesh, fsdp=True)
    for path, at in jax.tree_util.tree_leaves_with_path(at_all):
        keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        found.setdefault(keys, []).append(at.spec)
    assert all(found[path] == [want[path].spec] * 2 for path in sharded)
    factored = state_of(optax.scale_by_factored_rms(min_dim_size_to_factor=2))
    factors = sharding.state_sharding(factored, mesh, fsdp=True)
    assert not any(any(at.spec) for at in jax.tree.leaves((factors.v_row, factors.v_col)))


def test_unknown_names_are_refused_in_a_sentence():
    with refused(r"optim.name='optax:mine' is a transformation: give it by .*optimizer=tx"):
        transformation.check_optimizer(OptimConfig(name="optax:mine"), None)
    with refused("optimizer='adam' is not an optax transformation"):
        transformation.check_optimizer(OptimConfig(), "adam")
    wrapper = optax.MultiSteps(optax.sgd(1e-3), 2)
    with refused(r"optimizer=.*MultiSteps.*; give its \.gradient_transformation\(\)"):
        transformation.check_optimizer(OptimConfig(), wrapper)
    transformation.check_optimizer(OptimConfig(), wrapper.gradient_transformation())


def test_a_transformation_reads_the_loss_and_no_more():
    """Polyak's rate is the loss over the gradient's square; L-BFGS would compute losses itself."""
    params = nnx.State({"w": nnx.Param(jnp.array([1.0]))})

    def moved(tx):
        optimizer = optim.make(OptimConfig(), STEPS, transformation=tx)
        state = optimizer.init(params)
        at = AtStep(jnp.int32(0), jnp.float32(1), jnp.bool_(True), loss=jnp.float32(0.25))
        new, _ = optimizer.update(at, params, state, params)
        return new["w"][...]

    np.testing.assert_allclose(moved(optax.polyak_sgd()), [1 - 0.25 / 1**2])
    with refused("optimizer needs more than gradients, parameters and the loss: .*'value_fn'"):
        moved(optax.lbfgs())


@pytest.mark.rare
def test_a_run_with_a_transformation_resumes_bitwise_and_with_no_other(tmp_path):
    text, model = write_text(tmp_path / "text"), replace(MODEL, num_layers=1, mtp_depth=0)
    run = make_run(text, model=model, steps=4, eval_every=4, save_every=2, eval_batches=1)
    falling = optax.scale_by_schedule(lambda count: -3e-3 / (1 + count))
    tx = optax.chain(optax.scale_by_lion(), falling)
    ds.train.fit(run, tmp_path / "whole", quiet=True, optimizer=tx)
    for stop in (2, None):
        ds.train.fit(run, tmp_path / "parts", quiet=True, optimizer=tx, stop_after=stop)
    name = json.loads((tmp_path / "parts" / "run.json").read_text())["run"]["optim"]["name"]
    assert name == "optax:ScaleByLionState+ScaleByScheduleState"
    models = [load_run(tmp_path / folder).model for folder in ("whole", "parts")]
    assert_bitwise(*map(nnx.state, models))  # a reader needs no transformation
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    for other in (None, optax.adam(1e-2)):
        with refused(r"optim.name='.*' is not that of the run in .*, 'optax:ScaleByLionState"):
            ds.train.fit(run, tmp_path / "parts", quiet=True, optimizer=other)
