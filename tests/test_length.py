"""Rows whose length a mesh shards: what it sends, and what is refused; test_mesh compares steps."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from models import INDEXED, small
from runs import MODEL, make_run, refused
from test_compiled import GPU8, as_libraries_do, mesh_of

from dsv3_jax.config import Balance, Execution, Grpo, Layout
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.length import by_layout
from dsv3_jax.model.attention import MLA
from dsv3_jax.model.context import how_of, make_context
from dsv3_jax.planning.cost import check_decode, train_cost

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


def sent_by(run, target, **sizes):
    """The collectives of a training step on eight devices."""
    mesh = sharding.make_mesh(**sizes) if target == "cpu" else mesh_of(target, **sizes)
    with as_libraries_do():
        return train_cost(run, mesh, target=None if target == "cpu" else target).sent.collectives


@pytest.mark.long
@on_devices
def test_a_layer_gathers_latents_alone(target):
    """One gather of latents, and two all-to-alls of heads in each direction, in bfloat16.

    Each device computes its heads' part of the gradients of w_uk and w_uv, which are gathered too,
    in float32.
    """
    cfg = small(
        dim=256, num_heads=HEADS, nope_head_dim=128, rope_head_dim=64, v_head_dim=128,
        kv_latent_dim=512, q_latent_dim=None, num_layers=1, max_positions=4096,
    )  # fmt: skip
    run = replace(run_of(cfg), execution=Execution(compute_dtype="bfloat16", layout=LENGTH))
    run = replace(run, data=replace(run.data, batch_size=1, seq_len=LENGTH_OF_ROW))
    sent = sent_by(run, target, expert=8)
    latents, *gradients = sorted(c.nbytes for c in sent if c.kind == "all-gather")
    assert latents == LENGTH_OF_ROW * LATENT * 2 and set(gradients) == {HEADS * 128 * 512 * 4}
    exchanged = [c.nbytes for c in sent if c.kind == "all-to-all"]
    of_a_head = LENGTH_OF_ROW * 2  # a device has two heads
    assert sorted(exchanged) == [2 * of_a_head * width for width in (128, 128, 192, 192)]


@pytest.mark.long
@on_devices
def test_a_step_gathers_no_scores_and_no_gradient_of_all_heads(target):
    balance = Balance(0.5, sequence_alpha=1e-2, switch_alpha=1e-2, rule="quantile")
    sizes = dict(num_dense_layers=0, mtp_depth=0, num_experts=64, num_groups=1, kv_latent_dim=6)
    cfg = replace(CFG, balance=balance, max_positions=1024, **sizes)
    run = run_of(cfg, replace(FSDP, expert_comm="all_to_all"))
    run = replace(run, data=replace(run.data, seq_len=1024))
    sent = sent_by(run, target, data=2, expert=4)
    sent = [c for c in sent if "expert" in c.axes and c.kind == "all-gather"]
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
