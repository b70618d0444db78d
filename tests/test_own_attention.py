"""An attention that a program registers: it trains, decodes and is sharded as those of the package.

The example is MLA whose rotated part is added to the other, in place of being joined to it.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, assert_best, flat, parameters, random_model, small
from runs import MODEL, documents, fresh_state, make_run, on_mesh, refused, save_run

import dsv3_jax as ds
from dsv3_jax import reference
from dsv3_jax.config import Lora, OptimConfig, from_dict, to_dict
from dsv3_jax.config.model import ATTENTION_KINDS
from dsv3_jax.hf.tensor_names import tensor_table
from dsv3_jax.mesh import sharding
from dsv3_jax.model import blocks
from dsv3_jax.model.attention import Attention
from dsv3_jax.training.state import Job, abstract_state
from dsv3_jax.training.step import make_step

WIDTH = 6  # of content and of the rotated part
CHANGES = dict(
    attention="summed", nope_head_dim=WIDTH, rope_head_dim=WIDTH, num_heads=4, num_layers=2,
    num_dense_layers=1, vocab_size=38,
)  # fmt: skip
PROMPTS = [[1], [2, 3, 5, 7, 11], [9, 3, 30, 2, 6, 8, 4, 17, 20, 21]]
NEW = 12


class Summed(ds.MLA):
    """q = q_c + RoPE(q_r), k = k_c + RoPE(k_r), all of one width; else MLA, with its caches."""

    @classmethod
    def cache_rows(cls, cfg, kind):
        rows = super().cache_rows(cfg, kind)
        return rows if kind == "latent" else rows | {"k": (cfg.num_heads, cfg.rope_head_dim)}

    def project(self, x, ctx):
        q, rows = super().project(x, ctx)
        return self.added(q), rows

    def expand(self, rows, ctx):
        found = super().expand(rows, ctx)
        return found | {"k": self.added(found["k"])}

    def absorb(self, q, ctx):  # q · (W_uk c_kv + k_r) = (q W_uk) · c_kv + q · k_r
        w_uk = self.w_uk[...].astype(q.dtype)
        return {"latent": ctx.run("product_by_head", q, w_uk), "k_rope": q}

    def added(self, x):
        return sum(jnp.split(x, 2, axis=-1))


@pytest.fixture(autouse=True)
def summed():
    ds.register_attention("summed", Summed)
    yield small(**CHANGES)
    del ATTENTION_KINDS["summed"], blocks.ATTENTION["summed"]


def test_its_output_is_its_equation(summed, rng, monkeypatch):
    """The page's MLA, whose rotated part is added; there the first numbers of pairs come first."""
    rotate = reference.rotate

    def added(ctx, x):
        content, rotated = np.split(rotate(ctx, x), 2, axis=-1)
        pairs = np.stack(np.split(rotated, 2, axis=-1), axis=-1)
        return content + pairs.reshape(content.shape)

    monkeypatch.setattr(reference, "rotate", added)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Summed(summed, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda a: 0.3 * rng.standard_normal(a.shape, np.float32), state)
    p, x = parameters(nnx.merge(graphdef, state)), rng.standard_normal((1, 9, summed.dim))
    ctx = reference.Context(summed, np.arange(9)[None], np.ones((1, 9), int))
    found = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, np.float32(x))
    # float32 beside float64
    np.testing.assert_allclose(found, reference.mla(ctx, p, x), atol=1e-5)


@pytest.mark.long
def test_it_decodes_with_each_cache_as_the_forward_pass_also_with_heads_on_two_devices(summed):
    alone = random_model(summed, seed=2, execution=DENSE)
    model = on_mesh(alone, sharding.make_mesh(1, 1, 2))
    found = ds.generate(model, PROMPTS, NEW).tokens
    assert found == ds.generate(alone, PROMPTS, NEW, cache="expanded").tokens
    assert_best(alone, PROMPTS, found)


def run_of(**changes):
    model = replace(MODEL, num_layers=1, num_dense_layers=1, mtp_depth=0, attention="summed")
    return make_run("nowhere", model=replace(model, nope_head_dim=4, rope_head_dim=4), **changes)


@pytest.mark.long
def test_a_step_trains_it_or_its_adapters():
    run, batch = run_of(optim=OptimConfig(name="muon", warmup_steps=0)), documents(4, 16)
    before = flat(fresh_state(run).params)
    new, metrics = make_step(Job(run))(fresh_state(run), batch)
    trained = {path for path, x in flat(new.params).items() if (x != before[path]).any()}
    assert metrics["finite"] and trained == before.keys()
    job = Job(replace(run, start="nowhere", lora=Lora(rank=2)))
    jax.eval_shape(make_step(job), abstract_state(job), batch)  # traced, not compiled


def test_what_has_no_form_is_refused(summed, tmp_path):
    run = save_run(tmp_path / "run", run_of())
    assert ds.load_model(tmp_path / "run").cfg == run.model
    for refuses in (lambda: tensor_table(run.model), lambda: ds.hf.convert(tmp_path / "run", "x")):
        with refused("attention='summed' has no released format; use 'mla' or 'dsa'"):
            refuses()
    ctx = reference.Context(summed, np.arange(5)[None], np.ones((1, 5), np.int32))
    with refused("attention='summed' has no equations on this page"):
        reference.transformer(ctx, parameters(random_model(summed)), np.zeros((1, 5), int))
    with refused("optim.qk_clip=9.0 is for attention='mla', not 'summed'"):
        replace(run, optim=replace(run.optim, qk_clip=9.0))


def test_the_table_of_names_is_open_and_checked(summed):
    assert from_dict(ds.ModelConfig, to_dict(summed)) == summed and summed.has_latent
    with refused("attention='sumed' is not one of mla, .*; did you mean "):
        replace(summed, attention="sumed")
    with refused("attention='more': <.*> is no subclass of "):
        ds.register_attention("more", lambda x: x)
    with refused("attention='more': More does not define make_weights"):
        ds.register_attention("more", type("More", (Attention,), {}))
    assert "more" not in ATTENTION_KINDS and blocks.ATTENTION["mla"] is ds.MLA


def test_an_attention_that_keeps_no_keys_is_refused_where_it_is_made(summed, monkeypatch):
    monkeypatch.setattr(Summed, "cache_rows", classmethod(lambda *_: {"key": (4, 6)}))
    with refused(r"Summed.cache_rows has \['key'\], and no 'k'"):
        Summed(summed, rngs=nnx.Rngs(0))


def test_rows_of_another_width_are_refused_before_a_kernel_reads_them(summed, monkeypatch):
    """C++ takes the width of keys from the queries: it would read other numbers, or no one's."""
    expand = Summed.expand

    def narrow_keys(*args):
        found = expand(*args)
        return found | {"k": found["k"][..., 1:]}

    monkeypatch.setattr(Summed, "expand", narrow_keys)
    attention = Summed(summed, rngs=nnx.Rngs(0))
    with refused(r"Summed gives k of shape \(1, 3, 4, 5\), not \(1, 3, 4, 6\)"):
        attention(jnp.ones((1, 3, summed.dim)))
