"""The door: which implementation of an op runs where, what is refused, and what is printed."""

from itertools import product

import jax.numpy as jnp
import pytest
from runs import refused

from dsv3_jax.config import Execution
from dsv3_jax.kernels import table
from dsv3_jax.kernels.choose import Kernels, Target, prepare
from dsv3_jax.kernels.cpu import library
from dsv3_jax.kernels.table import TABLE
from dsv3_jax.mesh import sharding
from dsv3_jax.ops import dispatch
from dsv3_jax.ops.cached_attention import Stored

X, W = jnp.ones((8, 4)), jnp.ones((4, 4))
STACK = jnp.ones((3, 4, 5))


def picked(kernels, op, *arrays, **settings):
    return kernels.pick(op, *arrays, **settings).name


def experts(kernels, x, w, rows=8, op="grouped_swiglu"):
    """The implementation for that many rows of 2 choices each."""
    ids = jnp.zeros((rows, 2), jnp.int32)
    return picked(kernels, op, x, ids, jnp.ones(ids.shape), w, w, w.swapaxes(1, 2))


def test_the_last_row_of_every_op_serves_everything():
    for op, platform, precision in product(TABLE, table.PLATFORMS, ("none", "fp8", "mxfp8")):
        last = Target(platform, "xla", precision=precision).rows(op)[-1]
        assert not any((last.dtypes, last.one_device, last.fits, last.why_not)), op


def test_cpp_runs_float32_on_one_device_of_a_cpu():
    for platform in ("cuda", "rocm", "tpu"):
        assert "cpu" not in Kernels(Target(platform)).chosen().values()
    kernels, in_bfloat16 = Kernels(Target("cpu")), jnp.bfloat16
    assert experts(kernels, X, STACK) == kernels.chosen()["grouped_swiglu"] == "cpu"
    assert experts(Kernels(Target("cpu", "xla")), X, STACK) == "blocks"
    assert kernels.chosen("bfloat16")["grouped_swiglu"] == "blocks"
    assert experts(kernels, X.astype(in_bfloat16), STACK) == "blocks"
    assert experts(kernels, X, STACK.astype(in_bfloat16)) == "blocks"
    assert kernels.chosen("bfloat16")["optimizer"] == "cpu"  # its arrays are float32
    for devices, name in ((2, "blocks"), (1, "cpu")):
        with sharding.use_mesh(sharding.make_mesh(data=devices)):
            assert experts(kernels, X, STACK) == name
        assert kernels.chosen(devices=devices)["grouped_swiglu"] == name
    for dtype, name in ((jnp.int8, "cpu"), (jnp.float16, "blocks")):
        stored = Stored(jnp.ones((1, 1, 8, 4), dtype), None)
        assert picked(kernels, "cached_attention", [X], [stored], stored, X, scale=1.0) == name


def test_who_multiplies_a_few_rows(monkeypatch):
    kernels = Kernels(Target("cpu"))

    def by_whom(rows, w=W):
        return picked(kernels, "product", jnp.ones((rows, 4), w.dtype), w)

    assert by_whom(2) == "cpu" and by_whom(table.SMALL_BATCH) == "cpu"
    assert by_whom(table.SMALL_BATCH + 1) == "xla" and by_whom(2, W.astype(jnp.bfloat16)) == "xla"
    assert by_whom(1) == "xla"  # a small weight
    monkeypatch.setattr(table, "LARGE_WEIGHT", W.nbytes)
    assert by_whom(1) == "cpu"
    heads = jnp.ones((3, 2, 4))  # 3 rows of 2 heads
    assert picked(kernels, "product", heads, jnp.ones((2, 4, 5)), axes=2) == "cpu"
    for size, name in ((table.LARGE_UPDATE - 1, "xla"), (table.LARGE_UPDATE, "cpu")):
        assert picked(kernels, "optimizer", *4 * [jnp.ones(size)]) == name


def test_a_name_forces_an_op_or_all_that_have_it():
    for kernels, name, attention in (
        ("dense", "dense", "cpu"),
        ("xla,grouped_swiglu=dense", "dense", "xla"),
    ):
        chosen = Kernels(Target("cpu", kernels)).chosen()
        assert (chosen["grouped_swiglu"], chosen["causal_attention"]) == (name, attention)


REFUSED = [
    ("cuda", Execution(kernels="cpu"), "'cpu' is not available on cuda in precision='none'"),
    ("tpu", Execution(kernels="grouped_swiglu=blocks"), "'grouped_swiglu=blocks' is not available"),
    ("cpu", Execution("bfloat16", kernels="cpu"), "'cpu' does not serve causal_attention in bfl"),
    ("cpu", Execution(kernels="magic"), "'magic' is not one of auto, "),
    ("cpu", Execution(kernels="optimizer=dense"), "optimizer=dense: 'dense' is not one of cpu, "),
]


def test_what_a_target_does_not_have_is_refused():
    for platform, execution, sentence in REFUSED:
        with refused(f"^kernels={sentence}"):
            prepare(execution, platform=platform)
    with refused("^platform='abacus' is not one of cpu, cuda, rocm, tpu"):
        Target("abacus")
    with refused("kernels='cpu' does not serve grouped_swiglu in bfloat16 with devices=1"):
        experts(Kernels(Target("cpu", "cpu")), X.astype(jnp.bfloat16), STACK)
    for kernels in ("", "a b", "cpu,xla", "a=b=c"):
        with refused("kernels="):
            Execution(kernels=kernels)


@pytest.mark.parametrize(
    "platform, chip, dtype, training, few, many",
    [
        ("cuda", "9.0", "bfloat16", "mosaic", "by_row", "mosaic"),
        ("cuda", "9.0", "float32", "row_blocks", "by_row", "row_blocks"),
        ("tpu", "TPU v5p", "bfloat16", "megablox", "ragged_dot", "ragged_dot"),
        ("tpu", "TPU v5p", "float32", "ragged_dot", "ragged_dot", "ragged_dot"),
        ("cpu", "", "bfloat16", "blocks", "xla", "xla"),
    ],
)
def test_who_multiplies_experts_on_each_chip(
    monkeypatch, platform, chip, dtype, training, few, many
):
    """No row multiplies all rows with all experts; accelerators' loops have known lengths."""
    kernels = prepare(Execution(compute_dtype=dtype), platform=platform, chip=chip)
    x, stack = jnp.ones((8, 128), dtype), jnp.ones((4, 128, 256))
    assert experts(kernels, x, stack) == training == kernels.chosen(dtype)["grouped_swiglu"]
    assert [experts(kernels, x, stack, rows, "decode_experts") for rows in (8, 9)] == [few, many]
    fallback = {"cuda": "row_blocks", "tpu": "ragged_dot", "cpu": "blocks"}[platform]
    assert experts(kernels, x, jnp.ones((4, 128, 100))) == fallback  # a width that no tile divides
    stored = Stored(jnp.ones((1, 1, 513, 4), dtype), None)
    attends = picked(kernels, "cached_attention", [x], [stored], stored, x)
    assert (attends == "blocks") == (platform != "cuda")
    monkeypatch.setattr(table, "LARGE_EXPERTS", 0)  # by_row would read each once for each row
    large = "mosaic" if training == "mosaic" else few
    assert experts(kernels, x, stack, 8, "decode_experts") == large
    if training == "megablox":  # it is for one device
        assert kernels.chosen(dtype, devices=2)["grouped_swiglu"] == "ragged_dot"
        with sharding.use_mesh(sharding.make_mesh(data=2)):
            assert experts(kernels, x, stack) == "ragged_dot"


def test_a_row_that_is_added_runs_if_it_is_named(monkeypatch):
    monkeypatch.setitem(TABLE, "grouped_swiglu", TABLE["grouped_swiglu"])
    table.add("grouped_swiglu", table.Implementation("mine", dispatch.dense_swiglu))
    assert experts(Kernels(Target("cpu", "grouped_swiglu=mine")), X, STACK) == "mine"
    assert experts(Kernels(Target("cpu")), X, STACK) == "cpu"


def test_without_a_compiler_xla_runs_and_the_line_says_so(monkeypatch):
    assert Kernels(Target("cpu")).describe().startswith("kernels for cpu: cpu, xla")
    monkeypatch.setattr(library, "why_not", lambda: "there is no C++ compiler (c++, g++, clang++)")
    kernels = prepare()
    assert kernels.chosen()["grouped_swiglu"] == experts(kernels, X, STACK) == "blocks"
    line = "kernels for cpu: xla, blocks, flat_rows; without cpu: see `dsv3 info tiny --kernels`"
    assert kernels.describe() == line
    with refused("kernels='cpu' is not available here: there is no C\\+\\+ compiler"):
        prepare(Execution(kernels="cpu"))
