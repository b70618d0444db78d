"""Settings of glibc's allocator that make it keep freed memory, for programs on CPU."""

import ctypes
import functools
import os
import platform

import jax
import numpy as np
from jax import Array

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h
_MADV_HUGEPAGE = 14  # Linux' mman.h
_HOLES = 128  # free blocks, into which small arrays go
_HOLE = 1 << 20  # bytes of each
_LARGE_PAGE = 2 << 20  # bytes


# a second call would put its blocks into the large pages of the first, and so fill them
@functools.cache
def keep_memory() -> bool:
    """Make glibc keep freed memory instead of returning it to the kernel.

    XLA's CPU client allocates a program's temporary memory in every call and frees it at the end.
    By default glibc maps such large blocks from the kernel and unmaps them again, so every training
    step faults in every page. This takes up to a quarter of a step. The settings hold for the whole
    process, so only programs call this, at their start and before the first array. A library must
    not.

    Returns: True if the settings were made, False if the C library is not glibc or refuses them.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, -1),
        (_M_TOP_PAD, 64 << 20),
    )
    if not all(libc.mallopt(name, value) for name, value in settings):
        return False
    _lay_out_heap(libc)
    return True


def views(x: Array) -> list[Array]:
    """The parts of an array along its first axis: views of its memory on one CPU, outside of jit.

    Elsewhere they are copies.

    Example:
        >>> x = jax.numpy.arange(64.0).reshape(2, 32)
        >>> [view.unsafe_buffer_pointer() - x.unsafe_buffer_pointer() for view in views(x)]
        [0, 128]
    """
    if (
        isinstance(x, jax.core.Tracer)
        or {d.platform for d in x.devices()} != {"cpu"}
        or len(x.devices()) > 1
    ):
        return _parts(x)
    return [jax.device_put(part, next(iter(x.devices()))) for part in np.asarray(x)]


_parts = jax.jit(list)


def _lay_out_heap(libc: ctypes.CDLL) -> None:
    """Make free holes for small arrays, and ask the kernel for large pages at the heap's end.

    Freed temporary memory is at the end of the heap. A small array placed there would leave too
    little for the next step. The heap would then grow by the same amount again, and every page
    would be faulted in again. But glibc uses the free block that fits best, so small arrays go into
    the holes. A large page takes one fault where 512 small ones do.
    """
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # every other block is kept: adjacent holes would merge
    blocks = [libc.malloc(_HOLE) for _ in range(2 * _HOLES)]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    # reserved, never touched; null if the process may not have so much
    if heap := libc.malloc(size):
        start = -(-heap // _LARGE_PAGE) * _LARGE_PAGE
        # a request; some kernels do not support it
        libc.madvise(start, size - _LARGE_PAGE, _MADV_HUGEPAGE)
        libc.free(heap)
    for hole in blocks[::2]:
        libc.free(hole)
