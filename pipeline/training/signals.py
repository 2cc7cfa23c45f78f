"""Signals that ask a run to commit and leave at its next step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """Inside, SIGTERM, SIGUSR1 and Ctrl-C are remembered and nothing else; a second Ctrl-C ends at once.

    number: the last of them that came, None before. Handlers that were there come back at the end. Main thread only.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._remember) for number in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
