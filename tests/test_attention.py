"""Attention: blocks and C++ equal the full score matrix, MLA's forms each other, YaRN the page."""

import re
from dataclasses import replace
from functools import partial
from importlib import metadata
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from models import needs_cpp, scratch_bytes, small, value_and_gradients
from runs import assert_bitwise, assert_near, refused

import dsv3_jax as ds
from dsv3_jax import reference
from dsv3_jax.config import Execution, Yarn
from dsv3_jax.kernels import table
from dsv3_jax.kernels.choose import Kernels, Target, prepare
from dsv3_jax.kernels.cpu import attention as cpu_attention
from dsv3_jax.kernels.gpu import attention as gpu_attention
from dsv3_jax.kernels.gpu import tokamax_library
from dsv3_jax.kernels.tpu import attention as tpu_attention
from dsv3_jax.mesh import sharding
from dsv3_jax.model.cache import Cache, empty_cache
from dsv3_jax.model.context import How, from_zero, make_context
from dsv3_jax.model.sparse import DSA
from dsv3_jax.ops import rope
from dsv3_jax.ops.attention import RESULTS, causal_attention
from dsv3_jax.ops.cached_attention import Stored, cached_attention


def full_scores(q, k, v, mask):
    """Each key-value head serves the query heads after one another."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return oracles.attention_jnp(q, k, v, mask, scale=0.4)


IN_BLOCKS = partial(causal_attention, block=8), np.float64, 1e-9
# In float32, of unit roundoff 6e-8; the oracle is in float64. Blocks have 64 queries, 256 keys.
IN_CPP = cpu_attention.causal_attention, np.float32, 1e-5


CASES = [  # length, heads, key-value heads, widths of keys and of values
    pytest.param(IN_BLOCKS, (5, 4, 4, 6, 3), id="below a block"),
    pytest.param(IN_BLOCKS, (23, 4, 2, 6, 3), id="heads in groups"),
    pytest.param(IN_CPP, (1, 3, 3, 6, 3), id="cpu, one token", marks=needs_cpp),
    pytest.param(IN_CPP, (257, 3, 3, 21, 70), id="cpu, several blocks", marks=needs_cpp),
]


@pytest.mark.parametrize("how, sizes", CASES)
def test_attention_and_its_gradients_equal_the_full_score_matrix(x64, rng, how, sizes):
    (attend, dtype, atol), (length, heads, groups, key, value) = how, sizes
    shapes = ((heads, key), (groups, key), (groups, value), (heads, value))
    q, k, v, weight = (rng.standard_normal((2, length, *shape)).astype(dtype) for shape in shapes)
    # a few documents a row, some with one token, then padding
    ids = np.cumsum(rng.random((2, length)) < 4 / length, axis=1, dtype=np.int32) + 1
    ids[:, length - length // 8 :] = 0
    real = ids > 0
    weight = np.where(real[..., None, None], weight, 0)  # the output at padding is not defined
    ours = partial(attend, scale=0.4, segment_ids=jnp.asarray(ids))
    out, grads = value_and_gradients(ours, weight, q, k, v)
    wide = [x.astype(np.float64) for x in (weight, q, k, v)]
    mask = oracles.causal_mask(ids)
    expected, expected_grads = value_and_gradients(full_scores, *wide, mask)
    assert out.dtype == dtype and np.isfinite(out).all()
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=atol)
    for name, g, e in zip("qkv", grads, expected_grads, strict=True):
        limit = atol * (1 + np.abs(e).max())
        np.testing.assert_allclose(g, e, atol=limit, err_msg=f"gradient of {name}")


FORMS = [
    pytest.param(partial(causal_attention, block=64), id="blocks"),
    pytest.param(cpu_attention.causal_attention, id="cpu", marks=needs_cpp),
]


@pytest.mark.parametrize("attend", FORMS)
def test_large_scores_stay_finite_and_repeat(rng, attend):
    """exp of scores around 1e4 overflows, so every block must subtract the maximum."""
    shapes = [(1, 530, 2, width) for width in (24, 24, 16)]
    q, k, v = (100 * rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    loss = lambda q, k, v: attend(q, k, v, scale=1.0).sum()  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    first = jax.tree.leaves(run(q, k, v))
    assert all(np.isfinite(x).all() for x in first)
    for _ in range(5):
        assert_bitwise(jax.tree.leaves(run(q, k, v)), first)


def test_gradient_memory_grows_with_length_not_its_square():
    """Compiled, not run: four times the length needs 4 times the scratch memory; T^2 needs 16."""

    def scratch(length):
        def loss(q, k, v):
            return causal_attention(q, k, v, scale=1.0, segment_ids=segments, block=128).sum()

        segments = jnp.ones((1, length), jnp.int32)
        shapes = [(1, length, 1, width) for width in (20, 20, 8)]
        return scratch_bytes(jax.grad(loss, argnums=range(3)), *shapes)

    one, four = scratch(1024), scratch(4096)
    assert four < 6 * one and four < 4096 * 4096 * 4 / 4  # a quarter of one score matrix


V3_SCALE = 0.1352337788608801  # in bfloat16 it is 0.134766: 0.35 % less


def test_attention_in_bfloat16_is_not_biased(rng):
    """One-hot values of two keys give the difference of their scores, the log of the odds.

    Rounding a query's number changes it by about 2^-9/sqrt(3) of itself, and the mean of all scores
    by far less. A rounded scale would be seven times the bound. Each query sees two tokens, so odds
    of every size occur.
    """
    rows, width = 4096, 64
    q, k = (rng.standard_normal((rows, n, 1, width)).astype(jnp.bfloat16) for n in (1, 2))
    v = np.broadcast_to(np.eye(2, dtype=np.float32)[None, :, None], (rows, 2, 1, 2))
    exact = V3_SCALE * np.einsum("bthk,bshk->bs", q.astype(np.float64), k.astype(np.float64))

    @jax.jit
    def both(q, k, v):
        keys, values = (Stored(x.astype(q.dtype).swapaxes(1, 2), None) for x in (k, v))
        last = jnp.ones((rows, 1), jnp.int32)
        cached = cached_attention([q], [keys], values, last, scale=V3_SCALE)
        causal = causal_attention(jnp.concatenate([q, q], axis=1), k, v, scale=V3_SCALE)
        return causal[:, 1, 0], cached[:, 0, 0]

    for out, bound in zip(both(q, k, v), (1e-4, 5e-4), strict=True):
        out = np.asarray(out).astype(np.float64)
        seen = (out > 0.02).all(axis=1)  # a small weight has lost its digits
        odds, exact_odds = np.log(out[seen, 0] / out[seen, 1]), exact[seen, 0] - exact[seen, 1]
        bias = (odds * exact_odds).sum() / (exact_odds**2).sum() - 1
        assert abs(bias) < bound, bias


SPARSE = small(attention="dsa", index_heads=2, index_dim=9, index_topk=4)
MODULES = {"mla": small(), "dsa": SPARSE, "dsa of all tokens": replace(SPARSE, index_topk=12)}


@pytest.mark.parametrize("name", MODULES)
def test_expanded_equals_absorbed(x64, rng, name):
    """Over complete rows, and over both caches, whose free slots hold garbage.

    A choice of all tokens is attention without one.
    """
    cfg = MODULES[name]
    kind = ds.MLA if name == "mla" else DSA
    how = How(Kernels(Target("cuda", "xla")))  # plain XLA, which runs in float64 too
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(cfg, rngs=nnx.Rngs(0))))
    mla = nnx.graphdef(nnx.eval_shape(lambda: ds.MLA(cfg, rngs=nnx.Rngs(0))))
    shapes = state, jnp.zeros((2, 11, cfg.dim))
    state, x = jax.tree.map(lambda w: rng.standard_normal(w.shape), shapes)

    @jax.jit
    def every(state, x):
        module, positions = nnx.merge(graphdef, state), from_zero(2, 11)
        kinds = [kind.cache_rows(cfg, rows) for rows in ("latent", "expanded")]
        caches = [empty_cache(rows, [1], 2, 16, jnp.float64) for rows in kinds]
        caches = [Cache(jax.tree.map(lambda rows: rows + 1e3, c.parts), c.lengths) for c in caches]
        contexts = [make_context(cfg, positions, how=how, cache=c) for c in (None, *caches)]
        outs = [module.attend(x, ctx)[0] for ctx in contexts]
        others = nnx.split_state(state, lambda path, _: "indexer" not in path, ...)[0]
        return outs, nnx.merge(mla, others).attend(x, contexts[0])[0]

    (alone, *cached), of_mla = every(state, x)
    assert alone.dtype == jnp.float64 and np.abs(alone).max() > 1
    assert (np.abs(alone - of_mla).max() < 1e-9) == (name != "dsa")
    assert_near(cached, [alone, alone], 1e-9)


# RoPE and YaRN: the page's frequencies and the released models' constants

V3 = Yarn(factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0)
V2_LITE = Yarn(factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.707)


ANGLES = [
    (64, 1e4, V3),
    (32, 5e5, Yarn(factor=4.0, original_max_positions=8192)),
    (8, 1e4, Yarn(factor=8.0, original_max_positions=64)),  # low is clamped to 0
    (16, 10.0, Yarn(factor=3.0, original_max_positions=1000)),  # high is clamped to R-1
]


@pytest.mark.parametrize("rope_dim, theta, yarn", ANGLES)
def test_frequencies_follow_yarn(rope_dim, theta, yarn):
    cfg = small(rope_head_dim=rope_dim, rope_theta=theta, yarn=yarn, max_positions=64)
    freqs = np.asarray(rope.frequencies(rope_dim, theta, yarn))
    assert freqs.dtype == np.float32
    # a few float32 roundings
    np.testing.assert_allclose(freqs, reference.rope_frequencies(cfg), rtol=1e-6)
    if yarn is V3:  # the ramp is 0 up to pair 10, and 1 from pair 23
        ratio = freqs * theta ** (np.arange(32) / 32)
        np.testing.assert_allclose(ratio[[0, 10, 23, 31]], [1, 1, 1 / 40, 1 / 40], rtol=1e-5)


def test_softmax_scale_of_released_models():
    for yarn, scale in ((V3, 0.135234), (V2_LITE, 0.114721), (Yarn(), 192**-0.5)):
        assert rope.softmax_scale(192, yarn) == pytest.approx(scale, abs=5e-7)


# Kernels of accelerators: which one runs, and why. test_check.py compares splash.


@pytest.mark.parametrize("sizes, passes", [({}, 2), ({"data": 2, "tensor": 2}, 1)])
def test_splash_runs_forward_once_if_its_results_are_kept(sizes, passes):
    """Traced, not run: `jax.checkpoint` keeps the name RESULTS, or runs the kernel again."""
    heads, keep = ("batch", None, "heads", None), passes == 1
    q, segment_ids = jnp.ones((2, 128, 2, 64)), jnp.ones((2, 128), jnp.int32)

    def attend(q, k, v, segment_ids):
        how = dict(scale=1.0, segment_ids=segment_ids, interpret=True)
        return {"out": tpu_attention.causal_attention(q, k, v, **how)}

    def layer(x):
        arrays = dict.fromkeys("qkv", (x, heads))
        arrays |= {"segment_ids": (segment_ids, ("batch", None))}
        out = sharding.on_shards(attend, arrays, like={"out": "q"}, has_kernel=True)["out"]
        return jnp.sin(out)

    policy = jax.checkpoint_policies.save_only_these_names(RESULTS) if keep else None
    loss = jax.value_and_grad(lambda q: jax.checkpoint(layer, policy=policy)(q).sum())
    with sharding.use_mesh(sharding.make_mesh(**sizes) if sizes else None):
        program = str(jax.make_jaxpr(jax.jit(loss))(q))
    assert len(re.findall(r"name=splash_mha_fwd", program)) == passes


def test_blocks_serve_every_length():
    for length in (1, 128, 640, 641, 800, 1024, 1025, 1700, 4096, 5000, 100_000):
        block, at_a_time = tpu_attention.block_sizes(length)
        assert block % at_a_time == at_a_time % 128 == 0 and block <= tpu_attention.LARGEST_BLOCK
        assert length + -length % block < 1.25 * length + 256


# tokamax and cuDNN, on NVIDIA GPUs


def test_why_a_library_is_not_in_use(monkeypatch):
    monkeypatch.setattr(tokamax_library, "flash_attention", Mock())
    unsupported = "tokamax 0.0.12 is not supported: pip install"
    for version, wrong in (("0.0.12", unsupported), ("0.0.17", "")):
        monkeypatch.setattr(metadata, "version", Mock(return_value=version))
        said = tokamax_library.why_not(Target("cuda", chip="9.0"))
        assert wrong in said and bool(said) == bool(wrong)
    why = gpu_attention.why_not_cudnn(Target("cuda", chip="8.0"))
    assert why.endswith("9.0 or newer, and the chip has 8.0")
    with refused("kernels='causal_attention=tokamax' is not available here: its kernels need"):
        prepare(Execution(kernels="causal_attention=tokamax"), platform="cuda", chip="8.0")
    line = prepare(platform="cuda", chip="8.0").describe("bfloat16")
    assert "; without tokamax, cudnn, mosaic, mosaic_but_dw: see `dsv3 info" in line


# The table


def picked(platform, length, widths, dtype=jnp.bfloat16, packed=True, kernels="auto"):
    q, v = (jnp.zeros((1, length, 1, width), dtype) for width in widths)
    segments = jnp.ones((1, length), jnp.int32) if packed else None
    kernels = Kernels(Target(platform, kernels, "9.0"))
    return kernels.pick("causal_attention", q, q, v, scale=1.0, segment_ids=segments).name


LARGE = (192, 128)
CUDNN = "causal_attention=cudnn"
ATTENDS = [  # platform, length, widths, others, who
    ("tpu", 1000, LARGE, {}, "splash"),
    ("tpu", 1000, LARGE, {"dtype": jnp.float32}, "splash"),
    ("tpu", 1000, LARGE, {"kernels": "xla"}, "large_blocks"),  # not compiled by XLA
    ("cuda", 1000, LARGE, {}, "tokamax"),
    ("cuda", 1000, LARGE, {"dtype": jnp.float32}, "large_blocks"),
    ("cuda", 1000, LARGE, {"packed": False, "kernels": CUDNN}, "cudnn"),
    ("cuda", 1000, LARGE, {"kernels": CUDNN}, "tokamax"),  # rows of documents
    ("rocm", 1000, LARGE, {}, "large_blocks"),
    *((platform, 1000, (48, 32), {}, "large_blocks") for platform in ("cuda", "tpu")),  # too small
    *((platform, 100, LARGE, {}, "large_blocks") for platform in ("cuda", "tpu")),
]


def test_who_attends():
    for platform, length, widths, others, who in ATTENDS:
        assert picked(platform, length, widths, **others) == who, (platform, widths, others)
    assert table.TABLE["causal_attention"][-1].name == "xla"
