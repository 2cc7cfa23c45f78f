"""Worlds whose ranks are threads of one process, so that collectives are real and no process is started."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline.distributed.world import World


class Meeting:
    """Exchanges values between the ranks of a world. When a rank dies the others get BrokenBarrierError."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadWorld(World):
    """The world as one of its threads sees it."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def sum(self, values: list[float]) -> list[float]:
        return [float(sum(column)) for column in zip(*self.meeting.exchange(self.rank, values), strict=True)]

    def counted(self, flags: Sequence[bool]) -> list[int]:
        return [sum(map(int, column)) for column in zip(*self.meeting.exchange(self.rank, list(flags)), strict=True)]

    def added(self, values: Tensor) -> Tensor:
        return values.copy_(sum(self.meeting.exchange(self.rank, values.clone())))

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)

    def first(self, value: Any) -> Any:
        return self.meeting.exchange(self.rank, value)[0]


def on_ranks(size: int, act: Callable[[World], Any]) -> list[Any]:
    """Runs act(world) on every rank. Returns, per rank, its result or the exception that ended it."""
    meeting, results = Meeting(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = act(ThreadWorld(rank, size, meeting=meeting))
        except BaseException as error:
            results[rank] = error  # type: ignore[call-overload]
            if not getattr(error, "shared", False):
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
