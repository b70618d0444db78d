"""glibc's allocator, set to keep freed memory: for training on CPU."""

import ctypes
import functools
import os
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h
_MADV_HUGEPAGE = 14  # Linux' mman.h
_HOLES, _HOLE, _LARGE_PAGE = 128, 1 << 20, 2 << 20  # how many; bytes


@functools.cache  # a heap that is laid out a second time has its large pages filled
def keep_memory() -> bool:
    """Have glibc keep freed memory instead of handing it back. True where that was done.

    XLA's CPU client allocates a program's temporary memory anew in each call. glibc maps such large blocks from the
    kernel and unmaps them again, so every step faults in every page: a quarter of a training step on some machines.
    Call it before the first array is made, in a process of your own (the command line does).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    if not all(libc.mallopt(name, value) for name, value in settings):
        return False
    _lay_out_heap(libc)
    return True


def _lay_out_heap(libc: ctypes.CDLL) -> None:
    """Keep what is small out of the place where a program's temporary memory comes and goes; and that in large pages.

    Freed temporary memory lies at the heap's end. A small array that were put there would leave too little for the next
    step: the heap would grow by as much again, and every page be faulted in anew. glibc puts an array where it fits
    best, so holes are made for the small ones. Large pages take a five-hundredth of the faults where there are any.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    blocks = [libc.malloc(_HOLE) for _ in range(2 * _HOLES)]  # every other one stays: holes that meet become one
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if heap := libc.malloc(size):  # none of it is touched; where the process may not have so much, there is none
        start = -(-heap // _LARGE_PAGE) * _LARGE_PAGE
        libc.madvise(start, size - _LARGE_PAGE, _MADV_HUGEPAGE)  # a wish: kernels may be built without
        libc.free(heap)
    for hole in blocks[::2]:
        libc.free(hole)
