"""What programs of one's own build on: routers and rules by name, the bias in a loop, layers in a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, LIGHT
from runs import fresh_state, make_run, packed_batch

import dsv3_jax as ds
from dsv3_jax.ops.routing import ROUTERS, Router
from dsv3_jax.training.step import Job, make_step, model_of

NAMES = "data", "expert", "tensor"


def test_names_are_added_once(monkeypatch):
    monkeypatch.delitem(ROUTERS, "hash")
    ds.register_router("hash", Router(lambda x, cfg: x))
    with pytest.raises(ValueError, match="router='hash' is taken"):
        ds.register_router("hash", Router(lambda x, cfg: x))
    with pytest.raises(ValueError, match="rule='sign' is taken"):
        ds.register_rule("sign", None)


def test_a_loop_of_ones_own_moves_the_bias_as_a_step_does():
    cfg = ds.replace(LIGHT, mtp_kind="deepseek", mtp_depth=1, balance=ds.Balance(bias_rate=0.25))
    run = make_run("nowhere", model=cfg)
    batch = packed_batch(np.random.default_rng(0), np.ones((2, 8), int))
    state = fresh_state(run)
    model = model_of(Job(run), state)
    out = jax.jit(model)(batch["tokens"])
    with pytest.raises(ValueError, match="1 routings are not those of 2 routers"):
        ds.balance.update(model, out.routing)
    ds.balance.update(model, out.routing, *out.mtp_routing)
    moved = jax.tree.leaves(jax.tree.map(np.asarray, nnx.state(model, ds.balance.RouterBias)))
    want = jax.tree.leaves(make_step(Job(run))(state, batch)[0].bias)  # it takes the state's memory
    assert len(moved) == 2 and [x.tolist() for x in moved] == [x.tolist() for x in want]


@pytest.mark.parametrize("names", [("dp", "ep"), ("data", "expert")])
def test_a_mesh_of_other_axes_is_refused_in_one_sentence(names):
    moe = ds.MoE(LIGHT, DENSE, rngs=nnx.Rngs(0))
    with jax.set_mesh(jax.make_mesh((2, 1), names)), pytest.raises(ValueError, match="mesh axes=.* are not"):
        jax.eval_shape(moe, jnp.ones((2, 4, LIGHT.dim)))
