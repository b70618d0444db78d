"""XLA's flags for training: by platform and devices, the user's own left alone, unknown ones left out."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import Execution
from dsv3_jax.kernels import xla_flags


@pytest.fixture(autouse=True)
def _no_flags_of_the_user(monkeypatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.delenv(name, raising=False)


def names(platform: str, devices: int, execution: Execution | None = None) -> list[str]:
    return [name for name, _ in xla_flags.training_options(platform, execution or Execution(), devices)]


def test_flags_are_for_several_accelerators_and_the_users_own_win(monkeypatch):
    assert names("cuda", 1) == names("cpu", 8) == names("tpu", 8, Execution(xla_flags="none")) == []
    assert len(names("cuda", 8)) > 3 and all(name.startswith("xla_gpu_") for name in names("cuda", 8))
    assert len(names("tpu", 8)) > 3 and not any("gpu" in name for name in names("tpu", 8))
    first, second, *rest = names("cuda", 8)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=there --{first}=false")
    assert names("cuda", 8) == [second, *rest]


def test_flags_that_this_xla_does_not_know_are_left_out():
    """XLA reads a GPU's flags on any host, a TPU's only with libtpu."""
    latency = ("xla_gpu_enable_latency_hiding_scheduler", True)
    assert xla_flags.known((("xla_no_such_flag", True), latency)) == (latency,)
    gpu = xla_flags.known(xla_flags.training_options("cuda", Execution(), 8))
    assert len(gpu) >= 5
    assert jax.jit(lambda x: x + 1, compiler_options=dict(gpu))(jnp.zeros(())) == 1


def test_what_is_set_is_said():
    assert xla_flags.describe(()) == ""
    line = "XLA flags: a_flag=true another=128; --execution.xla-flags none leaves them out"
    assert xla_flags.describe((("a_flag", True), ("another", 128))) == line
