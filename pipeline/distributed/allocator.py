"""Makes glibc's allocator keep freed memory.

By default it returns large blocks to the kernel as soon as they are free. PyTorch on a CPU allocates its activations
anew at every batch, so each page would be faulted in again (measured: docs/measured/cpu.md).
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
INT_MAX = 2**31 - 1


def keep_memory() -> bool:
    """From here on freed memory stays with the process. Returns False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, INT_MAX) == 1 for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def release_memory() -> bool:
    """Return the memory that is free now to the kernel. Returns False where there was none, or no glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return malloc_trim is not None and malloc_trim(0) == 1
