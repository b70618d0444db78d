"""Attention's kernels for TPUs and GPUs: which one runs, and why. test_check.py compares splash."""

import re
from importlib import metadata
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest
from runs import refused

from dsv3_jax.config import Execution
from dsv3_jax.kernels import table
from dsv3_jax.kernels.choose import Kernels, Target, prepare
from dsv3_jax.kernels.gpu import attention as gpu_attention
from dsv3_jax.kernels.gpu import tokamax_library
from dsv3_jax.kernels.tpu import attention as tpu_attention
from dsv3_jax.mesh import sharding
from dsv3_jax.ops.attention import RESULTS

# splash attention, on TPUs


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
    """Blocks have sizes that the kernel takes, with little padding."""
    for length in (1, 128, 640, 641, 800, 1024, 1025, 1700, 4096, 5000, 100_000):
        block, at_a_time = tpu_attention.block_sizes(length)
        assert block % at_a_time == at_a_time % 128 == 0 and block <= tpu_attention.LARGEST_BLOCK
        assert length + -length % block < 1.25 * length + 256


# tokamax and cuDNN, on NVIDIA GPUs


def test_why_a_library_is_not_in_use(monkeypatch):
    fails = Mock(side_effect=ModuleNotFoundError("no xprof"))
    monkeypatch.setattr(tokamax_library, "flash_attention", fails)
    for version, why in (
        ("0.0.12", "tokamax 0.0.12 is not supported"),
        ("0.0.17", "(ModuleNotFoundError: no xprof)"),
    ):
        monkeypatch.setattr(metadata, "version", Mock(return_value=version))
        said = tokamax_library.why_not(Target("cuda", chip="9.0"))
        assert said.endswith(f"{why}: pip install tokamax==0.0.17")
    monkeypatch.setattr(tokamax_library, "flash_attention", Mock())
    assert tokamax_library.why_not(Target("cuda", chip="9.0")) == ""
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
