"""Optimizers by name and by optax: one protocol, whose state is sharded, saved and resumed like AdamW's."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import random_model, small
from runs import (
    MODEL,
    assert_bitwise,
    cheap_compiles,
    fresh_state,
    make_run,
    packed_batch,
    rows_of,
    unhooked,
    write_text,
)

import dsv3_jax as ds
from dsv3_jax.config import ConfigError, Layout, Lora, OptimConfig
from dsv3_jax.kernels import choose
from dsv3_jax.mesh import sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.training import optim, prepare
from dsv3_jax.training.checkpoint import Checkpoints, load_run
from dsv3_jax.training.step import Job, abstract_state, init_optimizer, make_step, split_trainable

PLAIN = replace(MODEL, num_layers=1, mtp_depth=0)
CFG = OptimConfig(learning_rate=1e-2, warmup_steps=3, eps=1e-3, clip_norm=0.5)
STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    with cheap_compiles():
        yield root


def adamw_by_optax(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The default optimizer as a chain of optax's; its own count is the step."""
    mask = lambda p: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", p)  # noqa: E731
    return optax.adamw(
        lambda count: optim.learning_rate(cfg, steps, count),
        cfg.beta1, cfg.beta2, cfg.eps, weight_decay=cfg.weight_decay, mask=mask,
    )  # fmt: skip


def params_of(cfg=None) -> nnx.State:
    return nnx.split(random_model(cfg or small(mtp_depth=1)), nnx.Param, RouterBias)[1]


def init_of(tx):
    return optim.make(CFG, STEPS, transformation=tx).init


def has_spec(x) -> bool:
    return hasattr(x, "spec")


def few_params() -> nnx.State:
    """A matrix and a norm's scale, which takes no decay."""
    rng = np.random.default_rng(9)
    w, scale = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 3), (5,)))
    return nnx.State({"w": nnx.Param(w, axes=("dim", "hidden")), "scale": nnx.Param(scale, decay=False)})


def noise_like(params: nnx.State, seed: int) -> nnx.State:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


# the protocol


def test_a_chain_of_optax_is_adamw():
    """Four steps over the warm-up, one of them not kept: the same numbers by two ways, clipping and decay included."""
    params = few_params()
    pair = [optim.make(CFG, STEPS), optim.make(CFG, STEPS, transformation=adamw_by_optax(CFG, STEPS))]
    found = []
    for optimizer in pair:
        step_fn, p, state, step = jax.jit(optimizer.update), params, optimizer.init(params), jnp.asarray(0, jnp.int32)
        for i in range(4):
            grads, keep = noise_like(params, i), jnp.asarray(i != 2)
            norm = optax.tree.norm(grads) * jnp.asarray(1e-3 if i == 3 else 1.0)  # taken as given; the last is not cut
            before = p, state
            p, state = step_fn(step, p, state, grads, norm, keep)
            step = step + keep.astype(jnp.int32)
            if i == 2:
                assert_bitwise((p, state), before)
        found.append(p)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True):
        # float32: steps of 1e-2 on numbers of about 1
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-7, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "tx", [adamw_by_optax(CFG, STEPS), optax.lion(1e-3), optax.contrib.muon(1e-3)], ids=["adamw", "lion", "muon"]
)
def test_nan_gradients_that_are_not_kept_change_nothing(tx):
    params = nnx.State({"w": nnx.Param(jnp.ones((2, 3)), axes=("dim", "hidden"))})
    optimizer, bad = optim.make(CFG, STEPS, transformation=tx), jax.tree.map(lambda x: x * jnp.nan, params)
    state, nan = optimizer.init(params), jnp.asarray(jnp.nan, jnp.float32)
    got = optimizer.update(jnp.asarray(0, jnp.int32), params, state, bad, nan, jnp.asarray(False))
    assert_bitwise(got, (params, state))


def test_the_state_is_sharded_like_the_parameters_that_it_mirrors():
    """Adam's means and a masked momentum are; adafactor's rows and columns, which have other shapes, are replicated."""
    params, mesh = params_of(), jax.sharding.AbstractMesh((2, 4, 1), sharding.AXES)
    want = {path: v.get_value() for path, v in nnx.to_flat_state(sharding.state_sharding(params, mesh, fsdp=True))}
    sharded = [path for path, at in want.items() if any(at.spec)]
    assert len(sharded) > 10
    masked = optax.masked(optax.trace(0.9), lambda p: jax.tree.map(lambda _: True, p))
    for tx, copies in ((optax.adam(1e-3), 2), (optax.chain(optax.clip(1.0), masked), 1)):
        found = sharding.state_sharding(jax.eval_shape(init_of(tx), params), mesh, fsdp=True)
        by_path: dict = {}
        for path, at in jax.tree_util.tree_leaves_with_path(found, is_leaf=has_spec):
            keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
            by_path.setdefault(keys, []).append(at.spec)
        for path in sharded:
            assert by_path[path] == [want[path].spec] * copies
    factored = jax.eval_shape(init_of(optax.scale_by_factored_rms(min_dim_size_to_factor=2)), params)
    found = sharding.state_sharding(factored, mesh, fsdp=True)
    assert not any(any(at.spec) for at in jax.tree.leaves((found.v_row, found.v_col), is_leaf=has_spec))


def test_a_transformation_is_named_by_the_types_of_its_state():
    tx = optax.chain(optax.clip(1.0), optax.adam(optax.constant_schedule(1e-3)))
    assert optim.name_of(tx, few_params()) == "optax:ScaleByAdamState+ScaleByScheduleState"


# settings


def test_the_optimizer_that_runs_is_reported():
    """Only AdamW's update is an op of the table, and only float32 means are the C++ kernel's."""
    kernels = choose.Kernels(choose.Target("cpu"))
    for name, said in {"adamw": "cpu", "muon": "muon by xla, adamw by cpu", "optax:lion": "optax:lion"}.items():
        run = make_run("nowhere", optim=replace(CFG, name=name))
        assert prepare.kernels_of(Job(run, kernels=kernels))["optimizer"] == said
    run = make_run("nowhere", optim=replace(CFG, moments_dtype="bfloat16"))
    assert prepare.kernels_of(Job(run, kernels=kernels))["optimizer"] == "xla"


def test_unknown_names_are_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="optim name='moun' is not one of adamw, muon; did you mean 'muon'"):
        OptimConfig(name="moun")
    with pytest.raises(ConfigError, match=r"optim.name='optax:mine' is a transformation: give it by .*optimizer=tx"):
        optim.check(OptimConfig(name="optax:mine"), None)
    with pytest.raises(ConfigError, match="optimizer='adam' is not an optax transformation"):
        unhooked("dsv3_jax.training.optim").check(OptimConfig(), "adam")


# runs


@pytest.mark.long
def test_a_run_with_a_transformation_resumes_bitwise_and_with_no_other(tmp_path):
    text = write_text(tmp_path / "text")
    run = make_run(text, model=PLAIN, steps=4, eval_every=4, save_every=2, eval_batches=1)
    tx = optax.chain(optax.scale_by_lion(), optax.scale_by_schedule(lambda count: -3e-3 / (1 + count)))
    fit = ds.train.fit
    fit(run, tmp_path / "whole", quiet=True, optimizer=tx)
    fit(run, tmp_path / "parts", quiet=True, optimizer=tx, stop_after=2)
    fit(run, tmp_path / "parts", quiet=True, optimizer=tx)
    content = json.loads((tmp_path / "parts" / "run.json").read_text())
    held = content["run"]["optim"]["name"]
    assert content["kernels"]["optimizer"] == held
    assert held == "optax:ScaleByLionState+ScaleByScheduleState"
    named = replace(run, optim=replace(run.optim, name=held))
    states = []
    for folder in ("whole", "parts"):
        with Checkpoints(tmp_path / folder, named, optimizer=tx) as checkpoints:
            states.append(checkpoints.restore()[0])
    assert_bitwise(*states)
    assert int(states[0].opt[0].count) == 4 and int(states[0].step) == 4
    rows = rows_of(tmp_path / "whole")
    assert rows == rows_of(tmp_path / "parts")
    assert len(rows) == 5 and "lr" not in rows[0]
    for other in (None, optax.adam(1e-2)):
        with pytest.raises(ValueError, match=r"optim.name='.*' is not that of the run in .*, 'optax:ScaleByLionState"):
            fit(run, tmp_path / "parts", quiet=True, optimizer=other)
    with pytest.raises(ConfigError, match="is a transformation: give it by"):
        fit(named, tmp_path / "parts", quiet=True)
    model, _, step = load_run(tmp_path / "parts")  # a reader needs no transformation
    assert step == 4
    np.testing.assert_array_equal(model.embed[...], states[0].params["embed"][...])


@pytest.mark.parametrize("kind", ["lora", "trunk"])
def test_a_transformation_moves_what_trains_alone(kind):
    run = make_run("nowhere", model=replace(MODEL, num_layers=1), optim=CFG)
    if kind == "lora":
        run = replace(run, start="nowhere", lora=Lora(2, 4.0, ("attention",)))
    else:
        run = replace(run, trunk="nowhere")
    tx, shapes = optax.lion(1e-2), abstract_state(Job(run)).params
    state = jax.eval_shape(lambda p: init_optimizer(Job(run, optimizer=tx), p), shapes)
    trained = split_trainable(run, shapes)[0]
    assert len(jax.tree.leaves(state)) == 1 + len(jax.tree.leaves(trained)) < len(jax.tree.leaves(shapes))


BATCH, LENGTH = 16, 12


@pytest.mark.long
def test_a_step_on_eight_devices_is_a_single_devices():
    """Parameters and state after a step; the state is sharded by the parameters' names, before the step and after."""
    tx = adamw_by_optax(replace(CFG, eps=0.1), STEPS)
    model = replace(PLAIN, num_layers=1, mtp_depth=0)
    run = make_run("nowhere", model=model, optim=replace(CFG, eps=0.1))
    run = replace(run, data=replace(run.data, batch_size=BATCH, seq_len=LENGTH))
    rng = np.random.default_rng(0)
    batch = packed_batch(rng, np.sort(rng.integers(1, 4, (BATCH, LENGTH)), axis=1))

    def state_of(run):
        state = fresh_state(run)
        return replace(state, opt=init_optimizer(Job(run, optimizer=tx), state.params))

    want, _ = jax.device_get(make_step(Job(run, optimizer=tx))(state_of(run), batch))
    run = replace(run, execution=ds.Execution(layout=Layout(fsdp=True)))
    mesh = sharding.make_mesh(2, 2, 2)
    state = state_of(run)
    where = sharding.state_sharding(state, mesh, fsdp=True)
    with jax.set_mesh(mesh):
        rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        step = make_step(Job(run, kernels=choose.prepare(run.execution, mesh=mesh), optimizer=tx))
        new, _ = step(jax.device_put(state, where), rows)
    sharded = 0
    for leaf, at in zip(jax.tree.leaves(new), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
        sharded += not at.is_fully_replicated
    assert sharded >= 3 * 8  # parameters and both means
    for a, b in zip(jax.tree.leaves(jax.device_get(new)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 + 1e-5 * np.abs(b).max())
