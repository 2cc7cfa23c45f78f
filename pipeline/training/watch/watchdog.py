"""Ends a rank that makes no progress, so that its peers and the scheduler notice.

Neither timer needs the Python interpreter, which may be stuck in a collective, a read or a kernel: a C thread
(faulthandler) writes the stacks of all threads to standard error, and a moment later SIGALRM ends the process. Its exit
status is then that of a process ended by a signal, after which jobs go back to the queue. A rank that is stopped by
SIGSTOP keeps its peers waiting in a collective: their watchdogs end them, and the launcher ends the stopped rank.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

WRITING_SECONDS = 1.0
"""Time between the stacks' writing and SIGALRM."""


class Watchdog:
    """`with Watchdog(seconds) as dog:` watches from the first beat on. Main thread only.

    seconds: longest time without progress; 0 = no watchdog. later: the same from `hurry` on; 0 = `seconds`. file: where
    the stacks go (a real file, not a buffer).
    """

    def __init__(self, seconds: float, file: TextIO | None = None, *, later: float = 0.0) -> None:
        self.seconds, self.later = seconds, later
        self._file = file or sys.__stderr__
        self.n = 0

    def beat(self, n: int) -> None:
        """Report progress: n samples are seen. Restarts the clock."""
        self.n = n
        if self.seconds > 0 and self._file is not None:
            faulthandler.dump_traceback_later(self.seconds, file=self._file)
            signal.setitimer(signal.ITIMER_REAL, self.seconds + WRITING_SECONDS)

    def hurry(self) -> None:
        """From the next beat on, allow the time that is meant for later."""
        self.seconds = self.later or self.seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch inside, where an evaluation or a checkpoint may take long; collectives have their own time
        limits."""
        self.stop()
        try:
            yield
        finally:
            self.beat(self.n)

    def stop(self) -> None:
        """Stop watching until the next beat."""
        if self.seconds > 0:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)

    def __enter__(self) -> Watchdog:
        if max(self.seconds, self.later) > 0:
            self._previous_handler = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if max(self.seconds, self.later) > 0:
            signal.signal(signal.SIGALRM, self._previous_handler)
