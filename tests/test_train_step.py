"""One step: any parts give one gradient, the bias follows the load, non-finite are skipped."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import INDEXED, flat
from runs import MODEL, STEPS, assert_bitwise, assert_near, documents, fresh_state, make_run

from dsv3_jax.config import Balance, DataConfig, Grpo, OptimConfig
from dsv3_jax.kernels import choose
from dsv3_jax.model import moe
from dsv3_jax.training import step as train_step
from dsv3_jax.training.metrics import over_layers
from dsv3_jax.training.state import Job
from dsv3_jax.training.step import first_bad_tensor, make_step

B, T = 4, 16
# eps: AdamW then does not turn the rounding of gradients near 0 into whole steps of either sign
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=2, eps=0.1, bias_freeze=0.5)
RUN = make_run("nowhere", optim=OPTIM)
# Rows of one to four documents; no two of four parts weigh alike.
BATCH = documents(B, T, 4, padding=[(1, 3), (3, 12)])
LAYER = replace(MODEL, num_layers=1, mtp_depth=0, balance=Balance(sequence_alpha=0.0))
DENSE_LAYER = replace(LAYER, num_dense_layers=1)
CHATS = DataConfig(seq_len=T, batch_size=B, format="chat")
LIGHT = replace(RUN, model=DENSE_LAYER)  # compiles fastest
OF_ALL = replace(LAYER, mtp_depth=1, balance=Balance(z_alpha=1.0, sequence_alpha=100.0))
OF_INDEXERS = replace(DENSE_LAYER, **INDEXED)
OF_HEAD = replace(DENSE_LAYER, mtp_depth=1, mtp_kind="eagle")
TERMS = {  # each run's gradient is mostly that of the named terms of the loss
    "answers, heads and balance": {"model": OF_ALL, "data": CHATS, "grpo": Grpo(group=2, kl=0.5)},
    "indexers": {"model": OF_INDEXERS, "start": "nowhere", "indexer_stage": "warm"},
    "heads alone": {"model": OF_HEAD, "trunk": "nowhere", "head_loss": "kl"},
}


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def gradient(run, batch):
    """(The gradient by what trains, the losses) of a batch."""
    job, state = Job(run), fresh_state(run)
    args = *train_step.split_trainable(run, state.params), state, batch
    return jax.jit(partial(train_step._gradients, job, train_step.graph_of(job)))(*args)


@pytest.mark.long
@pytest.mark.parametrize("term", TERMS)
def test_the_gradient_of_each_term_is_that_of_the_batch_in_any_parts(monkeypatch, term):
    """Four parts of 16, 13, 16 and 4 tokens; indexers' and ties' metrics are means over tokens."""
    monkeypatch.setattr(moe, "NEAR", 0.1)  # some tokens are near ties
    rng, batch = np.random.default_rng(3), BATCH
    for name in ("old_logprobs", "start_logprobs", "advantages") * ("grpo" in TERMS[term]):
        batch = batch | {name: jnp.asarray(rng.normal(-5, 1, (B, T)), jnp.float32)}

    run = replace(RUN, **TERMS[term])
    in_parts = replace(run, optim=replace(run.optim, microbatches=4))
    (whole, want), (pieces, got) = gradient(run, batch), gradient(in_parts, batch)
    assert max(np.abs(x).max() for x in jax.tree.leaves(whole)) > 1e-3
    assert_near(pieces, whole)
    np.testing.assert_array_equal(got.load, want.load)
    np.testing.assert_allclose(got.total, want.total, rtol=1e-5)
    found = over_layers(got.metrics)
    for name, x in over_layers(want.metrics).items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "clip"),
    [({}, 0.01), pytest.param(INDEXED, None, marks=pytest.mark.rare)],
    ids=["mla", "dsa"],
)
def test_rows_of_one_document_are_attended_to_without_segments(monkeypatch, changes, clip):
    """cuDNN's kernel takes no segments. Padding after a document changes no number."""
    given, pick = [], choose.Kernels.pick

    def record(self, op, *args, **settings):
        if op in ("causal_attention", "index_choose"):
            by_place = args[4] if op == "index_choose" and len(args) > 4 else None
            given.append(settings.get("segment_ids", by_place))
        return pick(self, op, *args, **settings)

    monkeypatch.setattr(choose.Kernels, "pick", record)
    model = replace(OF_HEAD, **changes)
    run = replace(RUN, model=model, optim=replace(RUN.optim, qk_clip=clip))
    joined = replace(run, data=replace(run.data, separate_documents=False))
    batch = documents(B, T, 1, padding=[(1, T - 9), (3, T - 3)])
    want = gradient(run, batch)
    assert all(ids is not None for ids in given)
    given.clear()
    got = gradient(joined, batch)
    assert given and all(ids is None for ids in given)
    assert_bitwise(got, want)


def test_the_bias_follows_the_load_of_the_batch():
    """b += γ·sign(mean load − load), exactly, in each sparse layer and in the MTP block.

    From half of the run on, which is `bias_freeze`, it stays.
    """
    step, last = make_step(Job(RUN)), STEPS // 2 - 1
    before, state = flat(fresh_state(RUN).bias), fresh_state(RUN, step=last)
    new, metrics = step(state, BATCH)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))  # donated
    after, load = flat(copied(new.bias)), np.asarray(metrics["load"])
    of_trunk, of_head = ("sparse", "moe", "bias"), ("mtp", 0, "block", "moe", "bias")
    for path, rows in ((of_trunk, load[:2]), (of_head, load[2])):
        moved = np.float32(1e-2) * np.sign(rows.mean(-1, keepdims=True) - rows)
        assert {-1, 1} <= set(np.sign(moved).ravel())
        np.testing.assert_array_equal(after[path], before.pop(path) + moved)
    assert not before
    np.testing.assert_array_equal(metrics["bias"], [*after[of_trunk], after[of_head]])
    frozen, metrics = step(new, BATCH)
    assert np.ptp(metrics["load"]) > 0
    assert_bitwise(flat(frozen.bias), after)


@pytest.mark.long
def test_what_is_not_finite_stops_the_step_and_is_named():
    """A parameter; or a gradient, where parameters are finite but products of them overflow."""
    step, huge, bad = make_step(Job(LIGHT)), fresh_state(LIGHT), fresh_state(LIGHT, step=3)
    huge = replace(huge, params=jax.tree.map(lambda x: 1e17 * x, huge.params))
    w_up = bad.params["dense"]["ffn"]["w_up"]
    bad.params["dense"]["ffn"]["w_up"] = w_up.replace(w_up[...].at[0, 1, 2].set(np.nan))
    for state, name in ((bad, "parameter dense.ffn.w_up"), (huge, "gradient of ")):
        before = copied(state)
        after, metrics = step(state, BATCH)
        assert not bool(metrics["finite"])
        assert_bitwise(after, before)
        assert first_bad_tensor(Job(LIGHT), after, BATCH).startswith(name)
