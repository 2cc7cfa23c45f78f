"""Makes commits of small states without a trainer."""

from __future__ import annotations

import torch

from pipeline.distributed.world import World
from pipeline.runs.fragments import Fragment
from pipeline.training.saver import Saver, Stamp

SHAPES = {"conv": (3, 2, 2), "bias": (5,)}
TOTAL = 17  # elements
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")


def values(n, kind):
    """All parameters after n samples, flat."""
    return torch.arange(TOTAL, dtype=torch.float32) + n + 1000 * KINDS.index(kind)


def share(n, kind, rank, size):
    """The fragments of a rank: its even share of all elements in order."""
    first, last = TOTAL * rank // size, TOTAL * (rank + 1) // size
    flat, fragments, offset = values(n, kind), [], 0
    for name, count in (("conv", 12), ("bias", 5)):
        start, stop = max(first - offset, 0), min(last - offset, count)
        if start < stop:
            fragments.append(Fragment(name, start, flat[offset + start : offset + stop]))
        offset += count
    return fragments


STAMP = Stamp(stage="zero2", config={"seed": 0}, manifests={"train": "m"}, shapes=SHAPES)


def state_of(n, world=None):
    world = world or World()
    return {kind: share(n, kind, world.rank, world.size) for kind in KINDS}


def save_now(run, world, fragments, *, n, steps, stamp, **options):
    """Write and commit a checkpoint, and wait for it. options: of Saver. Collective; if any rank fails, all raise."""
    with Saver(run, world, stamp, background=False, **options) as saver:
        saver.begin(n, steps, fragments)


def save(run, n, world=None, **options):
    world = world or World()
    save_now(run, world, state_of(n, world), n=n, steps=n // 10, stamp=STAMP, **options)
