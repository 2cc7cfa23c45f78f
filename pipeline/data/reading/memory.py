"""Memory that is used again: blocks and batches come and go, and pages that the kernel has to find anew cost more than
copying into them.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import defaultdict
from contextlib import suppress

import numpy as np

SMALLEST = 1 << 16  # bytes of a piece, at least


class Pool:
    """`take` gives memory; it comes back by itself when the last array that shows it is gone. Safe among threads.

    held: bytes that are with the pool or with those who took them.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)
        self._lock = threading.Lock()
        self.held = 0

    def take(self, count: int) -> np.ndarray:
        """(count,) uint8, holding anything."""
        size = rounded(count)
        with self._lock:
            free = self._free[size]
            memory = free.pop() if free else None
            self.held += size if memory is None else 0
        memory = memory or _new(size)
        owner = (ctypes.c_ubyte * size).from_buffer(memory)  # what every view of it keeps alive
        weakref.finalize(owner, self._give_back, size, memory).atexit = False
        return np.frombuffer(memoryview(owner), dtype=np.uint8)[:count]

    def _give_back(self, size: int, memory: mmap.mmap) -> None:
        # The list's own append: no lock, for this may run wherever Python collects garbage, also inside of `take`.
        self._free[size].append(memory)


def _new(size: int) -> mmap.mmap:
    """Fresh memory; of few large pages where the kernel has them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def rounded(count: int) -> int:
    """A size that few others differ from by less: 1, 1.25, 1.5 or 1.75 times a power of two, and SMALLEST at least."""
    if count <= SMALLEST:
        return SMALLEST
    step = 1 << (count.bit_length() - 3)
    return -(-count // step) * step
