"""keep_memory, in a separate process: freed memory is reused at the same address."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from dsv3_jax.kernels.cpu.memory import keep_memory

assert keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
large, places, small = 100 << 20, set(), []
for step in range(3):
    places.add(program := libc.malloc(large))
    libc.memset(program, 1, large)
    libc.free(program)
    small += [libc.malloc(size) for size in (40, 5_000, 100_000, 900_000)]
print(len(places), all(small))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings exist in glibc only")
def test_a_program_reuses_its_memory_although_small_arrays_are_kept():
    environment = os.environ | {"LD_PRELOAD": ""}  # whatever allocator the tests run with
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True"]
