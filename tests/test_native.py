"""When the native kernels are in use, and what is said where they are not; what they compute is in test_products.py,
test_dispatch.py, test_experts.py and test_cache.py."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.cpu import calls
from dsv3_jax.mesh import sharding


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """Asks anew, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return calls.why_not.__wrapped__


def test_they_can_be_left_out(afresh, monkeypatch, tmp_path):
    monkeypatch.setenv("DSV3_NATIVE", "0")
    assert afresh() == "DSV3_NATIVE is 0"
    assert not list(tmp_path.iterdir())


def test_no_compiler_or_one_that_fails_is_said(afresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    assert afresh() == "false does not compile the kernels: exit code 1"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert afresh().startswith("the kernels cannot be compiled or loaded: ")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert afresh() == "there is no C++ compiler: c++, g++, clang++"
    assert not list(tmp_path.glob("*/*"))  # nothing half-written


@pytest.mark.long
def test_what_is_there_is_not_compiled_again(afresh, tmp_path):
    compiler = next((c for c in calls.COMPILERS if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    made = calls._compiled(compiler)
    assert list((tmp_path / "dsv3_jax").iterdir()) == [made]
    written = made.stat().st_mtime_ns
    assert calls._compiled(compiler) == made and made.stat().st_mtime_ns == written


def test_they_serve_float32_on_one_device(monkeypatch):
    monkeypatch.setattr(calls, "why_not", lambda: "")
    assert calls.serves(jnp.float32, np.dtype("float32"))
    assert not calls.serves(jnp.float32, jnp.bfloat16)
    with sharding.in_force(sharding.make_mesh(data=2)):
        assert not calls.serves(jnp.float32)
    monkeypatch.setattr(calls, "why_not", lambda: "the test says so")
    assert not calls.serves(jnp.float32)
