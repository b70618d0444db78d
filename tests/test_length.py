"""Rows whose length a mesh shards: what it sends, and what is refused; test_mesh compares steps."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import INDEXED, small
from runs import MODEL, make_run, refused
from test_compiled import GPU8, as_libraries_do, mesh_of

from dsv3_jax.config import Balance, Execution, Grpo, Layout
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.length import by_layout
from dsv3_jax.model.attention import MLA
from dsv3_jax.model.blocks import Block
from dsv3_jax.model.context import How, how_of, make_context
from dsv3_jax.planning.cost import check_decode, choose_kernels, train_cost

# Eight heads of attention, one for each device.
CFG = replace(MODEL, num_layers=1, num_dense_layers=1, num_heads=8)
LENGTH = Layout(length="expert")
FSDP = replace(LENGTH, fsdp=True)


def run_of(cfg=CFG, layout=LENGTH):
    run = make_run("nowhere", model=cfg, execution=Execution(layout=layout))
    return replace(run, data=replace(run.data, batch_size=4, seq_len=16))


HEADS, LATENT, LENGTH_OF_ROW = 16, 576, 1536
RARE = (pytest.param(name, marks=pytest.mark.rare) for name in (GPU8, "tpu:v6e:2x4"))
on_devices = pytest.mark.parametrize("target", ["cpu", *RARE])
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
)


def layer_program(mesh):
    """The text of a layer's forward and backward pass, compiled for a mesh."""
    cfg = small(
        dim=256, num_heads=HEADS, nope_head_dim=128, rope_head_dim=64, v_head_dim=128,
        kv_latent_dim=512, q_latent_dim=None, num_experts=8, expert_dim=128, max_positions=4096,
    )  # fmt: skip
    execution = Execution(compute_dtype="bfloat16", layout=LENGTH)
    how = How(choose_kernels(execution, mesh), LENGTH)
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(cfg, sparse=True, rngs=nnx.Rngs(0))))

    @by_layout
    def gradients(model, state, x, segment_ids, positions):
        def loss(state, x):
            ctx = make_context(cfg, positions, segment_ids, how=how)
            x = sharding.constrain(x, "batch", None, None)
            return nnx.merge(graph, state)(x, ctx)[0].astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1))(state, x)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    where = sharding.state_sharding(state, mesh)
    state = jax.tree.map(lambda s, at: s.update(sharding=at), state, where)
    x, ids = array("bfloat16", 1, LENGTH_OF_ROW, cfg.dim), array("int32", 1, LENGTH_OF_ROW)
    step = jax.jit(lambda *args: gradients(SimpleNamespace(execution=execution), *args))
    with jax.set_mesh(mesh), as_libraries_do():
        return step.lower(state, x, ids, ids).compile().as_text()


def sent_around_attention(text):
    """Collectives of attention: (kind, is it of the backward pass, size of its largest result)."""
    for line in text.splitlines():
        if (found := COLLECTIVE.search(line)) and "MLA" in line:
            shapes = re.findall(r"\[([\d,]+)\]", found[1])
            sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]
            yield found[2], "transpose(" in line, max(sizes, default=0)


@pytest.mark.long
@on_devices
def test_a_layer_gathers_latents_alone(target):
    """One gather of latents, and two all-to-alls of heads in each direction.

    Each device computes its heads' part of the gradients of w_uk and w_uv, which are gathered too.
    """
    mesh = sharding.make_mesh(1, 8) if target == "cpu" else mesh_of(target, expert=8)
    sent = list(sent_around_attention(layer_program(mesh)))
    gathers = [(back, size) for kind, back, size in sent if kind == "all-gather"]
    assert [size for back, size in gathers if not back] == [LENGTH_OF_ROW * LATENT]
    assert {size for back, size in gathers if back} == {HEADS * 128 * 512}
    exchanges = [back for kind, back, _ in sent if kind == "all-to-all"]
    assert sorted(exchanges) == [False, False, True, True]


@pytest.mark.long
@on_devices
def test_a_step_gathers_no_scores_and_no_gradient_of_all_heads(target):
    balance = Balance(0.5, sequence_alpha=1e-2, switch_alpha=1e-2, rule="quantile")
    sizes = dict(num_dense_layers=0, mtp_depth=0, num_experts=64, num_groups=1, kv_latent_dim=6)
    cfg = replace(CFG, balance=balance, max_positions=1024, **sizes)
    run = run_of(cfg, replace(FSDP, expert_comm="all_to_all"))
    run = replace(run, data=replace(run.data, seq_len=1024))
    mesh = sharding.make_mesh(2, 4) if target == "cpu" else mesh_of(target, data=2, expert=4)
    with as_libraries_do():
        cost = train_cost(run, mesh, target=None if target == "cpu" else target)
    sent = [c for c in cost.sent.collectives if "expert" in c.axes and c.kind == "all-gather"]
    # of two rows on a device, in float32 but on TPUs; scores have 64 numbers, all heads' keys 32
    latents = 2 * 1024 * (cfg.kv_latent_dim + cfg.rope_head_dim) * 4
    assert latents / 2 <= max(c.nbytes for c in sent) < 2 * latents


def test_what_cannot_be_sharded_is_refused():
    mesh, run = sharding.make_mesh(1, 8), run_of()
    sharding.check_run(mesh, replace(run, data=replace(run.data, batch_size=1)))
    chats = replace(run.data, format="chat")
    for wrong, why in (
        (replace(run, data=replace(run.data, seq_len=20)), "seq_len=20 .* by expert=8 of mesh"),
        (run_of(replace(CFG, num_heads=4)), "num_heads=4 .* by expert × tensor=8 of mesh"),
        (run_of(replace(CFG, **INDEXED)), "attention='dsa' needs complete rows"),
        (run_of(replace(CFG, capacity_factor=1.5)), "capacity_factor=1.5 needs complete rows"),
        (replace(run, grpo=Grpo(group=2), data=chats), "grpo.group=2 needs complete rows"),
    ):
        with refused(f"^{why}"):
            sharding.check_run(mesh, wrong)
    with refused("^batch_size/microbatches=4 rows"):
        sharding.check_run(sharding.make_mesh(8), run)
    with refused("^layout.length='expert' shards no cache, and mesh data=1"):
        check_decode(CFG, run.execution, mesh, 8, 16)


class Own(MLA):
    """An attention of one's own, whose heads may see one another."""

    def attend_to_rows(self, q, ctx):
        return super().attend_to_rows(q, ctx)


def test_an_attention_that_cannot_be_split_is_refused():
    execution = Execution(layout=LENGTH)
    x = jnp.ones((1, 8, CFG.dim))
    ctx = make_context(CFG, jnp.zeros((1, 8), jnp.int32), how=how_of(execution))
    decoding = ctx._replace(how=replace(ctx.how, mode="decode"))
    attend = by_layout(lambda model, kind, ctx: kind(CFG, rngs=nnx.Rngs(0)).attend(x, ctx))
    for kind, asked, sentence in (
        (Own, ctx, "attention='mla' needs complete rows on a device"),
        (MLA, decoding, "layout.length='expert' shards no cache"),
    ):
        with jax.set_mesh(sharding.make_mesh(1, 8)), refused(f"^{sentence}"):
            attend(SimpleNamespace(execution=execution), kind, asked)
