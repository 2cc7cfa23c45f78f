"""Whether steps come: a stall is said, and a rank without progress is ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from pipeline.training.watch.alerts import Stalls
from pipeline.training.watch.watchdog import Watchdog


class ProgressWatch:
    """Watches from the first beat on.

    watchdog_s: seconds without progress after which this rank is ended. stall_s: seconds without a step after which
    `say` is called with n and a sentence. 0 = never.
    """

    def __init__(self, watchdog_s: float, stall_s: float, say: Callable[[int, str], None]) -> None:
        self.watchdog = Watchdog(watchdog_s)
        self.stalls = Stalls(stall_s, say)

    def beat(self, n: int) -> None:
        """A step ended, and n samples are seen."""
        self.watchdog.beat(n)
        self.stalls.beat(n)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, work that may take its time (an evaluation, a commit) is no stall; collectives have time limits of
        their own."""
        self.stalls.pause()
        with self.watchdog.paused():
            yield

    def stop(self) -> None:
        """Watch no more until the next beat."""
        self.stalls.pause()
        self.watchdog.stop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the watch may be kept. Main thread only."""
        with ExitStack() as stack:
            stack.enter_context(self.watchdog)
            stack.enter_context(self.stalls)
            yield
