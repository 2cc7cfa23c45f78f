"""The clock of every side of the benchmark of the stream. It imports nothing of latentmill, since peers run in Python
environments of their own."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import psutil

BATCH = 64
"""Samples of a rank."""


def timed(batches: Iterator[int], warm: int, count: int, began: float) -> dict[str, float]:
    """Time `count` samples after the first `warm`, or from `began` on, with the first batch, when warm is 0. batches:
    numbers of samples of successive batches."""
    sample_count = next(batches)
    first = time.perf_counter() - began
    while sample_count < warm:
        sample_count += next(batches)
    resident, cpu = _resident(), 0.0
    if warm:
        sample_count, cpu, began = 0, _cpu(), time.perf_counter()
    while sample_count < count:
        sample_count += next(batches)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"samples": sample_count, "seconds": seconds, "cpu_s": _cpu() - cpu, "first_s": first, "peak_bytes": peak}
    return result | {"grown_bytes": _resident() - resident}


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(psutil.Process().memory_info().rss)


def _cpu() -> float:
    """CPU seconds of this process and its descendants."""
    this_process = psutil.Process()
    total = this_process.cpu_times().children_user + this_process.cpu_times().children_system
    for process in (this_process, *this_process.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
