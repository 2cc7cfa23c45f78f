"""Whether steps come: a stall is said, and a rank without progress is ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from pipeline.training.watch.alerts import Stalls
from pipeline.training.watch.garbage import Garbage
from pipeline.training.watch.limit import CollectiveLimit
from pipeline.training.watch.watchdog import Watchdog


class ProgressWatch:
    """Watches from the first beat on.

    watchdog_s: seconds without progress after which this rank is ended. step_limit_s: the same once the first step is
    taken; 0 = as before. stall_s: seconds without a step after which `say` is called with n and a sentence. 0 = never.
    collectives, garbage: what is done about them between the first step and the last, evaluations and commits aside.
    aside: a context around what pauses the watch.
    """

    def __init__(
        self,
        watchdog_s: float,
        stall_s: float,
        say: Callable[[int, str], None],
        *,
        collectives: CollectiveLimit,
        garbage: Garbage,
        step_limit_s: float = 0.0,
    ) -> None:
        self.watchdog = Watchdog(watchdog_s, later=step_limit_s)
        self.stalls = Stalls(stall_s, say)
        self.collectives, self.garbage = collectives, garbage
        self.aside: Callable[[], AbstractContextManager[None]] = nullcontext
        self._began = False

    def beat(self, n: int) -> None:
        """A step begins; those before have ended, and n samples are seen. Collective."""
        if self._began:
            self.watchdog.stop()  # a rank may wait here for others, whose step or commit takes longer
            self.collectives.shorten()
            self.watchdog.hurry()
        self.watchdog.beat(n)
        self.stalls.beat(n)
        if self._began:
            self.garbage.step()
        self._began = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, work that may take its time (an evaluation, a commit) is no stall; collectives have time limits of
        their own."""
        self.stalls.pause()
        self._let_go()
        with self.watchdog.paused(), self.aside():
            yield

    def stop(self) -> None:
        """Watch no more until the next beat."""
        self.stalls.pause()
        self._let_go()
        self.watchdog.stop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the watch may be kept. Main thread only."""
        with ExitStack() as stack:
            stack.callback(self._let_go)
            stack.enter_context(self.watchdog)
            stack.enter_context(self.stalls)
            yield

    def _let_go(self) -> None:
        """Collectives may take their time, and Python may collect garbage, until the next beat."""
        self.collectives.lengthen()
        self.garbage.release()
