"""A mesh changes only speed: a step's loss, gradient, load and bias are a single device's."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import pytest
from models import DENSE, INDEXED
from runs import (
    MODEL,
    assert_near,
    assert_same_step,
    documents,
    fresh_state,
    make_run,
    on_mesh,
    refused,
)

from dsv3_jax.config import Balance, Execution, Layout, OptimConfig
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.shape import parse_mesh
from dsv3_jax.training.state import Job, model_of
from dsv3_jax.training.step import make_step

PLAIN = replace(MODEL, num_layers=1, mtp_depth=0)
HEAD = replace(MODEL, num_layers=1, num_dense_layers=1)  # its experts are in the head's block
B, T = 16, 12
# eps: AdamW then does not turn the rounding of gradients near 0 into whole steps of either sign
RUN = make_run("nowhere", optim=OptimConfig(learning_rate=1e-2, warmup_steps=0, eps=0.1))
RUN = replace(RUN, data=replace(RUN.data, batch_size=B, seq_len=T))


# The last row is padding but for two tokens, so that no two devices have equal work.
BATCH = documents(B, T, padding=[(-1, T - 2)])


def run_step(run, mesh=None, given=None):
    state, batch = fresh_state(run), BATCH | ({} if given is None else {"expert_ids": given})
    if mesh is None:
        return jax.device_get(make_step(Job(run))(state, batch))
    state = on_mesh(state, mesh, run.execution.layout.fsdp)
    where = jax.tree.map(lambda x: x.sharding, state)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        new, metrics = make_step(Job(run))(state, batch)
    for leaf, at in zip(jax.tree.leaves(new), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
    return jax.device_get((new, metrics))


# so few slots that a batch takes several rounds
ROUNDS = Layout(expert_comm="all_to_all", capacity_slack=1.0)
GATHER = Layout(expert_comm="gather")
RAGGED_DOT = Execution(kernels="grouped_swiglu=ragged_dot")
# One rule reads every token's scores, which a device may compute from another number of rows.
BY_QUANTILE = Balance(0.5, 1e-2, 0.0, "quantile", 1e-2)
QUANTILE = replace(PLAIN, num_groups=1, groups_per_token=1, balance=BY_QUANTILE)
FSDP = Execution(layout=replace(GATHER, fsdp=True))
CASES = {  # (data, expert, tensor), model, microbatches, execution; test_exchange has all_to_all
    "2,2,2 fsdp head microbatches": ((2, 2, 2), HEAD, 2, FSDP),
}
RARE = {  # the first one also reports the largest logit, and the third one replays experts
    "8,1,1 fsdp microbatches": ((8, 1, 1), PLAIN, 2, Execution(layout=Layout(fsdp=True))),
    "2,2,2 sparse attention": ((2, 2, 2), replace(PLAIN, **INDEXED), 1, FSDP),
    "1,8,1 all_to_all": ((1, 8, 1), PLAIN, 1, replace(RAGGED_DOT, remat="full", layout=ROUNDS)),
    "2,2,2 all_to_all fsdp": ((2, 2, 2), PLAIN, 1, Execution(layout=replace(ROUNDS, fsdp=True))),
    "2,4,1 quantile": ((2, 4, 1), QUANTILE, 1, Execution(layout=GATHER)),
    "2,2,1 capacity": ((2, 2, 1), replace(PLAIN, capacity_factor=1.25), 1, Execution()),
}


@pytest.mark.parametrize(
    "sizes, model, parts, execution",
    [pytest.param(*case, id=name, marks=pytest.mark.long) for name, case in CASES.items()]
    + [pytest.param(*case, id=name, marks=pytest.mark.rare) for name, case in RARE.items()],
)
def test_a_step_is_a_single_devices(sizes, model, parts, execution):
    optim = replace(RUN.optim, microbatches=parts, qk_clip=1e9 if sizes == (8, 1, 1) else None)
    run = replace(RUN, model=model, execution=execution, optim=optim)
    # Alone, every expert reads every token, which compiles fastest, and the complete batch at once.
    plain = replace(run, execution=DENSE, optim=replace(run.optim, microbatches=1))
    given = None
    if sizes == (1, 8, 1):  # experts are replayed, some rows choose freely
        order = np.random.default_rng(1).random((B, 1, T, model.num_experts)).argsort(axis=-1)
        given = order[..., : model.experts_per_token].astype(np.int32)
        given[::3] = -1
    want_state, want = run_step(plain, None, given)
    state, got = run_step(run, sharding.make_mesh(*sizes), given)
    assert_same_step((state, got), (want_state, want))
    assert got["dropped"] == want["dropped"]
    assert (got["dropped"] > 0) == (model.capacity_factor is not None)
    of_scores = model.balance.rule == "quantile"
    assert_near(state.bias, want_state.bias, 1e-6 if of_scores else 0)
    if optim.qk_clip:
        np.testing.assert_allclose(got["max_logit"], want["max_logit"], rtol=1e-5)


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


def test_meshes_that_cannot_be_are_refused():
    for text, why in (
        ("", "is not of the form data=N,expert=N,tensor=N"),
        ("data=256,expert=257", "has more than 65,536 devices"),
        ("data=2,expert=2,data=4", "names data twice"),
    ):
        with refused(f"^mesh={text!r} {why}$"):
            parse_mesh(text)


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
        ((4, 4, 1), (2, 1, 1)),
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


@pytest.mark.parametrize(
    "sizes, changes, why",
    [
        ((1, 8), {"optim": replace(RUN.optim, microbatches=4)}, "batch_size/microbatches=4 rows"),
        ((1, 8), {"model": replace(MODEL, num_experts=12)}, "num_experts=12 is not divisible by"),
        ((1, 1, 4), {}, "num_heads=2 is not divisible by mesh data=1,expert=1,tensor=4"),
    ],
)
def test_what_cannot_be_sharded_is_refused(sizes, changes, why):
    with refused("data=3,expert=4,tensor=1 needs 12 devices, and there are 8 here"):
        sharding.make_mesh(3, 4)
    with refused(why):
        sharding.check_run(sharding.make_mesh(*sizes), replace(RUN, **changes))
