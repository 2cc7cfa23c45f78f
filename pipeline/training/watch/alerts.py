"""What somebody should look at: losses and gradients that jump, and steps that do not come."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

WATCHED = ("loss", "grad_norm_max")
REMEMBERED = 50  # rows
FEWEST = 10  # rows before anything is a spike
LOOKS = 4  # in the time that makes a stall


class Spikes:
    """Finds rows in which a figure is more than `factor` times the median of the rows before; 0 = never."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._before = {name: deque[float](maxlen=REMEMBERED) for name in WATCHED}

    def found(self, row: Mapping[str, Any]) -> list[str]:
        """A sentence for each figure of the row that has jumped."""
        sentences = []
        for name, before in self._before.items():
            value = row.get(name)
            if value is None:
                continue
            if self.factor and len(before) >= FEWEST and value > self.factor * (usual := statistics.median(before)):
                sentences.append(f"{name} is {value:.4g}, {value / usual:.1f} times its median of late")
            before.append(value)
        return sentences


class Stalls:
    """A thread that says when no step has ended for `seconds`, once for each stall, and when steps come again.

    say: called with n and a sentence, from that thread or the caller's. 0 seconds = never.
    """

    def __init__(self, seconds: float, say: Callable[[int, str], None]) -> None:
        self.seconds, self._say = seconds, say
        self._lock = threading.Lock()
        self._n, self._last, self._told = 0, 0.0, False  # _last: when the last step ended; 0 = not watching
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)

    def beat(self, n: int) -> None:
        """A step has ended at n samples; or work that may take its time has, and steps go on."""
        now = time.monotonic()
        with self._lock:
            told, before, self._told = self._told, self._last, False
            self._n, self._last = n, now
        if told:
            self._say(n, f"steps come again, after {now - before:.0f} s")

    def pause(self) -> None:
        """What comes now may take its time: an evaluation, a checkpoint."""
        with self._lock:
            self._last, self._told = 0.0, False

    def _watch(self) -> None:
        while not self._end.wait(self.seconds / LOOKS):
            with self._lock:
                late = self._last > 0 and not self._told and time.monotonic() - self._last > self.seconds
                self._told = self._told or late
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
