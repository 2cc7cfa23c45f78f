"""Progress of a long step: a bar with rate and remaining time on a terminal, occasional plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

LINE_SECONDS = 15.0
"""Shortest time between two plain lines."""


class Progress:
    """`with Progress(total, "encode") as progress: progress.update(k, loss=0.1)`. Silent when not enabled (rank > 0).

    total: number of units. start: number that a resumed step had already done. stream: by default stderr.
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str = "samples",
        *,
        enabled: bool = True,
        start: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.label, self.unit, self.enabled = total, label, unit, enabled
        self.done, self.start = start, start
        self.stream = stream or sys.stderr
        self.began = self._last_line = time.monotonic()
        self.notes: dict[str, Any] = {}
        self.bar: Any = None
        if enabled and self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total,
                desc=label,
                unit=f" {unit}",
                initial=start,
                file=self.stream,
                unit_scale=True,
                dynamic_ncols=True,  # a bar that is wider than a terminal which was narrowed leaves lines behind
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.enabled and kind is None:
            self._line(time.monotonic())

    def update(self, k: int = 1, **notes: Any) -> None:
        """`k` more units are done. notes: values shown beside the rate, such as a loss."""
        self.done += k
        self.notes |= notes
        if self.bar is not None:
            if notes:
                self.bar.set_postfix(notes, refresh=False)
            self.bar.update(k)
        elif self.enabled and self.done < self.total and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._line(time.monotonic())

    def _line(self, now: float) -> None:
        """label: done/total unit, rate, time left or taken, notes."""
        self._last_line = now
        seconds = max(now - self.began, 1e-9)
        rate = (self.done - self.start) / seconds
        if self.done < self.total:
            clock = f"{_clock((self.total - self.done) / rate)} left" if rate else "starting"
        else:
            clock = f"took {_clock(seconds)}"
        notes = "".join(f", {name} {_number(value)}" for name, value in self.notes.items())
        text = f"{self.label}: {self.done:,}/{self.total:,} {self.unit}, {_number(rate)}/s, {clock}{notes}"
        print(text, file=self.stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, remainder = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{remainder:02}" if hours else f"{minutes}:{remainder:02}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
