"""A pool of reusable memory for blocks and batches: fresh pages of the kernel cost more than copying into them."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import defaultdict
from contextlib import suppress

import numpy as np

SMALLEST = 1 << 16  # bytes of an allocation, at least


class Pool:
    """`take` gives memory, which returns to the pool when the last array that views it is gone. Thread-safe.

    allocated_bytes: bytes in the pool and in use.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)
        self._lock = threading.Lock()
        self.allocated_bytes = 0

    def take(self, count: int) -> np.ndarray:
        """(count,) uint8, uninitialized."""
        size = rounded(count)
        with self._lock:
            free = self._free[size]
            memory = free.pop() if free else None
            self.allocated_bytes += size if memory is None else 0
        memory = memory or _new(size)
        owner = (ctypes.c_ubyte * size).from_buffer(memory)  # every view of the memory keeps this alive
        weakref.finalize(owner, self._give_back, size, memory).atexit = False
        return np.frombuffer(memoryview(owner), dtype=np.uint8)[:count]

    def _give_back(self, size: int, memory: mmap.mmap) -> None:
        # No lock, because garbage collection may run this anywhere, also within `take`; list.append needs none.
        self._free[size].append(memory)


def _new(size: int) -> mmap.mmap:
    """Fresh memory, with huge pages if the kernel supports them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def rounded(count: int) -> int:
    """The size to allocate for `count` bytes: 1, 1.25, 1.5 or 1.75 times a power of two, and at least SMALLEST."""
    if count <= SMALLEST:
        return SMALLEST
    step = 1 << (count.bit_length() - 3)
    return -(-count // step) * step
