"""Signals that ask a process to stop: remembered, passed on, raised as Interrupted, or an end at once."""

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
"""What a scheduler or a launcher sends to ask a process to stop."""
STOP = (*SCHEDULER, signal.SIGINT)
"""The same, and Ctrl-C."""


@contextmanager
def handled(numbers: Sequence[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Inside, signals `numbers` of this process call `handler`; the handlers of before come back at the end.

    Python delivers signals to the main thread alone: in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class StopRequest:
    """Whether this process was asked to stop. number: the last signal that asked; None while none has."""

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def listening(self, numbers: Sequence[int] = STOP) -> Iterator[StopRequest]:
        """Inside, a signal of `numbers` is remembered and does nothing else; a second Ctrl-C raises
        KeyboardInterrupt."""

        def remember(number: int, _: FrameType | None) -> None:
            if number == signal.SIGINT and self.number is not None:
                raise KeyboardInterrupt
            self.number = number

        with handled(numbers, remember):
            yield self


@contextmanager
def forwarding(send: Callable[[int], None]) -> Iterator[None]:
    """Inside, signals to this process go to `send`, but for Ctrl-C, which reaches all processes of a terminal."""

    def forward(number: int, _: FrameType | None) -> None:
        if number != signal.SIGINT:
            send(number)

    with handled(STOP, forward):
        yield


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end this process with status 75: outside of the loop, which listens for them itself,
    there is nothing to commit."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        log.warning(f"train: stopped by {signal.Signals(number).name} outside of its steps")
        sys.stderr.flush()
        os._exit(Interrupted.exit_code)

    with handled(SCHEDULER, stop):
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 raise Interrupted: claims are given up, and a scheduler may start this again."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        for other in SCHEDULER:
            signal.signal(other, signal.SIG_IGN)  # once is enough
        raise Interrupted(
            f"stopped by {signal.Signals(number).name}; the shards that are finished stay, and the same command goes on"
        )

    with handled(SCHEDULER, stop):
        yield
