"""Tokens sent to other devices' experts: a single device's sums and gradients, at any load."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import small, value_and_gradients

from dsv3_jax.config import Layout
from dsv3_jax.kernels.choose import Kernels, Target
from dsv3_jax.kernels.table import DEVICES, Device
from dsv3_jax.mesh import expert_parallel, rounds, sharding
from dsv3_jax.ops import dispatch

pytestmark = pytest.mark.usefixtures("x64")

E, K, D, F = 16, 2, 4, 6
GROUPS = dict(num_groups=8, groups_per_token=2)
CFG = small(num_experts=E, experts_per_token=K, dim=D, expert_dim=F, **GROUPS)
LOADS = ("even", "random", "one device", "idle")


def choices(load, rng, tokens):
    """Experts of every token [tokens, K]."""
    if load == "even":
        return jnp.arange(tokens * K, dtype=jnp.int32).reshape(tokens, K) % E
    e = np.arange(E)
    # experts 0 and 1 are on one device of every mesh; half the devices are idle
    preferred = {"random": e < 0, "one device": e < K, "idle": e >= E // 2}[load]
    order = np.argsort(-rng.gumbel(99.0 * preferred, size=(tokens, E)), axis=1)
    return jnp.asarray(order[:, :K], jnp.int32)


def arrays(rng, tokens):
    shapes = (tokens, D), (tokens, K), (tokens, D), (E, D, F), (E, D, F), (E, F, D)
    x, gates, weight, *experts = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
    return x, gates, weight, tuple(experts)


def sharded(cfg, layout, mesh, backend):
    """Compile one layer for a mesh, as a step has it: (y, copies of a token sent, gradients)."""
    kernels = Kernels(Target("cpu", f"grouped_swiglu={backend}"))

    def loss(x, gates, experts, ids, weight):
        how = dict(kernels=kernels, cfg=cfg, layout=layout)
        y, sent = expert_parallel.grouped_swiglu(x, ids, gates, experts, **how)
        return (weight * y).sum(), (y, sent["tokens_sent"], sent.get("tokens_sent_far"))

    @jax.jit
    def run(*args):
        (_, (y, *sent)), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*args)
        return y, sent, grads

    def on_mesh(x, gates, experts, *args):
        with jax.set_mesh(mesh):
            placed = []
            for w, names in zip(experts, expert_parallel.AXIS_NAMES, strict=True):
                spec = sharding.spec(names, (E, D, F), mesh, fsdp=layout.fsdp)
                placed.append(jax.device_put(w, jax.NamedSharding(mesh, spec)))
            return jax.device_get(run(x, gates, tuple(placed), *args))

    return on_mesh


def count_rounds(ids, senders, peers, first, later):
    """Rounds after the first of the device that needs most; tokens go in turn while they fit."""
    n, held, most = len(ids) // senders, E // peers, 0
    for sender, there in itertools.product(range(senders), range(peers)):
        number, tokens, choices = 0, *first
        for chosen in np.asarray(ids)[sender * n : sender * n + n]:
            if here := sum(int(e) // held == there for e in chosen):
                if not tokens or choices < here:
                    number, tokens, choices = number + 1, *later
                tokens, choices = tokens - 1, choices - here
        most = max(most, number)
    return most


def by_load(rng, run, tokens):
    """(Load, experts, copies of a token sent) of each load; sums are a single device's."""
    x, gates, weight, experts = arrays(rng, tokens)
    for load in LOADS:
        ids = choices(load, rng, tokens)
        y, sent, grads = run(x, gates, experts, ids, weight)
        want = value_and_gradients(dispatch.dense_swiglu, weight, x, ids, gates, *experts)
        assert y.dtype == np.float64
        for g, w in zip(jax.tree.leaves((y, grads)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, atol=1e-10)
        yield load, ids, sent


ONE = Layout(expert_comm="all_to_all")
MANY = replace(ONE, capacity_slack=1.0)
# (data, expert, tensor), tokens, layout, kernel, (size of a round, of a later one, most of these).
# With nodes along "expert" there are two hops, and several rounds in both.
CASES = {
    "one token a device": ((1, 8, 1), 8, ONE, "ragged_dot", ((1, 2), (1, 2), 0)),
    "fsdp": ((2, 2, 2), 64, replace(MANY, fsdp=True), "ragged_dot", ((12, 16), (3, 4), 4)),
    "2 of 2 x 2, fsdp": ((2, 4, 1), 64, replace(MANY, fsdp=True, expert_nodes=2), "blocks", None),
    "2 x 2, tensor": ((1, 4, 2), 32, replace(MANY, expert_nodes=2), "ragged_dot", None),
}


@pytest.mark.long
@pytest.mark.parametrize("sizes, tokens, layout, backend, expected", CASES.values(), ids=CASES)
def test_every_load_is_a_single_devices(rng, sizes, tokens, layout, backend, expected):
    senders, hops = sizes[0] * sizes[1], expected is None
    peers = layout.expert_nodes if hops else sizes[1]
    n, further = tokens // senders, {}
    size = rounds.round_size(CFG, layout, n, peers)
    later = rounds.later_size(size, rounds.most_choices(K, E // peers))
    run = sharded(CFG, layout, sharding.make_mesh(*sizes), backend)
    for load, ids, (sent, far) in by_load(rng, run, tokens):
        further[load] = count_rounds(ids, senders, peers, size, later)
        slots = size.tokens + further[load] * later.tokens
        copies = pytest.approx(slots * (peers - 1) / n, rel=1e-6)
        if hops:
            assert far == copies and sent > far, load
        else:
            assert sent == copies, load
    if not hops:
        assert further["even"] == 0 and (size, later, further["one device"]) == expected


# "Tensor" has parts of hidden units. For a TPU experts gathered along "data" are transposed.
GATHERED = [
    ((1, 2, 2), 8, Device(), False),
    pytest.param((2, 2, 2), 64, Device(turns_experts=True), True, marks=pytest.mark.long),
]


@pytest.mark.parametrize("sizes, tokens, device, fsdp", GATHERED, ids=["tokens", "experts"])
def test_what_is_gathered_gives_a_single_devices(rng, monkeypatch, sizes, tokens, device, fsdp):
    monkeypatch.setitem(DEVICES, "cpu", device)
    layout = Layout(expert_comm="gather", fsdp=fsdp)
    run = sharded(CFG, layout, sharding.make_mesh(*sizes), "ragged_dot")
    assert [load for load, *_ in by_load(rng, run, tokens)] == list(LOADS)


@pytest.mark.parametrize("groups, per_token, k, peers", [(4, 3, 5, 16), (8, 2, 2, 2), (1, 1, 4, 8)])
def test_reach_is_that_of_all_choices(groups, per_token, k, peers):
    cfg = small(experts_per_token=k, num_experts=E, num_groups=groups, groups_per_token=per_token)
    size, reach = E // groups, []
    for chosen in itertools.combinations(range(groups), per_token):
        pool = [g * size + e for g in chosen for e in range(size)]
        chosen = itertools.combinations(pool, k)
        reach += [len({e // (E // peers) for e in ids}) for ids in chosen]
    assert rounds.mean_reach(cfg, peers) == pytest.approx(np.mean(reach), rel=1e-12)


def test_auto_is_the_smaller_one():
    for changes in (dict(num_groups=3), dict(num_groups=4, groups_per_token=1, router="topk")):
        # Groups are ignored if one is on two devices, and if the router has none.
        grouped = small(num_experts=12, **changes)
        free = small(num_experts=12, num_groups=1, groups_per_token=1)
        assert rounds.mean_reach(grouped, 4) == rounds.mean_reach(free, 4)
    pick = expert_parallel.pick_expert_comm
    assert pick(CFG, Layout(), 100, 8) == "all_to_all"  # 1.67 devices of 8
    assert pick(CFG, Layout(), 1, 8) == "gather"  # a single slot is all there is
    assert pick(CFG, ONE, 1, 8) == "all_to_all"
