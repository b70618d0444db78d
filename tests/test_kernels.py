"""The door: which implementation of an op runs where, what is refused, and what is printed."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import ConfigError, Execution
from dsv3_jax.kernels import choose
from dsv3_jax.kernels.choose import TABLE, Kernels, Target, prepare
from dsv3_jax.kernels.cpu import library
from dsv3_jax.mesh import sharding

X, W = jnp.ones((8, 4)), jnp.ones((4, 4))
STACK = jnp.ones((3, 4, 5))


def picked(kernels, op, *arrays, **settings):
    return kernels.pick(op, *arrays, **settings).name


def test_every_op_ends_with_a_row_that_always_fits():
    for op in TABLE:
        for platform in choose.PLATFORMS:
            last = Target(platform, "xla").rows(op)[-1]
            assert last.serves is choose._always and last.fits is choose._always and not last.by_hand, op


def test_platforms_do_not_share_the_cpus_kernels():
    for platform in ("cuda", "rocm", "tpu"):
        assert "cpu" not in Kernels(Target(platform), ()).chosen().values()
    assert Kernels(Target("cpu"), ()).chosen()["grouped_swiglu"] == "cpu"
    assert Kernels(Target("cpu", "xla"), ()).chosen()["grouped_swiglu"] == "blocks"
    assert Kernels(Target("cpu")).chosen()["grouped_swiglu"] == "blocks"  # prepare was not called


def test_cpp_runs_float32_on_one_device(monkeypatch):
    kernels = Kernels(Target("cpu"), ())
    assert picked(kernels, "grouped_swiglu", X, STACK) == "cpu"
    assert picked(kernels, "grouped_swiglu", X.astype(jnp.bfloat16), STACK) == "blocks"
    assert kernels.chosen("bfloat16")["grouped_swiglu"] == "blocks"
    assert kernels.chosen("bfloat16")["optimizer"] == "cpu"  # its arrays are float32
    with sharding.use_mesh(sharding.make_mesh(data=2)):
        assert picked(kernels, "grouped_swiglu", X, STACK) == "blocks"
    assert kernels.chosen("float32", devices=2)["grouped_swiglu"] == "blocks"
    with sharding.use_mesh(sharding.make_mesh(data=1)):
        assert picked(kernels, "grouped_swiglu", X, STACK) == "cpu"
    assert picked(kernels, "cached_attention", X, X.astype(jnp.int8)) == "cpu"
    assert picked(kernels, "cached_attention", X, X.astype(jnp.float16)) == "blocks"


def test_who_multiplies_a_few_rows(monkeypatch):
    """C++ multiplies few rows of float32, or one with a large weight; XLA all else."""
    kernels = Kernels(Target("cpu"), ())

    def by_whom(rows, w=W):
        return picked(kernels, "product", jnp.ones((rows, 4), w.dtype), w, axes=1)

    assert by_whom(2) == "cpu" and by_whom(choose.SMALL_BATCH) == "cpu"
    assert by_whom(choose.SMALL_BATCH + 1) == "xla" and by_whom(2, W.astype(jnp.bfloat16)) == "xla"
    assert by_whom(1) == "xla"  # a small weight
    monkeypatch.setattr(choose, "LARGE_WEIGHT", W.nbytes)
    assert by_whom(1) == "cpu"
    heads = jnp.ones((3, 2, 4))  # 3 rows of 2 heads
    assert picked(kernels, "product", heads, jnp.ones((2, 4, 5)), axes=2) == "cpu"
    assert picked(kernels, "optimizer", jnp.ones((choose.LARGE_UPDATE - 1,))) == "xla"
    assert picked(kernels, "optimizer", jnp.ones((choose.LARGE_UPDATE,))) == "cpu"


@pytest.mark.parametrize(
    "kernels, op, name",
    [
        ("dense", "grouped_swiglu", "dense"),
        ("grouped_swiglu=ragged_dot", "grouped_swiglu", "ragged_dot"),
        ("xla,grouped_swiglu=dense", "grouped_swiglu", "dense"),
        ("xla,grouped_swiglu=dense", "causal_attention", "xla"),
        ("xla,causal_attention=cpu", "causal_attention", "cpu"),
        ("cached_attention=xla", "cached_attention", "xla"),
        ("auto", "cached_attention", "cpu"),
    ],
)
def test_a_name_forces_an_op_or_all_that_have_it(kernels, op, name):
    assert Kernels(Target("cpu", kernels), ()).chosen()[op] == name


@pytest.mark.parametrize(
    "platform, kernels, sentence",
    [
        ("cuda", "cpu", "kernels='cpu' is not available for cuda: causal_attention has it for cpu only"),
        ("tpu", "grouped_swiglu=blocks", "kernels='blocks' is not available for tpu"),
        ("cpu", "magic", "kernels='magic' is not one of auto, "),
        ("cpu", "magic=xla", "kernels=magic=xla: 'magic' is not one of the ops causal_attention"),
        ("cpu", "optimizer=dense", "kernels=optimizer=dense: 'dense' is not one of cpu, xla"),
        ("abacus", "auto", "platform='abacus' is not one of cpu, cuda, rocm, tpu"),
    ],
)
def test_what_a_target_does_not_have_is_refused_in_a_sentence(platform, kernels, sentence):
    with pytest.raises(ConfigError) as refused:
        prepare(Execution(kernels=kernels), platform=platform)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize("kernels", ["", "a b", "cpu,xla", "=", "a=b=c"])
def test_what_is_no_choice_of_kernels_is_refused(kernels):
    with pytest.raises(ConfigError, match="kernels="):
        Execution(kernels=kernels)


@pytest.mark.parametrize(
    "platform, chip, dtype, training, few, many",
    [
        ("cuda", "9.0", "bfloat16", "mosaic", "by_row", "mosaic"),
        ("cuda", "9.0", "float32", "row_blocks", "by_row", "row_blocks"),
        ("cuda", "8.0", "bfloat16", "row_blocks", "by_row", "row_blocks"),
        ("rocm", "", "bfloat16", "row_blocks", "by_row", "row_blocks"),
        ("tpu", "TPU v5p", "bfloat16", "megablox", "ragged_dot", "ragged_dot"),
        ("tpu", "TPU v5p", "float32", "ragged_dot", "ragged_dot", "ragged_dot"),
        ("cpu", "", "bfloat16", "blocks", "xla", "xla"),
    ],
)
def test_who_multiplies_experts_on_each_chip(platform, chip, dtype, training, few, many):
    """No row that multiplies every row with every expert, and no loop of unknown length on accelerators."""
    kernels = prepare(Execution(compute_dtype=dtype), platform=platform, chip=chip)
    x, stack = jnp.ones((8, 128), dtype), jnp.ones((4, 128, 256))
    assert picked(kernels, "grouped_swiglu", x, stack) == training == kernels.chosen(dtype)["grouped_swiglu"]
    assert picked(kernels, "decode_experts", jnp.ones((8, 2), dtype), stack) == few
    assert picked(kernels, "decode_experts", jnp.ones((9, 2), dtype), stack) == many
    odd = jnp.ones((4, 128, 100))  # a width that no tile divides
    fallback = {"cuda": "row_blocks", "rocm": "row_blocks", "tpu": "ragged_dot", "cpu": "blocks"}[platform]
    assert picked(kernels, "grouped_swiglu", x, odd) == fallback
    line = kernels.describe(dtype)
    assert ("grouped_swiglu is slow by row_blocks: it multiplies one block" in line) == (training == "row_blocks")


def test_megablox_is_for_one_device():
    kernels = prepare(platform="tpu", chip="TPU v5p")
    x, stack = jnp.ones((8, 128), jnp.bfloat16), jnp.ones((4, 128, 256))
    with sharding.use_mesh(sharding.make_mesh(data=2)):
        assert picked(kernels, "grouped_swiglu", x, stack) == "ragged_dot"
    assert kernels.chosen("bfloat16", devices=2)["grouped_swiglu"] == "ragged_dot"
    assert kernels.chosen("bfloat16")["grouped_swiglu"] == "megablox"


def test_what_is_slow_on_a_gpu_is_said_where_it_is_forced():
    line = prepare(Execution(kernels="grouped_swiglu=ragged_dot"), platform="cuda", chip="9.0").describe("bfloat16")
    assert "grouped_swiglu is slow by ragged_dot: XLA multiplies every row with every expert there" in line
    line = prepare(Execution(kernels="grouped_swiglu=ragged_dot"), platform="tpu").describe("bfloat16")
    assert "ragged_dot: grouped_swiglu" in line and "slow" not in line


def test_a_forced_kernel_that_cannot_compute_is_refused_not_replaced():
    kernels = Kernels(Target("cpu", "cpu"), ())
    with pytest.raises(ValueError, match="kernels='cpu' does not serve grouped_swiglu in bfloat16"):
        kernels.pick("grouped_swiglu", X.astype(jnp.bfloat16), STACK.astype(jnp.bfloat16))


def test_the_default_device_says_the_platform():
    assert choose.platform_of() == "cpu" == choose.platform_of(sharding.make_mesh(data=2))

    class Device:
        platform, client = "gpu", type("Client", (), {"platform_version": "cuda 13000"})

    assert choose._platform_name(Device) == "cuda"
    Device.client.platform_version = "PJRT ROCm 6"
    assert choose._platform_name(Device) == "rocm"


def test_the_line_says_what_runs_and_why_not(monkeypatch):
    line = Kernels(Target("cpu"), ()).describe()
    assert line.startswith("kernels for cpu: cpu: causal_attention") and "xla: cross_entropy" in line
    monkeypatch.setattr(library, "why_not", lambda: "there is no C++ compiler (c++, g++, clang++)")
    kernels = prepare()
    assert kernels.chosen()["grouped_swiglu"] == "blocks"
    assert kernels.describe().endswith("no C++ kernels, there is no C++ compiler (c++, g++, clang++)")
    with pytest.raises(ConfigError, match="kernels='cpu' is not available here: there is no C\\+\\+ compiler"):
        prepare(Execution(kernels="cpu"))
    assert "C++" not in prepare(Execution(kernels="xla")).describe()  # not wanted, so not missed
    assert "C++" not in prepare(platform="tpu").describe()


def test_nothing_is_compiled_that_nobody_wants(monkeypatch):
    monkeypatch.setattr(library, "why_not", lambda: 1 / 0)
    prepare(Execution(kernels="xla"))
    prepare(platform="cuda")


def test_equal_targets_share_compiled_programs():
    a, b = (Kernels(Target("cpu", "xla")) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != Kernels(Target("cpu"))


# The library


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """Asks again, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return library.why_not.__wrapped__


def test_no_compiler_or_one_that_fails_is_said(afresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    assert afresh() == "false does not compile the kernels: exit code 1"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert afresh().startswith("the kernels cannot be compiled or loaded: ")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert afresh() == "there is no C++ compiler (c++, g++, clang++)"
    assert [path.name for path in tmp_path.glob("*/*")] == ["build.lock"]  # nothing half-written


def test_ops_in_the_table_are_methods():
    """A module calls `kernels.op`; the optimizer's is named after the update that it takes."""
    for op in TABLE:
        assert callable(getattr(Kernels, {"optimizer": "adamw_update"}.get(op, op)))
    assert jax.default_backend() == "cpu"
