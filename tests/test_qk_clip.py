"""QK-clip: the largest logits are the reference's, and a clipped head's logits are at most the threshold."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import parameters, random_model, small
from runs import fresh_state, make_run, packed_batch

import dsv3_jax as ds
from dsv3_jax import reference
from dsv3_jax.config import Execution, OptimConfig
from dsv3_jax.kernels import choose
from dsv3_jax.kernels.cpu import library
from dsv3_jax.model.context import Options, from_zero, make_context
from dsv3_jax.ops import attention
from dsv3_jax.training import qk_clip
from dsv3_jax.training.step import Job, make_step

pytestmark = pytest.mark.usefixtures("cheap")

B, T = 4, 12
# Almost no step of the optimizer, so that what moves is the clip
OPTIM = OptimConfig(learning_rate=1e-20, final_learning_rate=0.0, warmup_steps=0, weight_decay=0.0, qk_clip=1e9)
CFG = small(num_layers=2, num_dense_layers=0, mtp_depth=1, vocab_size=260, init_std=0.5)  # a stack of two, and a head
RUN = make_run("nowhere", model=CFG, optim=OPTIM)


def batch_of(rows: int = B) -> dict[str, jax.Array]:
    """Rows of documents; the first two end in padding."""
    rng = np.random.default_rng(3)
    segment_ids = np.sort(rng.integers(1, 3, (rows, T)), axis=1)
    segment_ids[:2, -4:] = 0
    return packed_batch(rng, segment_ids)


def reference_maxima(cfg, params: dict, batch, monkeypatch) -> list[np.ndarray]:
    """The largest logit of each head [H], in float64, of every attention that the reference computes, in its order."""
    found = []
    plain = reference.attend

    def attend(ctx, q, k, v):
        scores = np.einsum("bthx,bshx->bhts", reference.rotate(ctx, q), reference.rotate(ctx, k)) * q.shape[-1] ** -0.5
        seg = ctx.segment_ids
        seen = (seg[:, :, None] == seg[:, None, :]) & np.tri(seg.shape[1], dtype=bool) & (seg != 0)[:, :, None]
        found.append(np.where(seen[:, None], scores, -np.inf).max((0, 2, 3)))
        return plain(ctx, q, k, v)

    monkeypatch.setattr(reference, "attend", attend)
    batch = jax.tree.map(np.asarray, batch)
    reference.transformer(reference.Context(cfg, batch["positions"], batch["segment_ids"]), params, batch["tokens"])
    return found


def by_layer(state) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(state.params)}


# the largest logits


@pytest.mark.parametrize("name", ["cpu", "xla", "row_maxima"])
@pytest.mark.parametrize("length", [5, 150])
def test_row_maxima_are_those_of_the_scores(rng, name, length):
    """By what the softmax keeps, and by a separate product; grouped heads, documents, and lengths of part blocks."""
    if name == "cpu" and (why := library.why_not()):
        pytest.skip(why)
    q, k, v = (jnp.asarray(rng.standard_normal((2, length, h, n)), jnp.float32) for h, n in ((4, 6), (2, 6), (2, 3)))
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, length)), axis=1), jnp.int32)
    scores = np.einsum("bthx,bshx->bths", np.float64(q), np.repeat(np.float64(k), 2, axis=2)) * 0.7
    ids = np.asarray(segments)
    seen = (ids[:, :, None] == ids[:, None, :]) & np.tri(length, dtype=bool)
    want = np.where(seen[:, :, None], scores, -np.inf).max(-1)
    if name == "row_maxima":
        got = jax.jit(lambda q, k: attention.row_maxima(q, k, scale=0.7, segment_ids=segments))(q, k)
    else:
        kernels = choose.prepare(Execution(kernels=f"causal_attention={name}"))
        attend = partial(kernels, "causal_attention", scale=0.7, segment_ids=segments)
        out, got = jax.jit(partial(attend, maxima=True))(q, k, v)
        plain = jax.jit(attend)(q, k, v)
        np.testing.assert_array_equal(out, plain)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)  # float32


def test_a_kernel_that_keeps_its_maxima_to_itself_gets_a_product_beside_it(rng, monkeypatch):
    q, k, v = (jnp.asarray(rng.standard_normal((1, 9, 2, 4)), jnp.float32) for _ in range(3))
    monkeypatch.setitem(choose.TABLE, "causal_attention", choose.TABLE["causal_attention"])
    choose.add("causal_attention", choose.Implementation("mute", choose.kept_maxima(attention.causal_attention)))
    kernels = choose.Kernels(choose.Target("cpu", "causal_attention=mute"))
    want = attention.attention_and_maxima(q, k, v, scale=0.5)
    for a, b in zip(kernels("causal_attention", q, k, v, scale=0.5, maxima=True), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


# the clip


@pytest.mark.long
def test_each_head_of_each_layer_is_scaled_by_its_own_logit(monkeypatch):
    """Against the reference in float64, in stacks and in the heads' blocks; half of the heads are above."""
    want = reference_maxima(CFG, parameters(random_model(CFG)), batch_of(), monkeypatch)
    assert len(want) == CFG.num_layers + CFG.mtp_depth
    ordered = np.sort(np.ravel(want))
    threshold = float(ordered[len(ordered) // 2 - 1 :][:2].mean())  # between two heads
    run = replace(RUN, optim=replace(OPTIM, qk_clip=threshold))
    state = fresh_state(run)
    before = by_layer(state)
    new, metrics = make_step(Job(run))(state, batch_of())
    after, clipped = by_layer(new), 0
    np.testing.assert_allclose(metrics["max_logit"], np.max(want), rtol=1e-5)  # of the forward pass, before the clip
    places = [("sparse", 0), ("sparse", 1), ("mtp.0.block", ...)]
    nope = CFG.nope_head_dim
    for (block, layer), largest in zip(places, want, strict=True):
        gamma = np.where(largest > threshold, threshold / largest, 1.0)
        names = {name: f"{block}.attn.{name}" for name in ("w_uk", "w_uq")}
        old, got = ({name: tree[path][layer] for name, path in names.items()} for tree in (before, after))
        for head, g in enumerate(gamma):
            root = np.sqrt(g)
            pairs = (
                (got["w_uk"][head], old["w_uk"][head], root),
                (got["w_uq"][:, head, :nope], old["w_uq"][:, head, :nope], root),
                (got["w_uq"][:, head, nope:], old["w_uq"][:, head, nope:], g),
            )
            for a, b, factor in pairs:
                np.testing.assert_allclose(a, b * factor, rtol=1e-5, err_msg=f"{block} {layer} {head}")
                assert g < 1 or np.array_equal(a, b)
            clipped += g < 1
    assert 0 < clipped < len(want) * CFG.num_heads
    for name in before:
        if name.rpartition(".")[2] not in ("w_uk", "w_uq"):
            np.testing.assert_array_equal(after[name], before[name], name)


@pytest.mark.parametrize("compressed", [True, False])
def test_clipped_logits_are_at_most_the_threshold(rng, compressed):
    """On the same input clipped heads reach the threshold, and the others keep their logits."""
    cfg = small() if compressed else small(q_latent_dim=None)
    module = ds.MLA(replace(cfg, init_std=0.6), rngs=nnx.Rngs(1))
    x = jnp.asarray(rng.standard_normal((2, 9, cfg.dim)), jnp.float32)
    graph, state = nnx.split(module)

    @jax.jit
    def maxima(state):
        ctx = make_context(cfg, from_zero(2, 9), options=Options(watch=frozenset(["max_logit"])))
        return nnx.merge(graph, state).attend(x, ctx)[2]["max_logit"]

    before = np.asarray(maxima(state))
    threshold = float(np.sort(before)[1])  # of three heads: one is above
    params = nnx.State({"block": {"attn": state}})
    new = qk_clip.clip(params, {"block": jnp.asarray(before)}, threshold, cfg.nope_head_dim, jnp.asarray(True))
    after = np.asarray(maxima(new["block"]["attn"]))
    above = before > threshold
    assert above.sum() == 1
    np.testing.assert_allclose(after[above], threshold, rtol=1e-5)
    np.testing.assert_array_equal(after[~above], before[~above])
