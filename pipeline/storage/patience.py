"""How long one keeps trying: waits that grow, at random, until nothing has been gained for PATIENCE_SECONDS."""

from __future__ import annotations

import os
import secrets
import time

PATIENCE_SECONDS = 120.0
"""How long an operation on S3 is tried again while it gains nothing. A shorter outage is a delay and no error."""
STRANGER_SECONDS = 10.0
"""The same for an endpoint that has never answered this process: its address is more likely wrong than it is away."""
PAUSES = (0.2, 10.0)
"""Seconds: the longest that the first pause between tries may be, and any."""

_random = secrets.SystemRandom()  # ranks that share a seed must not share their waits
answered: set[int] = set()  # processes that S3 has ever answered


class Patience:
    """Says whether what failed is tried again, and waits before it: longer every time, and at random, so that the
    clients that one outage stopped do not all come back at once. seconds: how long, if not the module's limits."""

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds
        self.gained()

    def gained(self) -> None:
        """Something was gained: patience begins anew."""
        self._failures, self._since = 0, 0.0

    def wait(self) -> bool:
        """After a failure: False when it is the last."""
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
