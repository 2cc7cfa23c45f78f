"""Times work that every rank does at the same time, as ranks of a run do."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from pipeline.distributed.world import World

LEAST, MOST = 3, 200
"""Fewest and most times that a piece of work is done for one measurement."""


def median_s(work: Callable[[], object], world: World, seconds: float, least: int = LEAST) -> float:
    """Seconds that the work takes on the slowest rank: the median, after two times that are not counted.

    seconds: time to spend, beyond which the work is still done `least` times. Collective: every rank does the work
    equally often, since it may be collective itself.
    """
    one_s(work, world)
    pilot = max(world.gather(one_s(work, world)))
    count = min(MOST, max(least, math.floor(seconds / max(pilot, 1e-9))))
    world.barrier()
    times = [one_s(work, world) for _ in range(count)]
    return max(world.gather(statistics.median(times)))


def one_s(work: Callable[[], object], world: World) -> float:
    """Seconds of doing the work once, up to its end on the device."""
    began = time.perf_counter()
    work()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - began
