"""Tokens sent to other devices' experts: the sums and gradients of a single device, whatever the load."""

import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import some_long
from models import small

from dsv3_jax.config import Layout
from dsv3_jax.kernels.choose import Kernels, Target
from dsv3_jax.mesh import expert_parallel, sharding, token_exchange

pytestmark = pytest.mark.usefixtures("x64", "light_compiles")

E, K, D, F = 16, 2, 4, 6
CFG = small(num_experts=E, experts_per_token=K, num_groups=8, groups_per_token=2, dim=D, expert_dim=F)
LOADS = ("even", "random", "one device", "idle")


def choices(load, rng, tokens):
    """Experts of every token [tokens, K]."""
    if load == "even":
        return jnp.arange(tokens * K, dtype=jnp.int32).reshape(tokens, K) % E
    preference = {
        "random": np.zeros(E),
        "one device": np.where(np.arange(E) < K, 99.0, 0.0),  # experts 0 and 1 are on one device of every mesh
        "idle": np.where(np.arange(E) < E // 2, -99.0, 0.0),  # half the devices
    }[load]
    return jnp.asarray(np.argsort(-rng.gumbel(preference, size=(tokens, E)), axis=1)[:, :K], jnp.int32)


def arrays(rng, tokens):
    shapes = (tokens, D), (tokens, K), (tokens, D), (E, D, F), (E, D, F), (E, F, D)
    x, gates, weight, *experts = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
    return x, gates, weight, tuple(experts)


def sharded(cfg, layout, mesh, backend):
    """Compile one layer for a mesh, as a training step has it. Returns: (y, copies of a token sent, gradients)."""
    kernels = Kernels(Target("cpu", f"grouped_swiglu={backend}"))

    def loss(x, gates, experts, ids, weight):
        how = dict(kernels=kernels, cfg=cfg, layout=layout)
        y, sent = expert_parallel.grouped_swiglu(x, ids, gates, experts, **how)
        return (weight * y).sum(), (y, sent)

    place = [
        jax.NamedSharding(mesh, sharding.spec(names, (E, D, F), mesh, fsdp=layout.fsdp))
        for names in expert_parallel.AXIS_NAMES
    ]

    @jax.jit
    def run(x, gates, experts, *args):
        grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, (y, sent)), grads = grad(x, gates, experts, *args)
        return y, sent, grads

    def on_mesh(x, gates, experts, *args):
        experts = tuple(jax.device_put(w, at) for w, at in zip(experts, place, strict=True))
        with jax.set_mesh(mesh):
            return jax.device_get(run(x, gates, experts, *args))

    return on_mesh


@jax.jit
def alone(x, gates, experts, ids, weight):
    """(y, gradients) of one device."""

    def loss(x, gates, experts):
        y = oracles.routed_swiglu_jnp(x, ids, gates, *experts)
        return (weight * y).sum(), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gates, experts)
    return y, grads


def count_sent(ids, data, peers):
    """(Copies of a token that have to go to another device, mean over tokens; tokens that one device has for one peer,
    at most.) Counted token by token."""
    n, held = len(ids) // (data * peers), E // peers
    sent = np.zeros((data, peers, peers), int)
    for token, chosen in enumerate(np.asarray(ids)):
        for there in {int(e) // held for e in chosen}:
            sent[token // (n * peers), token // n % peers, there] += 1
    crossing = sent.sum() - sent[:, range(peers), range(peers)].sum()
    return crossing / len(ids), sent.max()


def assert_same(got, want):
    (y, _, grads), (expected, expected_grads) = got, want
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, expected, atol=1e-10)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-10), grads, expected_grads)


MANY = Layout(expert_comm="all_to_all", capacity_slack=1.0)
CASES = {  # (data, expert, tensor), tokens, kernel, layout, slots of a round, of a later one, later ones at most
    "1,8,1": ((1, 8, 1), 192, "blocks", MANY, (6, 2, 9)),  # all of a device's 24 tokens go to one peer
    "1,8,1 few tokens": ((1, 8, 1), 8, "ragged_dot", Layout(expert_comm="all_to_all"), (1, 1, 0)),  # one a device
    "2,4,1 fsdp": ((2, 4, 1), 48, "blocks", replace(MANY, fsdp=True), (3, 1, 3)),
    "2,2,2 fsdp": ((2, 2, 2), 48, "ragged_dot", replace(MANY, fsdp=True), (9, 3, 1)),
}


@pytest.mark.parametrize("sizes, tokens, backend, layout, expected", some_long(CASES, "1,8,1 few tokens"))
def test_every_load_is_a_single_devices(rng, sizes, tokens, backend, layout, expected):
    _, peers, _ = sizes
    run = sharded(CFG, layout, sharding.make_mesh(*sizes), backend)
    x, gates, weight, experts = arrays(rng, tokens)
    n = tokens // (sizes[0] * peers)
    slots, later, worst = expected
    assert slots == token_exchange.send_capacity(CFG, layout, n, peers)
    rounds = {}
    for load in LOADS:
        args = (x, gates, experts, choices(load, rng, tokens), weight)
        got = run(*args)
        assert_same(got, alone(*args))
        left = max(0, count_sent(args[3], sizes[0], peers)[1] - slots)
        rounds[load] = math.ceil(left / later)
        assert got[1] == pytest.approx((slots + rounds[load] * later) * (peers - 1) / n, rel=1e-6), load
    assert rounds["even"] == 0 and rounds["one device"] == worst


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all`, which CPU does not have, by its definition; -99 where a call is not in order."""
    rows = jax.lax.all_gather(operand, axis_name)
    starts, sizes, lands = (jax.lax.all_gather(a, axis_name) for a in (input_offsets, send_sizes, output_offsets))
    me, slot = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0], dtype=jnp.int32)
    for peer in range(rows.shape[0]):
        start, size, land = starts[peer, me], sizes[peer, me], lands[peer, me]
        took = rows[peer].at[start + slot - land].get(mode="fill", fill_value=-99)
        here = (slot >= land) & (slot < land + size)
        output = jnp.where(here.reshape(-1, *(1 for _ in output.shape[1:])), took, output)
        in_order = (recv_sizes[peer] == size) & (land + size <= output.shape[0])
        output = jnp.where(in_order, output, jnp.full_like(output, -99))
    return output


@pytest.mark.long
@pytest.mark.parametrize("sizes, backend, fsdp", [((1, 8, 1), "blocks", False), ((2, 2, 2), "ragged_dot", True)])
def test_every_load_is_a_single_devices_ragged(rng, monkeypatch, sizes, backend, fsdp):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    run = sharded(CFG, Layout(expert_comm="ragged", fsdp=fsdp), sharding.make_mesh(*sizes), backend)
    x, gates, weight, experts = arrays(rng, 48)
    for load in LOADS:
        args = (x, gates, experts, choices(load, rng, 48), weight)
        got = run(*args)
        assert_same(got, alone(*args))
        assert got[1] == pytest.approx(count_sent(args[3], *sizes[:2])[0], rel=1e-6), load


@pytest.mark.long
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_ragged_lowers_for_the_accelerators(rng, platform):
    """There it is one call of the compiler's for each of rows, gates and ids, and one for the way back."""
    x, gates, _, experts = arrays(rng, 48)
    layout, kernels = Layout(expert_comm="ragged"), Kernels(Target(platform))

    def run(x, ids, gates, experts):
        return expert_parallel.grouped_swiglu(x, ids, gates, experts, kernels=kernels, cfg=CFG, layout=layout)

    args = jax.tree.map(lambda a: a.astype(jnp.float32), (x, gates, experts))
    with jax.set_mesh(sharding.make_mesh(1, 8)):
        traced = jax.jit(run).trace(args[0], choices("random", rng, 48), *args[1:])
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@ragged_all_to_all") == 4


SHAPES = [  # experts, groups, groups a token, experts a token, peers
    (16, 8, 2, 2, 8), (16, 8, 2, 2, 2), (16, 4, 3, 5, 16), (12, 1, 1, 4, 6), (12, 2, 1, 4, 6),
]  # fmt: skip


@pytest.mark.parametrize("experts, groups, per_token, k, peers", SHAPES)
def test_reach_is_that_of_all_choices(experts, groups, per_token, k, peers):
    cfg = small(num_experts=experts, num_groups=groups, groups_per_token=per_token, experts_per_token=k)
    size, reach = experts // groups, []
    for chosen in itertools.combinations(range(groups), per_token):
        pool = [g * size + e for g in chosen for e in range(size)]
        reach += [len({e // (experts // peers) for e in ids}) for ids in itertools.combinations(pool, k)]
    assert token_exchange.mean_reach(cfg, peers) == pytest.approx(np.mean(reach), rel=1e-12)


def test_auto_is_the_smaller_one():
    for changes in (dict(num_groups=3), dict(num_groups=4, groups_per_token=1, router="topk")):
        # Groups are ignored if one is on two devices, and if the router has none.
        grouped, free = small(num_experts=12, **changes), small(num_experts=12, num_groups=1, groups_per_token=1)
        assert token_exchange.mean_reach(grouped, 4) == token_exchange.mean_reach(free, 4)
    pick, auto = expert_parallel.pick_expert_comm, Layout()
    assert pick(CFG, auto, 100, 8) == "all_to_all"  # 1.67 devices of 8
    every = small(num_experts=16, experts_per_token=12, num_groups=1, groups_per_token=1)
    assert pick(every, auto, 100, 4) == "gather"  # nearly all devices
    assert pick(CFG, auto, 1, 8) == "gather"  # a single slot is all there is
    assert pick(every, Layout(expert_comm="all_to_all"), 100, 4) == "all_to_all"


def test_bytes_on_the_wire():
    """A token of 4 numbers of 2 bytes goes out with 2 ids and 2 gates of 4 bytes each, and comes back alone."""
    assert token_exchange.wire_bytes(3.0, CFG, 2) == 3 * (8 + 16 + 8)
