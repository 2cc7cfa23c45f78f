"""A rank that makes no progress is ended, so that its peers and its scheduler find out.

The timer lives in C (faulthandler): it fires even when Python itself is stuck in a collective, a read or a kernel. It
writes the stacks of all threads to standard error and exits with status 1; the launcher then stops the other ranks.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Watchdog:
    """seconds: how long progress may take; 0 = no watchdog. file: where the stacks go (a real file, not a buffer)."""

    def __init__(self, seconds: float, file: TextIO | None = None) -> None:
        self.seconds = seconds
        self._file = file or sys.__stderr__
        self.n = 0

    def beat(self, n: int) -> None:
        """Progress was made: n samples are seen. Starts the clock again."""
        self.n = n
        if self.seconds > 0 and self._file is not None:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self._file)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work that may take its time (an evaluation, a checkpoint); collectives have time limits of their own."""
        faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            self.beat(self.n)

    def stop(self) -> None:
        """No more watching."""
        faulthandler.cancel_dump_traceback_later()
