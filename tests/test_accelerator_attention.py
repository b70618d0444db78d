"""Attention's kernels for TPUs and GPUs equal the op: run in interpret mode, and compiled for chips that are absent."""

import re
import sys
from functools import partial
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax.config import ConfigError, Execution
from dsv3_jax.kernels import choose
from dsv3_jax.kernels.choose import Kernels, Target, prepare
from dsv3_jax.kernels.gpu import attention as gpu_attention
from dsv3_jax.kernels.gpu import tokamax_library
from dsv3_jax.kernels.tpu import attention as tpu_attention
from dsv3_jax.mesh import sharding
from dsv3_jax.ops.attention import RESULTS, causal_attention
from dsv3_jax.planning import devices

interpreted = partial(tpu_attention.causal_attention, interpret=True)


def draw(rng, shape, dtype=jnp.float32):
    """Return q, k, v and a weight of the output for (B, T, H, G, K, V), and segment ids of a few documents a row."""
    batch, length, heads, groups, key, value = shape
    shapes = ((heads, key), (groups, key), (groups, value), (heads, value))
    arrays = [jnp.asarray(rng.standard_normal((batch, length, n, width)), dtype) for n, width in shapes]
    ids = np.cumsum(rng.random((batch, length)) < 4 / length, axis=1, dtype=np.int32) + 1
    ids[:, length - length // 8 :] = 0
    return arrays, jnp.asarray(ids)


def out_and_gradients(attention, arrays, segment_ids):
    """Return the output where there are tokens, and the gradients of its weighted sum, in float32."""
    q, k, v, weight = arrays
    real = jnp.ones(q.shape[:2], bool) if segment_ids is None else segment_ids > 0

    def loss(q, k, v):
        out = attention(q, k, v, scale=0.13, segment_ids=segment_ids).astype(jnp.float32)
        out = jnp.where(real[..., None, None], out, 0.0)  # the output at padding is not defined
        return (out * weight.astype(jnp.float32)).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x.astype(jnp.float32)) for x in (out, *grads)]


# splash attention, on TPUs


@pytest.mark.long
@pytest.mark.parametrize(
    "shape, dtype, packed, largest",
    [
        ((1, 300, 2, 2, 192, 128), jnp.float32, True, 128),  # V3's widths; three blocks, the last with padding
        ((2, 256, 4, 2, 96, 64), jnp.float32, True, 128),  # two query heads for each key head; whole blocks
        ((1, 200, 2, 1, 192, 128), jnp.bfloat16, False, 1024),  # one key head; one block
    ],
    ids=["192/128", "gqa", "mqa in bfloat16"],
)
def test_splash_and_its_gradients_equal_the_op(rng, monkeypatch, shape, dtype, packed, largest):
    """In float32 both sum in another order. In bfloat16 both round weights, outputs and gradients to 2^-8 of them."""
    monkeypatch.setattr(tpu_attention, "LARGEST_BLOCK", largest)
    arrays, segment_ids = draw(rng, shape, dtype)
    segment_ids = segment_ids if packed else None
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-6
    got = out_and_gradients(interpreted, arrays, segment_ids)
    expected = out_and_gradients(causal_attention, arrays, segment_ids)
    for name, g, e in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_allclose(g, e, atol=tolerance * np.abs(e).max(), err_msg=name)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 2}], ids=["one device", "mesh"])
@pytest.mark.parametrize("keep, runs", [(True, 1), (False, 2)])
def test_splash_runs_forward_once_if_its_results_are_kept(rng, sizes, keep, runs):
    """Traced, not run: `jax.checkpoint` keeps what has the name RESULTS, or runs the forward kernel again."""
    (q, k, v, _), segment_ids = draw(rng, (2, 128, 2, 2, 64, 64))
    heads = ("batch", None, "heads", None)

    def attend(q, k, v, segment_ids):
        return (interpreted(q, k, v, scale=1.0, segment_ids=segment_ids),)

    def layer(q):
        names, args = (heads, heads, heads, ("batch", None)), (q, k, v, segment_ids)
        return jnp.sin(sharding.shard_map_by_names(attend, names, (0,), *args, has_kernel=True)[0])

    policy = jax.checkpoint_policies.save_only_these_names(RESULTS) if keep else None
    loss = jax.value_and_grad(lambda q: jax.checkpoint(layer, policy=policy)(q).sum())
    with sharding.use_mesh(sharding.make_mesh(**sizes) if sizes else None):
        program = str(jax.make_jaxpr(jax.jit(loss))(q))
    assert len(re.findall(r"name=splash_mha_fwd", program)) == runs


def test_blocks_serve_every_length():
    """Blocks have sizes that the kernel takes, with little padding."""
    for length in (1, 128, 640, 641, 800, 1024, 1025, 1700, 4096, 5000, 100_000):
        block, at_a_time = tpu_attention.block_sizes(length)
        assert block % at_a_time == 0 and at_a_time % 128 == 0 and block <= tpu_attention.LARGEST_BLOCK
        assert length + -length % block < 1.25 * length + 256


# tokamax and cuDNN, on NVIDIA GPUs


def test_a_first_key_for_each_query_says_what_segments_say(rng):
    """tokamax's mask: keys from the first of the query's document to the query itself."""
    _, segment_ids = draw(rng, (3, 50, 1, 1, 1, 1))
    first = np.asarray(gpu_attention.first_of_segment(segment_ids))
    key = np.arange(50)
    seen = (first[:, :, None] <= key) & (key <= key[:, None])
    np.testing.assert_array_equal(seen, oracles.causal_mask(3, 50, np.asarray(segment_ids)))


def test_why_a_library_is_not_in_use(monkeypatch):
    def installed(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    for chip, python, version, end in (  # noqa: B007 - `installed` reads it
        ("", (3, 13), "0.0.17", "and the chip is not known"),
        ("8.0", (3, 13), "0.0.17", "and the chip has 8.0"),
        ("9.0", (3, 11), "0.0.17", "it needs Python 3.12 or newer"),
        ("9.0", (3, 13), None, "it is not installed: pip install tokamax==0.0.17"),
        ("9.0", (3, 13), "0.0.12", "tokamax 0.0.12 is not supported: pip install tokamax==0.0.17"),
        ("9.0", (3, 12), "0.0.17", ""),
    ):
        monkeypatch.setattr(sys, "version_info", python)
        why = tokamax_library.why_not(Target("cuda", chip=chip))
        assert why.endswith(end) and bool(why) == bool(end)
    assert gpu_attention.why_not_cudnn(Target("cuda", chip="8.0")).endswith("9.0 or newer, and the chip has 8.0")
    with pytest.raises(ConfigError, match="kernels='causal_attention=tokamax' is not available here: its kernels need"):
        prepare(Execution(kernels="causal_attention=tokamax"), platform="cuda", chip="8.0")
    line = prepare(platform="cuda", chip="8.0").describe("bfloat16")
    assert line.endswith("; without tokamax, cudnn, mosaic: see `dsv3 info tiny --kernels`")


# The table


def picked(platform, length, widths, dtype=jnp.bfloat16, packed=True, kernels="auto"):
    q, v = (jnp.zeros((1, length, 1, width), dtype) for width in widths)
    segments = jnp.ones((1, length), jnp.int32) if packed else None
    kernels = Kernels(Target(platform, kernels, "9.0"))
    return kernels.pick("causal_attention", q, q, v, scale=1.0, segment_ids=segments).name


def test_who_attends():
    assert picked("tpu", 1000, (192, 128)) == picked("tpu", 1000, (192, 128), jnp.float32) == "splash"
    assert picked("cuda", 1000, (192, 128)) == "tokamax"
    assert picked("cuda", 1000, (192, 128), jnp.float32) == "large_blocks"
    assert picked("cuda", 1000, (192, 128), packed=False, kernels="causal_attention=cudnn") == "cudnn"
    assert picked("cuda", 1000, (192, 128), kernels="causal_attention=cudnn") == "tokamax"  # rows of documents
    assert picked("rocm", 1000, (192, 128)) == "large_blocks"
    assert picked("tpu", 1000, (192, 128), kernels="xla") == "large_blocks"  # not compiled by XLA
    for platform in ("cuda", "tpu"):
        assert picked(platform, 1000, (48, 32)) == picked(platform, 100, (192, 128)) == "large_blocks"  # too small
    assert choose.TABLE["causal_attention"][-1].name == "xla"


# Compiled for chips that are not here


def compiled(target, attention, shape):
    """Compile the gradient for a target. Returns the program's text and its temporary bytes."""
    try:
        mesh = devices.target_mesh(target, {"data": 1})
    except ConfigError as error:
        pytest.skip(str(error))
    batch, length, heads, groups, key, value = shape
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((batch, length, *shape), dtype, sharding=placed)

    def loss(q, k, v, segment_ids):
        return attention(q, k, v, scale=0.1, segment_ids=segment_ids).astype(jnp.float32).sum()

    arrays = [array(jnp.bfloat16, n, width) for n, width in ((heads, key), (groups, key), (groups, value))]
    done = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays, array(jnp.int32)).compile()
    return done.as_text(), done.memory_analysis().temp_size_in_bytes


SHAPES = [(1, 1024, 4, 4, 192, 128), (1, 1100, 4, 2, 96, 64)]


def squares(text):
    """Return the arrays of a program that have two axes of about the length, as scores have."""
    return re.findall(r"\[(?:\d+,)*1[0-2]\d\d,1[0-2]\d\d\]", text)


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES, ids=["192/128", "gqa"])
@pytest.mark.parametrize("target", ["tpu:v5p:2x2x1", "tpu:v6e:2x2", "gpu:h100:1"])
def test_kernels_compile_and_keep_no_scores_in_memory(target, shape):
    """A forward and two backward kernels."""
    on_gpu = target.startswith("gpu")
    if on_gpu and (reason := tokamax_library.why_not(Target("cuda", chip="9.0"))):
        pytest.skip(reason)
    attention = gpu_attention.tokamax_attention if on_gpu else tpu_attention.causal_attention
    text, _ = compiled(target, attention, shape)
    assert not squares(text)
    if on_gpu:
        assert len(re.findall(r'custom_call_target="mosaic_gpu', text)) == 3
    for phase in ("fwd_segmented_residuals", "dq_segmented_no_residuals", "dkv_segmented_no_residuals"):
        assert on_gpu or f"splash_mha_{phase}" in text


@pytest.mark.long
def test_large_blocks_compile_for_hopper_without_a_loop():
    """So few scores are one visit; the loops over pairs of small blocks are two."""
    large = partial(prepare(platform="rocm"), "causal_attention")
    assert " while(" not in compiled("gpu:h100:1", large, SHAPES[0])[0]
    assert " while(" in compiled("gpu:h100:1", causal_attention, SHAPES[0])[0]
