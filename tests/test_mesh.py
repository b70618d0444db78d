"""A mesh changes only speed: a step's loss, gradient, load and bias are a single device's."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import (
    MODEL,
    assert_bitwise,
    assert_same_step,
    documents,
    fresh_state,
    make_run,
    on_mesh,
    refused,
)

from dsv3_jax.config import Balance, Execution, Layout, OptimConfig
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.logits import score_by_rows
from dsv3_jax.mesh.shape import parse_mesh
from dsv3_jax.training.loss import score_tokens
from dsv3_jax.training.state import Job, model_of
from dsv3_jax.training.step import make_step

B, T = 8, 16
# eps: AdamW then does not turn the rounding of gradients near 0 into whole steps of either sign
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=0, eps=0.1)
# A dense layer and a head with experts; eight heads of attention, one for each device.
BALANCE = Balance(bias_rate=1e-2, sequence_alpha=1e-2, switch_alpha=1e-2, z_alpha=1e-3)
CFG = replace(MODEL, num_layers=1, num_dense_layers=1, num_heads=8, balance=BALANCE)
NO_SWITCH = replace(CFG, balance=replace(BALANCE, switch_alpha=0.0))  # it is of a microbatch
PLAIN = replace(CFG, attention="gqa", num_kv_heads=2, mtp_kind="meta", mtp_depth=2, qk_norm=True)
RUN = make_run("nowhere", model=CFG, optim=OPTIM)
RUN = replace(RUN, data=replace(RUN.data, batch_size=B, seq_len=T))
# Documents extend over several parts of a row; the last row is padding but for 3 tokens.
BATCH = documents(B, T, padding=[(-1, T - 3)])
GATHERED = Layout(expert_comm="gather", fsdp=True)
ROUNDS = Layout(expert_comm="all_to_all", capacity_slack=1.0)  # so few slots: several rounds


def of_step(run, mesh=None, scored=False):
    """(A step's state and metrics; scores or None) of one device, or of a mesh."""
    state, batch, job, layout = fresh_state(run), dict(BATCH), Job(run), run.execution.layout
    if mesh is not None:
        sharding.check_run(mesh, run)
        state = on_mesh(state, mesh, layout.fsdp)
        batch = jax.device_put(batch, sharding.batch_sharding(mesh, B))
    where = jax.tree.map(lambda x: x.sharding, state)
    with sharding.use_mesh(mesh):
        scores = jax.jit(lambda state, batch: score_tokens(model_of(job, state), batch))
        found = scores(state, batch) if scored else None
        new, metrics = make_step(job)(state, batch)
    for leaf, at in zip(jax.tree.leaves(new), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
    return jax.device_get(((new, metrics), found))


STEPS = {  # test_exchange sends tokens; tests/pairs has other settings
    "fsdp, microbatches": ((2, 2, 2), NO_SWITCH, GATHERED, 2),
    "length": ((2, 2, 2), CFG, replace(ROUNDS, length="expert"), 1),
    "length, gqa, meta, fsdp": pytest.param(
        (2, 4, 1), PLAIN, Layout(length="expert", fsdp=True), 1, marks=pytest.mark.rare
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("sizes, cfg, layout, microbatches", STEPS.values(), ids=STEPS)
def test_a_step_is_a_single_devices(sizes, cfg, layout, microbatches):
    # Alone, every expert reads every token, which compiles fastest, and the complete batch at once.
    alone, optim = replace(RUN, model=cfg), replace(OPTIM, microbatches=microbatches)
    run = replace(alone, execution=Execution(layout=layout), optim=optim)
    scored = layout.length == "expert"
    want, want_scores = of_step(alone, None, scored)
    got, scores = of_step(run, sharding.make_mesh(*sizes), scored)
    assert_same_step(got, want)
    assert_bitwise(got[0].bias, want[0].bias)
    if scored:
        assert_bitwise(scores._replace(nll=0), want_scores._replace(nll=0))
        np.testing.assert_allclose(scores.nll, want_scores.nll, rtol=1e-5)


@pytest.mark.long
def test_experts_are_chosen_as_on_a_single_device():
    """Also in a second layer, whose input depends on the first one's experts, wherever they are."""
    run = replace(RUN, model=replace(MODEL, mtp_depth=0))
    tokens, state, mesh = BATCH["tokens"], fresh_state(run), sharding.make_mesh(2, 4)

    @partial(jax.jit, static_argnums=0)
    def chosen(run, state, tokens):
        return model_of(Job(run), state)(tokens).routing.expert_ids

    want = np.asarray(chosen(run, state, tokens))
    with jax.set_mesh(mesh):
        rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
        got = chosen(replace(run, execution=Execution(layout=ROUNDS)), on_mesh(state, mesh), rows)
    np.testing.assert_array_equal(got, want)


def test_the_heads_gradient_by_scores_in_bfloat16_is_a_single_devices(rng):
    """Its sum over devices is in float32: XLA for CPUs aborts on one in bfloat16."""
    h, w = (jnp.asarray(rng.normal(size=n), jnp.bfloat16) for n in ((4, 5, 8), (8, 12)))
    wanted = jnp.asarray(rng.integers(0, 12, (4, 5)), jnp.int32)
    gradient = jax.jit(jax.grad(lambda w, h, wanted: score_by_rows(h, w, wanted)[0].sum()))
    want, mesh = np.float32(gradient(w, h, wanted)), sharding.make_mesh(2, 2)
    with jax.set_mesh(mesh):
        got = gradient(w, *jax.device_put((h, wanted), sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(np.float32(got), want, atol=0.02 * np.abs(want).max())  # 8 bits


@dataclass(frozen=True)
class Device:
    """A device of one slice, as JAX describes a GPU of several nodes."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "H100"
    process_index: int = 0


@pytest.fixture
def two_nodes(monkeypatch):
    """Sixteen GPUs of two nodes, JAX's slices; its own `make_mesh` refuses several of them."""
    devices = [Device(i, i // 8) for i in range(16)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: len(devices))


@pytest.mark.parametrize(
    "sizes, along",
    [
        ((2, 4, 2), (2, 1, 1)),
        ((1, 16, 1), (1, 2, 1)),  # "data" is not divisible, so "expert" is over both
        ((1, 1, 16), (1, 1, 2)),
        ((2, 4, 1), (1, 1, 1)),  # of the first node alone
    ],
)
def test_slices_are_along_data_where_it_is_divisible(two_nodes, sizes, along):
    slice_of = np.vectorize(lambda device: device.slice_index, otypes=[int])
    slices = slice_of(sharding.make_mesh(*sizes).devices)
    assert slices.shape == sizes
    for axis, number in enumerate(along):
        assert len(set(np.moveaxis(slices, axis, 0)[:, 0, 0])) == number


def test_unequal_parts_of_slices_are_refused(two_nodes):
    with refused(".*data=12,expert=1,tensor=1 does not divide evenly over 2 slices .* 8 [+] 4 dev"):
        sharding.make_mesh(12)


NO_MESH = {
    "": "is not of the form data=N,expert=N,tensor=N",
    "data=256,expert=257": "has more than 65,536 devices",
    "data=2,expert=2,data=4": "names data twice",
}
NOT_SHARDED = [
    ((1, 8), {"optim": replace(OPTIM, microbatches=4)}, "batch_size/microbatches=2 rows"),
    ((1, 8), {"model": replace(MODEL, num_experts=12)}, "num_experts=12 is not divisible by"),
    ((1, 1, 4), {"model": MODEL}, "num_heads=2 is not divisible by mesh data=1,expert=1,tensor=4"),
]


def test_a_mesh_that_cannot_be_and_what_it_cannot_shard_are_refused():
    for text, why in NO_MESH.items():
        with refused(f"^mesh={text!r} {why}$"):
            parse_mesh(text)
    with refused("data=3,expert=4,tensor=1 needs 12 devices, and there are 8 here"):
        sharding.make_mesh(3, 4)
    for sizes, changes, why in NOT_SHARDED:
        with refused(why):
            sharding.check_run(sharding.make_mesh(*sizes), replace(RUN, **changes))
