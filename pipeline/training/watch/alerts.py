"""Detects what needs attention: losses and gradient norms that jump, and steps that do not end."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

WATCHED = ("loss", "grad_norm_max")
WINDOW = 50  # rows of which the median is taken
FEWEST = 10  # rows before any value is a spike
CHECKS_PER_STALL = 4  # checks in the time that makes a stall


class Spikes:
    """Finds rows in which a figure is more than `factor` times the median of the rows before it; 0 = never."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._recent = {name: deque[float](maxlen=WINDOW) for name in WATCHED}

    def sentences(self, row: Mapping[str, Any]) -> list[str]:
        """A sentence for each figure of the row that has jumped."""
        sentences = []
        for name, recent in self._recent.items():
            value = row.get(name)
            if value is None:
                continue
            if self.factor and len(recent) >= FEWEST and value > self.factor * (median := statistics.median(recent)):
                sentences.append(f"{name} is {value:.4g}, {value / median:.1f} times its median of late")
            recent.append(value)
        return sentences


class Stalls:
    """A thread that reports when no step has ended for `seconds`, once per stall, and when steps end again.

    say: called with n and a sentence, from that thread or from the caller's. seconds: 0 = never.
    """

    def __init__(self, seconds: float, say: Callable[[int, str], None]) -> None:
        self.seconds, self._say = seconds, say
        self._lock = threading.Lock()
        self._n, self._last, self._reported = 0, 0.0, False  # _last: when the last step ended; 0 = not watching
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)

    def beat(self, n: int) -> None:
        """A step, or work for which the watch was paused, has ended at n samples, and steps continue."""
        now = time.monotonic()
        with self._lock:
            was_reported, previous, self._reported = self._reported, self._last, False
            self._n, self._last = n, now
        if was_reported:
            self._say(n, f"steps come again, after {now - previous:.0f} s")

    def pause(self) -> None:
        """Stop watching until the next beat: an evaluation or a checkpoint may take longer than a step."""
        with self._lock:
            self._last, self._reported = 0.0, False

    def _watch(self) -> None:
        while not self._end.wait(self.seconds / CHECKS_PER_STALL):
            with self._lock:
                late = self._last > 0 and not self._reported and time.monotonic() - self._last > self.seconds
                self._reported = self._reported or late
            if late:
                self._say(self._n, f"no step has ended for {self.seconds:g} s")

    def __enter__(self) -> Stalls:
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
