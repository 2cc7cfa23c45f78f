"""Handlers for the signals that ask a process to stop: remember, pass on, raise Interrupted, or end at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from pipeline.errors import Interrupted
from pipeline.log import log

SCHEDULER = (signal.SIGTERM, signal.SIGUSR1)
"""Signals by which a scheduler or a launcher asks a process to stop."""
STOP = (*SCHEDULER, signal.SIGINT)
"""The same signals, and Ctrl-C's."""

FIRST_SECONDS = 5.0
"""Longest time that what is to be done before an end at once may take."""


@contextmanager
def handled(numbers: Sequence[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Inside, the signals `numbers` call `handler`; the previous handlers are restored at the end.

    Python delivers signals to the main thread only, so in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handlers = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            signal.signal(number, previous)


class StopRequest:
    """Whether this process was asked to stop. number: the last signal that asked, None while none has."""

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def listening(self, numbers: Sequence[int] = STOP) -> Iterator[StopRequest]:
        """Inside, a signal among `numbers` is only remembered, but a second Ctrl-C raises KeyboardInterrupt."""

        def remember(number: int, _: FrameType | None) -> None:
            if number == signal.SIGINT and self.number is not None:
                raise KeyboardInterrupt
            self.number = number

        with handled(numbers, remember):
            yield self


@contextmanager
def forwarding(send: Callable[[int], None]) -> Iterator[None]:
    """Inside, signals to this process are passed to `send`, except for Ctrl-C, which reaches all processes of the
    terminal anyway."""

    def forward(number: int, _: FrameType | None) -> None:
        if number != signal.SIGINT:
            send(number)

    with handled(STOP, forward):
        yield


@contextmanager
def stopping_at_once(first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end this process at once with status 75. The training loop, which has something to
    commit, listens for them itself. first: called before that, for FIRST_SECONDS at most."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        log.warning(f"train: stopped by {signal.Signals(number).name} before or after the training steps")
        thread = threading.Thread(target=first, daemon=True)  # what was interrupted may hold a lock that `first` wants
        thread.start()
        thread.join(FIRST_SECONDS)
        sys.stderr.flush()
        os._exit(Interrupted.exit_code)

    with handled(SCHEDULER, stop):
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 raise Interrupted, so that claims are released and a scheduler may start the command
    again."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        for ignored in SCHEDULER:
            signal.signal(ignored, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
        raise Interrupted(
            f"stopped by {signal.Signals(number).name}; the shards that are finished stay, and the same command goes on"
        )

    with handled(SCHEDULER, stop):
        yield
