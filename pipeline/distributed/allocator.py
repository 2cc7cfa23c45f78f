"""glibc's allocator, told to keep what it has.

By default it gives large blocks back to the kernel as soon as they are free, and PyTorch on a CPU allocates its
activations anew at every batch: each page is then faulted in again (measured: docs/measured/cpu.md).
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST = 2**31 - 1


def keep_memory() -> bool:
    """Freed memory stays with the process from here on; False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, MOST) == 1 for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def release_memory() -> bool:
    """Give what is free now back to the kernel all the same; False where there was nothing, or no glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and trim(0) == 1
