"""How long an operation is retried: random waits that grow, until PATIENCE_SECONDS have passed without progress."""

from __future__ import annotations

import os
import secrets
import time

PATIENCE_SECONDS = 120.0
"""How long an operation on S3 is retried without progress. A shorter outage is a delay and no error."""
STRANGER_SECONDS = 10.0
"""The same for an endpoint that has never answered this process: its address is more likely wrong than it is down."""
PAUSES = (0.2, 10.0)
"""Longest first pause between attempts, and longest pause, in seconds."""

_random = secrets.SystemRandom()  # ranks that share a seed must not share their waits
answered: set[int] = set()  # numbers of the processes that have had an answer from S3


class Patience:
    """Decides whether an operation that failed is retried, and waits before it: longer every time, and at random, so
    that clients that one outage stopped do not all come back at once. seconds: how long to retry, in place of the
    limits above."""

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds
        self.gained()

    def gained(self) -> None:
        """There was progress: the time begins anew."""
        self._failures, self._since = 0, 0.0

    def wait(self) -> bool:
        """Wait after a failure; False, without a wait, where the operation is not to be retried."""
        now = time.monotonic()
        self._since = self._since if self._failures else now
        self._failures += 1
        pause = _random.uniform(0.0, min(PAUSES[0] * 2 ** (self._failures - 1), PAUSES[1]))
        limit = PATIENCE_SECONDS if os.getpid() in answered else STRANGER_SECONDS
        if now + pause - self._since > (limit if self._seconds is None else self._seconds):
            return False
        time.sleep(pause)
        return True

    def __str__(self) -> str:
        return f"tried {self._failures} times in {time.monotonic() - self._since:.0f} s"
