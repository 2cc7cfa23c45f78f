"""Time spent in each stage of the work, and counts of samples."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from preprocess.source.sample import FILTERED

UPLOADS = 2  # finished units that are uploaded at a time while others are encoded
STAGES = ("read", "decode", "wait", "autoencoder", "text", "write", "upload")


@dataclass
class Tally:
    """Seconds of work by stage (sum over all threads) and counts. images: encoded, over all resolutions and flips.
    drawing: seconds in which decoding workers drew holes, which count as decoding. Where captions are compared with
    their pictures, there is a further stage, score."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    rejected: collections.Counter[str] = field(default_factory=collections.Counter)
    read: int = 0
    accepted: int = 0
    images: int = 0
    bytes: int = 0
    drawing: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def defects(self) -> int:
        """Rejects that are defects, not the choice of a filter."""
        return sum(count for reason, count in self.rejected.items() if not reason.startswith(FILTERED))

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / max(self.elapsed, 1e-9)

    @property
    def decoding(self) -> float:
        """Seconds of the decoding workers."""
        return self.seconds["decode"] + self.drawing

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time spent inside to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def told(self, workers: int) -> str:
        """A line for people: rate, rejects, and the time spent in each stage."""
        seconds = {**self.seconds, "decode": self.decoding}
        parts = ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items())
        rejects = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejected.items())) or "none"
        return (
            f"encode: {self.images:,} images in {self.elapsed:.1f} s = {self.rate:.1f} images/s; rejected: "
            f"{rejects}; seconds: {parts} ({workers} decoding workers); bottleneck: {self.busiest(workers)}"
        )

    def busiest(self, workers: int) -> str:
        """The stage that the others wait for, as all stages run concurrently."""
        return max(
            ("read", self.seconds["read"]),
            ("decode", self.decoding / workers),
            ("autoencoder", self.seconds["autoencoder"]),
            ("text", self.seconds["text"]),
            ("score", self.seconds.get("score", 0.0)),
            ("write", self.seconds["write"]),
            ("upload", self.seconds["upload"] / UPLOADS),
            key=lambda stage: stage[1],
        )[0]
