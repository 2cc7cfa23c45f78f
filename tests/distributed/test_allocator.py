"""pipeline/distributed/allocator.py: freed memory is used again without being faulted in again."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource, sys
import numpy as np
from pipeline.distributed.allocator import keep_memory

if sys.argv[1] == "keep":
    assert keep_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.empty(64 << 20, np.uint8).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Page faults of five rounds of 64 MB, after five that may have had to fetch them."""
    return int(subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True).stdout)


def test_freed_memory_stays_with_the_process() -> None:
    kept, default = faults("keep"), faults("default")
    assert default > 100
    assert kept < default / 10
