"""Handlers for the signals that ask a process to stop: remember, pass on, raise Interrupted, or end at once."""

from __future__ import annotations

import _thread
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from pipeline.distributed import endings
from pipeline.errors import Interrupted
from pipeline.log import log

SCHEDULER = (signal.SIGTERM, signal.SIGUSR1)
"""Signals by which a scheduler or a launcher asks a process to stop."""
STOP = (*SCHEDULER, signal.SIGINT)
"""The same signals, and Ctrl-C's."""
INTERRUPTED_BY_KEYBOARD = 130
"""Exit status of what Ctrl-C ends."""
FIRST_SECONDS = 5.0
"""Longest time that what is to be done before an end at once may take."""
HEARD_SECONDS = 2.0
"""Time in which Python must answer a Ctrl-C, before the process is ended without it."""
HINTS = {
    signal.SIGKILL: "; out of memory?",
    signal.SIGALRM: ", as it had made no progress (watchdog_s); its stacks are above",
}
"""What is said of a rank that one of these has killed."""

_ending = threading.Lock()


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
def stopping_at_once(first: Callable[[], object] = lambda: None, verb: str = "train") -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end this process at once with status 75, wherever it is: also while PyTorch is being
    imported, or while C++ waits for something and Python's handlers do not run. Ctrl-C raises KeyboardInterrupt, or
    ends the process with status 130 where C++ does not let that through.

    What has something to commit listens for the signals itself, inside of this. first: gives back what others would
    wait for, before the process ends; in another thread, and for FIRST_SECONDS at most.
    """
    answered = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        for other in SCHEDULER:
            signal.signal(other, signal.SIG_IGN)  # a second signal must not disturb what the first has begun
        _end(verb, number, first)

    def interrupt(number: int, _: FrameType | None) -> None:
        answered.set()
        raise KeyboardInterrupt

    def heard(number: int) -> None:
        """A signal has come; in another thread."""
        if number in SCHEDULER and signal.getsignal(number) is stop:
            _end(verb, number, first)
        if number == signal.SIGINT and signal.getsignal(number) is interrupt and not answered.wait(HEARD_SECONDS):
            _end(verb, number, first)

    has_ctrl_c = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # it has not in the background of a shell
    with handled(SCHEDULER, stop), handled([signal.SIGINT] * has_ctrl_c, interrupt), _woken(heard):
        yield


def _end(verb: str, number: int, first: Callable[[], object]) -> NoReturn:
    """Call `first`, and end this process. Whichever thread comes here first does so.

    It takes no lock: the main thread may hold any, of the log, of sys.stderr or of `threading`, where the signal has
    interrupted it.
    """
    with _ending:
        text = f"{verb}: stopped by {signal.Signals(number).name} outside of its steps"
        record = logging.LogRecord(log.name, logging.WARNING, __file__, 0, text, None, None)
        with suppress(OSError):
            os.write(2, f"{log.handlers[0].format(record)}\n".encode())
        done = _thread.allocate_lock()
        done.acquire()

        def run() -> None:
            with suppress(Exception):  # what is not given back is found dead later
                first()
            done.release()

        _thread.start_new_thread(run, ())
        done.acquire(timeout=FIRST_SECONDS)
        status = INTERRUPTED_BY_KEYBOARD if number == signal.SIGINT else Interrupted.exit_code
        endings.end(status)
        os._exit(status)


@contextmanager
def _woken(heard: Callable[[int], None]) -> Iterator[None]:
    """Inside, `heard` is called in a thread for each signal that has a handler, also while the main thread runs C++."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def listen() -> None:
        with reading:
            while data := reading.recv(1):
                heard(data[0])

    threading.Thread(target=listen, name="latentmill-signals", daemon=True).start()
    previous = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        writing.close()  # ends the thread


def _forget_in_child() -> None:
    """A fork must not write its signals to its parent's socket."""
    with suppress(ValueError):  # a fork of another thread
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)


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
