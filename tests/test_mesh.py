"""A mesh changes only speed: a step's loss, gradient, load and bias are a single device's."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import pytest
from models import DENSE, INDEXED
from runs import MODEL, fresh_state, make_run, packed_batch

from dsv3_jax.config import Balance, ConfigError, Execution, Layout, OptimConfig
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.shape import format_mesh, parse_mesh
from dsv3_jax.training.state import Job, model_of
from dsv3_jax.training.step import make_step

PLAIN = replace(MODEL, num_layers=1, mtp_depth=0)
HEAD = replace(MODEL, num_layers=1, num_dense_layers=1)  # its experts are in the head's block
B, T = 16, 12
# eps: AdamW then does not turn the rounding of gradients near 0 into whole steps of either sign
RUN = make_run("nowhere", optim=OptimConfig(learning_rate=1e-2, warmup_steps=0, eps=0.1))
RUN = replace(RUN, data=replace(RUN.data, batch_size=B, seq_len=T))


def make_batch() -> dict[str, jax.Array]:
    """The last row is padding but for two tokens, so that no two devices have equal work."""
    rng = np.random.default_rng(0)
    segment_ids = np.sort(rng.integers(1, 4, (B, T)), axis=1)
    segment_ids[-1, 2:] = 0
    return packed_batch(rng, segment_ids)


def run_step(run, mesh=None, given=None):
    state, batch = fresh_state(run), make_batch() | ({} if given is None else {"expert_ids": given})
    if mesh is None:
        return jax.device_get(make_step(Job(run))(state, batch))
    where = sharding.state_sharding(state, mesh, fsdp=run.execution.layout.fsdp)
    with jax.set_mesh(mesh):
        new, metrics = make_step(Job(run))(
            jax.device_put(state, where), jax.device_put(batch, sharding.batch_sharding(mesh))
        )
    for leaf, at in zip(jax.tree.leaves(new), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
    return jax.device_get((new, metrics))


# so few slots that a batch takes several rounds
ROUNDS = Layout(expert_comm="all_to_all", capacity_slack=1.0)
GATHER = Layout(expert_comm="gather")
RAGGED_DOT = Execution(kernels="grouped_swiglu=ragged_dot")
# One rule reads every token's scores, which a device may compute from another number of rows.
QUANTILE = replace(
    PLAIN, num_groups=1, groups_per_token=1, balance=Balance(0.5, 1e-2, 0.0, "quantile", 1e-2)
)
CASES = {  # (data, expert, tensor), model, microbatches, execution
    "2,2,2 fsdp head microbatches": (
        (2, 2, 2),
        HEAD,
        2,
        Execution(layout=replace(GATHER, fsdp=True)),
    ),
}
FURTHER = {  # the first one also reports the largest logit; test_exchange has "all_to_all"
    "8,1,1 fsdp microbatches": ((8, 1, 1), PLAIN, 2, Execution(layout=Layout(fsdp=True))),
    "2,2,2 sparse attention": (
        (2, 2, 2),
        replace(PLAIN, **INDEXED),
        1,
        Execution(layout=replace(GATHER, fsdp=True)),
    ),
    "1,8,1 all_to_all": ((1, 8, 1), PLAIN, 1, replace(RAGGED_DOT, remat="full", layout=ROUNDS)),
    "2,2,2 all_to_all fsdp": ((2, 2, 2), PLAIN, 1, Execution(layout=replace(ROUNDS, fsdp=True))),
    "1,2,2 dense microbatches": ((1, 2, 2), PLAIN, 2, replace(DENSE, layout=GATHER)),
    "2,2,1 microbatches": ((2, 2, 1), PLAIN, 2, Execution(layout=GATHER)),
    "2,4,1 quantile": ((2, 4, 1), QUANTILE, 1, Execution(layout=GATHER)),
    "2,2,1 capacity": ((2, 2, 1), replace(PLAIN, capacity_factor=1.25), 1, Execution()),
}


@pytest.mark.parametrize(
    "sizes, model, parts, execution",
    [pytest.param(*case, id=name, marks=pytest.mark.long) for name, case in CASES.items()]
    + [pytest.param(*case, id=name, marks=pytest.mark.rare) for name, case in FURTHER.items()],
)
def test_a_step_is_a_single_devices(sizes, model, parts, execution):
    optim = replace(RUN.optim, microbatches=parts, qk_clip=1e9 if sizes == (8, 1, 1) else None)
    run = replace(RUN, model=model, execution=execution, optim=optim)
    # Alone, every expert reads every token, which compiles fastest, and the complete batch at once.
    plain = replace(run, execution=DENSE, optim=replace(run.optim, microbatches=1))
    given = None
    if sizes == (1, 8, 1):  # experts are replayed, some rows choose freely
        rng, k = np.random.default_rng(1), model.experts_per_token
        order = np.argsort(rng.random((B, 1, T, model.num_experts)), axis=-1)
        given = order[..., :k].astype(np.int32)
        given[::3] = -1
    want_state, want = run_step(plain, None, given)
    state, got = run_step(run, sharding.make_mesh(*sizes), given)
    np.testing.assert_array_equal(got["load"], want["load"])
    assert got["dropped"] == want["dropped"]
    assert (got["dropped"] > 0) == (model.capacity_factor is not None)
    for a, b in zip(jax.tree.leaves(state.bias), jax.tree.leaves(want_state.bias), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=1e-6 if model.balance.rule == "quantile" else 0
        )
    names = ["loss", "mtp_loss", "balance_loss", "accuracy", "grad_norm"]
    names += ["max_logit"] * bool(optim.qk_clip)
    for name in names:
        # sums in another order
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
    # 1e-5 of each tensor's largest entry; the first mean is 0.1 times the clipped gradient
    for a, b in zip(jax.tree.leaves(state.opt.mu), jax.tree.leaves(want_state.opt.mu), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.long
def test_experts_are_chosen_as_on_a_single_device():
    """Also in a second layer, whose input depends on the first one's experts, wherever they are."""
    run = replace(RUN, model=replace(MODEL, mtp_depth=0))
    tokens, state, mesh = make_batch()["tokens"], fresh_state(run), sharding.make_mesh(2, 4)

    @partial(jax.jit, static_argnums=0)
    def chosen(run, state, tokens):
        return model_of(Job(run), state)(tokens).routing.expert_ids

    want = np.asarray(chosen(run, state, tokens))
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, sharding.state_sharding(state, mesh))
        rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
        got = chosen(replace(run, execution=Execution(layout=ROUNDS)), placed, rows)
    np.testing.assert_array_equal(got, want)


def test_meshes_are_read():
    for text, why in (
        ("", "is not of the form data=N,expert=N,tensor=N"),
        ("data=256,expert=257", "has more than 65,536 devices"),
        ("data=2,expert=2,data=4", "names data twice"),
    ):
        with pytest.raises(ConfigError, match=f"^mesh={text!r} {why}$"):
            parse_mesh(text)
    assert parse_mesh("expert=4, data=2") == {"data": 2, "expert": 4, "tensor": 1}
    mesh = sharding.make_mesh(2, 1, 4)
    assert parse_mesh(format_mesh(mesh)) == dict(mesh.shape)


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
    slices = np.vectorize(lambda device: device.slice_index, otypes=[int])(
        sharding.make_mesh(*sizes).devices
    )
    assert slices.shape == sizes
    for axis, number in enumerate(along):
        assert len(set(np.moveaxis(slices, axis, 0)[:, 0, 0])) == number


def test_unequal_parts_of_slices_are_refused(two_nodes):
    why = (
        "mesh data=12,expert=1,tensor=1 does not divide evenly over 2 slices .* of 8 [+] 4 devices"
    )
    with pytest.raises(ConfigError, match=why):
        sharding.make_mesh(12)


def test_what_cannot_be_sharded_is_refused():
    with pytest.raises(
        ConfigError, match="data=3,expert=4,tensor=1 needs 12 devices, and there are 8 here"
    ):
        sharding.make_mesh(3, 4)
    mesh = sharding.make_mesh(1, 8)
    with pytest.raises(
        ConfigError,
        match=r"batch_size/microbatches=4 rows are not divisible by mesh data=1,expert=8",
    ):
        sharding.check_run(mesh, replace(RUN, optim=replace(RUN.optim, microbatches=4)))
    with pytest.raises(ConfigError, match="num_experts=12 is not divisible by mesh"):
        sharding.check_run(mesh, replace(RUN, model=replace(MODEL, num_experts=12)))
    with pytest.raises(
        ConfigError, match="num_heads=2 is not divisible by mesh data=1,expert=1,tensor=4"
    ):
        sharding.check_run(sharding.make_mesh(1, 1, 4), RUN)
