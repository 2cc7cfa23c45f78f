"""A seeded trace of what disturbs a job: nodes that fail, nodes that become slow, and preemptions of the whole job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.scale.world import World

DAY = 86_400.0
Kind = Literal["failure", "preemption", "slow"]
STEPS = 4096
"""Steps of which the slowest node's time is drawn."""


@dataclass(frozen=True)
class Event:
    """at: seconds since the start. node: that it befalls; -1 = the whole job. seconds: that a slow node stays slow."""

    at: float
    kind: Kind
    node: int = -1
    seconds: float = 0.0


def trace_of(world: World) -> list[Event]:
    """Events in order, over twice the days, as the job may take longer than it should. Equal seeds give equal
    traces."""
    rng, span = np.random.default_rng([world.seed, 1]), 2 * world.days * DAY
    events = [
        Event(at, "failure", int(rng.integers(world.nodes)))
        for at in arrivals(rng, world.nodes / (world.mtbf_days * DAY), span)
    ]
    events += [Event(at, "preemption") for at in arrivals(rng, world.preemptions / DAY, span)]
    events += [
        Event(at, "slow", int(rng.integers(world.nodes)), float(rng.exponential(world.slow_hours * 3600)))
        for at in arrivals(rng, world.slow_nodes / DAY, span)
    ]
    return sorted(events, key=lambda event: event.at)


def arrivals(rng: np.random.Generator, rate: float, span: float) -> list[float]:
    """Times of a Poisson process of `rate` a second, up to `span` seconds."""
    if rate <= 0:
        return []
    count = int(rng.poisson(rate * span))
    return sorted(rng.uniform(0, span, count).tolist())


def slowest(world: World) -> float:
    """How much longer a step takes than that of one node in the mean, as all wait for the slowest: the mean of the
    largest of as many log-normal factors."""
    rng = np.random.default_rng([world.seed, 2])
    rows = [rng.lognormal(0.0, world.jitter, world.nodes).max() for _ in range(STEPS)]
    return float(np.mean(rows))
