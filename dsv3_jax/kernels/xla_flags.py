"""XLA's flags for training: which are set, where, and why. They are given with the program, not by the environment.

A flag that is in the environment (XLA_FLAGS or LIBTPU_INIT_ARGS) is the user's, and is not set here. A flag that this
version of XLA does not know is left out. A single device gets none: all of them are about collectives.

Not set: `xla_tpu_enable_async_collective_fusion_fuse_all_gather`. Beside asynchronous all-gathers, libtpu takes it on
v5e alone. `xla_gpu_enable_triton_gemm=false`, which old scripts have. XLA's autotuner times cuBLAS and Triton and takes
the faster. `xla_gpu_deterministic_ops=true`: it turns the autotuner off, and programs here add in one order anyway.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import Execution

MIB = 1 << 20
Options = tuple[tuple[str, bool | int], ...]  # names and values, hashable


@dataclass(frozen=True)
class Flag:
    """One flag, the platforms that have it, and why it is set."""

    name: str
    value: bool | int
    platforms: tuple[str, ...]
    why: str
    source: str


_LEVELS = "openxla.org/xla/gpu_optimization_levels"
_NVIDIA = "docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance"
_MAXTEXT = "github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py"
_GPU, _TPU = ("cuda", "rocm"), ("tpu",)
_COMBINE = "one collective for a layer's weights or gradients: many small ones do not fill the links"

FLAGS = (
    Flag("xla_gpu_enable_latency_hiding_scheduler", True, _GPU, "collectives run beside computation", _LEVELS),
    Flag("xla_gpu_enable_while_loop_double_buffering", True, _GPU, "so do those of two layers in a row", _LEVELS),
    Flag("xla_gpu_enable_pipelined_all_gather", True, _GPU, "gather the next layer's weights during this one", _LEVELS),
    Flag("xla_gpu_enable_pipelined_reduce_scatter", True, _GPU, "scatter gradients during the next layer", _LEVELS),
    Flag("xla_gpu_enable_pipelined_all_reduce", True, _GPU, "add gradients during the next layer", _LEVELS),
    Flag("xla_gpu_all_gather_combine_threshold_bytes", 128 * MIB, _GPU, _COMBINE, _NVIDIA),
    Flag("xla_gpu_reduce_scatter_combine_threshold_bytes", 128 * MIB, _GPU, _COMBINE, _NVIDIA),
    Flag("xla_gpu_all_reduce_combine_threshold_bytes", 128 * MIB, _GPU, _COMBINE, _NVIDIA),
    Flag("xla_enable_async_all_gather", True, _TPU, "all-gathers run beside computation", _MAXTEXT),
    Flag("xla_tpu_enable_async_collective_fusion", True, _TPU, "a product and a collective share a loop", _MAXTEXT),
    Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", True, _TPU, "over several products", _MAXTEXT),
    Flag("xla_tpu_overlap_compute_collective_tc", True, _TPU, "collectives run beside the matrix unit", _MAXTEXT),
    Flag("xla_tpu_enable_data_parallel_all_reduce_opt", True, _TPU, "gradients are summed over hosts early", _MAXTEXT),
    Flag("xla_tpu_data_parallel_opt_different_sized_ops", True, _TPU, "those of unlike sizes too", _MAXTEXT),
)


def compile_lightly(f: Callable, device: jax.Device, **how: Any) -> Callable:
    """`jax.jit` for random draws: on a CPU, optimising them takes longer than running them.

    Example:
        >>> compile_lightly(jnp.square, jax.devices()[0])(3)
        Array(9, dtype=int32, weak_type=True)
    """
    lighter = jax.config.values["jax_disable_most_optimizations"]  # what a user asks for is lighter still
    options = {"xla_backend_optimization_level": 1} if device.platform == "cpu" and not lighter else None
    return jax.jit(f, compiler_options=options, **how)


def training_options(platform: str, execution: Execution, devices: int) -> Options:
    """The flags that a training step gets as options of its compilation.

    Args:
        platform: of the devices, as `choose.Target`.
        devices: of the mesh.
    """
    if execution.xla_flags == "none" or devices == 1:
        return ()
    text = " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    users = set(re.findall(r"--(\w+)", text))
    return tuple((f.name, f.value) for f in FLAGS if platform in f.platforms and f.name not in users)


def known(options: Options, mesh: Mesh | None = None) -> Options:
    """Leave out the options that the compiler refuses, by compiling a product of two numbers.

    It refuses names that it does not know, and some options beside others.

    Args: mesh: of the devices to compile for. None means the default device.
    """
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    program = jax.jit(lambda x: x * 2).lower(jax.ShapeDtypeStruct((), jnp.float32, sharding=where))

    def compiles(some: Options) -> bool:
        try:
            program.compile(compiler_options=dict(some))
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith(("INVALID_ARGUMENT", "FAILED_PRECONDITION")):
                raise
            return False
        return True

    if not options or compiles(options):
        return options
    taken: Options = ()
    for option in options:
        taken += (option,) if compiles((*taken, option)) else ()
    return taken


def describe(options: Options) -> str:
    """One line for the start of a run; "" without options."""
    if not options:
        return ""
    words = (f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options)
    return f"XLA flags: {' '.join(words)}; --execution.xla-flags none leaves them out"
