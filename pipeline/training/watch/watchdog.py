"""A rank that makes no progress is ended, so that its peers and its scheduler find out.

Both timers are the system's own and need nothing of Python, which may be stuck in a collective, a read or a kernel: a
thread in C (faulthandler) writes the stacks of all threads to standard error, and SIGALRM, a moment later, ends the
process. Its status is thus that of a process that a signal has ended, after which jobs go back to the queue. A rank
that is stopped (SIGSTOP) is found by its peers, which wait for it in a collective: their watchdogs end them, and who
started the ranks ends the rest.
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
"""What the stacks get to be written before the end."""


class Watchdog:
    """`with Watchdog(seconds) as dog:` watches from the first beat on. Main thread only.

    seconds: how long progress may take; 0 = no watchdog. file: where the stacks go (a real file, not a buffer).
    """

    def __init__(self, seconds: float, file: TextIO | None = None) -> None:
        self.seconds = seconds
        self._file = file or sys.__stderr__
        self.n = 0

    def beat(self, n: int) -> None:
        """Progress was made: n samples are seen. Starts the clock again."""
        self.n = n
        if self.seconds > 0 and self._file is not None:
            faulthandler.dump_traceback_later(self.seconds, file=self._file)
            signal.setitimer(signal.ITIMER_REAL, self.seconds + WRITING_SECONDS)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work that may take its time (an evaluation, a checkpoint); collectives have time limits of their own."""
        self.stop()
        try:
            yield
        finally:
            self.beat(self.n)

    def stop(self) -> None:
        """No more watching until the next beat."""
        if self.seconds > 0:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self._before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self.seconds > 0:
            signal.signal(signal.SIGALRM, self._before)
