"""Tokens that travel to other devices' experts: the sums and gradients of a single device, whatever the load."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from models import small

from dsv3_jax import expert_exchange, expert_parallel, sharding
from dsv3_jax.config import ConfigError, Layout
from dsv3_jax.ops import dispatch

pytestmark = pytest.mark.usefixtures("x64", "light_compiles")

E, K, D, F, LAYERS = 8, 3, 4, 6, 2
N = 48  # tokens of all devices
CFG = small(num_experts=E, experts_per_token=K, num_groups=4, groups_per_token=2, dim=D, expert_dim=F)


def loads(rng, n):
    """Choices of every token [n, K] by the experts that they like."""
    likings = {
        "random": np.zeros(E),
        "one device": np.where(np.arange(E) < 4, 99.0, 0.0),  # with 2 devices; with more, two or four take all
        "idle": np.where(np.arange(E) % 4 == 0, -99.0, 0.0),
        "the same for all": np.arange(E) * 99.0,
    }
    for name, liking in likings.items():
        ids = np.argsort(-rng.gumbel(liking, size=(n, E)), axis=1)[:, :K]
        yield name, jnp.asarray(ids, jnp.int32)


def arrays(rng, n):
    shapes = (n, D), (n, K), (n, D), (LAYERS, E, D, F), (LAYERS, E, D, F), (LAYERS, E, F, D)
    x, gates, weight, *stack = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
    return x, gates, weight, dispatch.Experts(*stack)


LAYER = 1
OTHER = 0.5  # the thread's cotangent as other layers left it


def spread(cfg, mesh, backend):
    """What a training step sees of the layer: y, copies of a token on the wire, and gradients, all on a mesh."""

    def loss(x, gates, experts, ids, weight):
        layer = jnp.asarray(LAYER, jnp.int32)
        y, thread, crossed = expert_parallel.routed_swiglu(
            x, ids, gates, experts, experts, layer, backend=backend, cfg=cfg
        )
        return (weight * y).sum() + OTHER * sum(w.sum() for w in thread), (y, crossed)

    place = [
        jax.NamedSharding(mesh, sharding.spec(names, (LAYERS, E, *(D, F)), mesh, fsdp=cfg.layout.fsdp))
        for names in expert_parallel.NAMES
    ]

    @jax.jit
    def run(x, gates, experts, ids, weight):
        grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, (y, crossed)), grads = grad(x, gates, experts, ids, weight)
        return y, crossed, grads

    def on_mesh(x, gates, experts, ids, weight):
        experts = dispatch.Experts(*(jax.device_put(w, at) for w, at in zip(experts, place, strict=True)))
        with jax.set_mesh(mesh):
            return jax.device_get(run(x, gates, experts, ids, weight))

    return on_mesh


@jax.jit
def alone(x, gates, experts, ids, weight):
    def loss(x, gates, experts):
        y = oracles.routed_swiglu_jnp(x, ids, gates, *(w[LAYER] for w in experts))
        return (weight * y).sum() + OTHER * sum(w.sum() for w in experts), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gates, experts)
    return y, grads


def copies(ids, n, peers, data):
    """Copies of a token that must go to another device, mean over tokens; and rounds of each number of places."""
    owner = np.asarray(ids) // (E // peers)
    home = np.arange(len(owner)) // n % peers
    lists = [len({*row} - {at}) for row, at in zip(owner, home, strict=True)]
    sent = [[sum(p in row for row in part) for p in range(peers)] for part in owner.reshape(data * peers, n, K)]
    return np.mean(lists), np.max(sent)


def assert_same(got, want):
    (y, _, grads), (expected, expected_grads) = got, want
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, expected, atol=1e-10)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-10), grads, expected_grads)


CASES = {  # (data, expert, tensor), tokens, backend, layout
    "1,8,1": ((1, 8, 1), N, "blocks", Layout(exchange="all_to_all", slack=1.0)),
    "1,8,1 few tokens": ((1, 8, 1), 8, "ragged_dot", Layout(exchange="all_to_all")),
    "2,4,1": ((2, 4, 1), N, "ragged_dot", Layout(exchange="all_to_all", slack=1.0)),
    "2,4,1 fsdp": ((2, 4, 1), N, "blocks", Layout(exchange="all_to_all", slack=1.0, fsdp=True)),
    "2,2,2": ((2, 2, 2), N, "blocks", Layout(exchange="all_to_all", slack=1.0)),
    "2,2,2 fsdp": ((2, 2, 2), N, "ragged_dot", Layout(exchange="all_to_all", slack=1.0, fsdp=True)),
    "2,4,1 gather": ((2, 4, 1), N, "blocks", Layout(exchange="gather")),
}


@pytest.mark.parametrize("sizes, tokens, backend, layout", CASES.values(), ids=CASES)
def test_every_load_is_a_single_devices(rng, sizes, tokens, backend, layout):
    cfg, mesh = replace(CFG, layout=layout), sharding.make_mesh(*sizes)
    run = spread(cfg, mesh, backend)
    x, gates, weight, experts = arrays(rng, tokens)
    data, peers = sizes[:2]
    n = tokens // (data * peers)
    places = expert_exchange.places_a_round(cfg, n, peers)
    rounds = {}
    for name, ids in loads(rng, tokens):
        args = (x, gates, experts, ids, weight)
        got = run(*args)
        assert_same(got, alone(*args))
        _, longest = copies(ids, n, peers, data)
        rounds[name] = -(-longest // places)
        want = rounds[name] * places * (peers - 1) / n if layout.exchange == "all_to_all" else peers - 1
        assert got[1] == pytest.approx(want, rel=1e-6), name
    print(sizes, n, places, rounds)
