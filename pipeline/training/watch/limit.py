"""A shorter time for collectives once the first step is taken."""

from __future__ import annotations

from pipeline.distributed.world import COLLECTIVE_SECONDS, World, limit_collectives

GRACE = 60
"""Seconds after which a collective fails when the watchdog should have ended the rank."""


class CollectiveLimit:
    """The seconds that a collective may take: `longest`, and `seconds` between `shorten` and `lengthen`.

    seconds: 0 = never fewer than `longest`.
    """

    def __init__(self, world: World, longest: float, seconds: float) -> None:
        self.world, self.longest, self.seconds = world, longest, seconds
        self._is_short = False

    def shorten(self) -> None:
        """From now on `seconds`. Collective: a rank that is still at what may take longer is waited for."""
        if self.seconds and not self._is_short:
            self.world.barrier()
            limit_collectives(self.world, self.seconds)
            self._is_short = True

    def lengthen(self) -> None:
        """From now on `longest`."""
        if self._is_short:
            limit_collectives(self.world, self.longest)
            self._is_short = False


def longest_collective(watchdog_s: float) -> int:
    """Seconds that a collective may take. A rank that waits for a stuck one should be ended by its watchdog, after
    which the job is requeued, and not by a collective's error."""
    return max(COLLECTIVE_SECONDS, int(watchdog_s) + GRACE)


def shorter_collective(step_limit_s: float) -> float:
    """The same once the first step is taken; 0 where that is not limited by itself."""
    return step_limit_s + GRACE if step_limit_s else 0.0
