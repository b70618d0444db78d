"""Routers and rules by name, the bias in a loop of one's own, layers in a mesh of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, LIGHT, random_model

import dsv3_jax as ds
from dsv3_jax import reference
from dsv3_jax.config import check_inputs, check_kind
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.ops.routing import ROUTERS, Router


def test_names_are_added_once(monkeypatch):
    monkeypatch.delitem(ROUTERS, "hash")
    ds.register_router("hash", Router(lambda x, cfg: x))
    with pytest.raises(ValueError, match="router='hash' is taken"):
        ds.register_router("hash", Router(lambda x, cfg: x))
    with pytest.raises(ValueError, match="rule='sign' is taken"):
        ds.register_rule("sign", None)


def test_a_loop_of_ones_own_moves_every_bias_as_the_reference():
    cfg = ds.replace(LIGHT, mtp_kind="deepseek", mtp_depth=1, balance=ds.Balance(bias_rate=0.25))
    model = random_model(cfg, execution=DENSE)
    before = jax.tree.leaves(jax.tree.map(np.asarray, nnx.state(model, RouterBias)))
    out = jax.jit(model)(jnp.arange(16, dtype=jnp.int32).reshape(2, 8))
    with pytest.raises(ValueError, match="routings do not belong to"):
        ds.balance.update(model, out.routing)
    ds.balance.update(model, out.routing, *out.mtp_routing)
    moved = jax.tree.leaves(jax.tree.map(np.asarray, nnx.state(model, RouterBias)))
    # as the leaves' paths
    loads = [np.atleast_2d(routing.load) for routing in (*out.mtp_routing, out.routing)]
    want = [[reference.updated_bias(*row, 0.25) for row in zip(b, load, strict=True)]
            for b, load in zip(map(np.atleast_2d, before), loads, strict=True)]  # fmt: skip
    for a, b in zip(moved, want, strict=True):
        np.testing.assert_allclose(np.atleast_2d(a), b, rtol=1e-6)


@pytest.mark.parametrize("names", [("dp", "ep"), ("data", "expert")])
def test_a_mesh_of_other_axes_is_refused_in_one_sentence(names):
    moe = ds.MoE(LIGHT, rngs=nnx.Rngs(0))
    with (
        jax.set_mesh(jax.make_mesh((2, 1), names)),
        pytest.raises(ValueError, match="mesh axes=.* are not"),
    ):
        jax.eval_shape(moe, jnp.ones((2, 4, LIGHT.dim)))


def test_inputs_of_another_shape_or_kind_are_refused_in_one_sentence():
    ids = np.ones((2, 4), np.int32)
    for width, inputs, sentence in (
        (None, {"tokens": [[1, 2]]}, "tokens of type list is not an array [B, T] of integers"),
        (None, {"tokens": ids[0]}, "tokens of shape (4,) is not an array [B, T] of integers"),
        (
            None,
            {"tokens": ids.astype(float)},
            "tokens of shape (2, 4) is not an array [B, T] of integers",
        ),
        (
            None,
            {"tokens": ids, "segment_ids": ids[:1]},
            "segment_ids is not an array of shape (2, 4), as tokens is",
        ),
        (8, {"x": np.ones((2, 4, 7))}, "x of shape (2, 4, 7) is not an array [B, T, 8]"),
    ):
        with pytest.raises(ValueError) as refused:
            check_inputs(width, **inputs)
        assert str(refused.value) == sentence
    check_inputs(None, tokens=ids, segment_ids=ids, positions=None)
    with pytest.raises(ValueError, match="^run=3 is not of type RunConfig$"):
        check_kind("run", 3, ds.RunConfig)
