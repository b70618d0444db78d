"""Strict settings for every test: shapes and types checked, no silent promotion, CPU.

Warnings are errors too; that stands in pyproject.toml, where pytest reads it.
"""

import contextlib
import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the tests' time. `make test` asks JAX for little optimising; then also XLA's older code for fused
# loops, where there is a choice, which compiles in a third of the time. What takes long is compiled as users have it.
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") and metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)  # a mesh in one process; must be set before the first array is made

# Checks the jaxtyping signatures of every call; only modules that are imported from here on are hooked.
install_import_hook("dsv3_jax", "beartype.beartype")


@pytest.fixture
def x64():
    """float64 arrays within the test: identities then hold to rounding, and a tolerance can be tight."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def light_compiles():
    """Compile without XLA's optimisations: for modules where compiling takes longer than all else."""
    with _optimisations_left_out(True):
        yield


@pytest.fixture
def whole_compiles():
    """XLA at full effort: what is compiled is looked at."""
    with _optimisations_left_out(False):
        yield


@contextlib.contextmanager
def _optimisations_left_out(value: bool):
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", value)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def rng():
    """A generator that is seeded anew for each test, so that none depends on the tests before it."""
    return np.random.default_rng(0)


# Not tests: imports torch, and has no doctests to look for.
collect_ignore = ["parity/parity_reference.py"]

# Two processes share the files, one file at a time: the longest must not be left for the end.
LONGEST = (
    "test_notebooks",
    "test_train",
    "test_cli",
    "test_speculative",
    "test_drafters",
    "test_mesh",
    "test_objective",
    "test_train_step",
    "test_cache",
    "test_exchange",
    "test_hf",
    "test_products",
    "test_dispatch",
    "test_generate",
    "test_checkpoint",
)


def pytest_collection_modifyitems(items):
    def turn(item):
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)

    items.sort(key=turn)  # stable: all else as it was
