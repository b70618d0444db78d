"""Strict settings for every test: checked types, no implicit promotion, and the CPU as the device.

pyproject.toml also makes warnings errors.
"""

import contextlib
import gc
import os
import signal
from collections import Counter
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
# Compiling takes most of the tests' time. `make test-long` sets 0: it compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# jaxlib 0.10 has an older generator of fused loops, which compiles in a third of the time.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0" and metadata.version("jaxlib").startswith(
    "0.10."
):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = flags + " --xla_cpu_use_fusion_emitters=false"

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# for meshes; must be set before the first array is created
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # they are made now, so no command that a test runs asks for another number

# Check each call of the modules that have jaxtyping's signatures. mypy checks the others, which
# refuse wrong types in sentences of their own.
PACKAGE = Path(__file__).parents[1] / "dsv3_jax"
SHAPED = [
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if "from jaxtyping import" in file.read_text()
]
install_import_hook(SHAPED, "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption(
        "--cards", type=Path, metavar="FOLDER", help="write verification cards there (make parity)"
    )


@pytest.fixture(scope="session", autouse=True)
def _no_work_is_done_twice(tmp_path_factory):
    """A fresh `jax.jit` of the same program, or another process of the session, finds it on disk.

    `fit` draws no pictures, measures no speed and fits no baseline, but for `runs.finished`.
    """
    # they import the package, after the hook above
    from runs import compiled_programs, spend_no_seconds

    from dsv3_jax.kernels import verdicts
    from dsv3_jax.kernels.cpu import memory

    spend_no_seconds()
    memory.keep_memory = lambda: None  # it sets the allocator, for all that comes after
    # What `dsv3 info --check` once found on this machine chooses no kernel of a test.
    verdicts.private_folder = lambda: tmp_path_factory.getbasetemp()
    folder = compiled_programs(tmp_path_factory.getbasetemp())
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # it reads its settings only once


@pytest.fixture(scope="module", autouse=True)
def _what_is_kept_is_not_searched_again():
    """Drop a module's garbage, then take what is left out of later collections.

    JAX keeps each traced program. Searching them all again and again took 6 % of the tests' time.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    """Enable float64 in the test. Identities then hold to rounding, so tolerances can be tight."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def soon():
    """What hangs fails."""
    from dsv3_jax.host.signals import handled

    with handled(lambda *_: pytest.fail("it takes more than a minute"), signal.SIGALRM):
        signal.alarm(60)
        yield
        signal.alarm(0)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, for tests with `browser.needs_browser`."""
    from browser import Browser

    with contextlib.closing(Browser()) as browser:
        yield browser


@pytest.fixture
def clock(monkeypatch):
    """Templates read `texts.NOW`."""
    from texts import Clock

    from dsv3_jax.chat import sandbox

    monkeypatch.setattr(sandbox, "datetime", Clock)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder of this process, see `runs.compiled_programs`."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def whole(root):
    """The one complete run, see `runs.finished`."""
    from runs import finished

    return finished(root)


@pytest.fixture(scope="session")
def server():
    """A bucket server: one for the process, because TensorStore reads its address only once."""
    from buckets import serve

    with serve() as found:
        yield found


@pytest.fixture
def whole_compiles():
    """Compile with all of XLA's optimisations, for tests that inspect the compiled program."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def rng():
    """A generator with the same seed for each test, so no test depends on the tests before it."""
    return np.random.default_rng(0)


# Not a test module: it imports torch and has no doctests.
collect_ignore = ["parity/parity_reference.py", "parity/chat_reference.py"]

# Examples that compile a complete model run with the long tests.
LONG_EXAMPLES = (
    "dsv3_jax.model.transformer.Transformer",
    "dsv3_jax.training.router_bias.update",
    "dsv3_jax.runs.loop.fit",
    "dsv3_jax.runs.tracing.StepTrace",
    "dsv3_jax.decoding.generate.generate",
    "dsv3_jax.decoding.generate.generate_in_parts",
    "dsv3_jax.decoding.sampler.OpenSampler",
    "dsv3_jax.model.upcycle.upcycle",
    "dsv3_jax.runs.convert.convert",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name in LONG_EXAMPLES:
            item.add_marker(pytest.mark.long)

    # Processes share the test files. Those with long tests run first, so that none works alone at
    # the end; the sort is stable, so a file's tests stay in order.
    long = Counter(item.path for item in items if item.get_closest_marker("long"))
    items.sort(key=lambda item: -long[item.path])
