"""Counts of what was left out, by reason, and the first of each."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.errors import RecordRejected
from preprocess.encoding.rejects import LISTED, line
from preprocess.source.rejected import Rejected, bounded, rejected
from preprocess.source.sample import FILTERED


class Rejects:
    """Images or annotations that were left out. counts: all of them, by reason; reasons that begin with FILTERED are
    the user's choice."""

    def __init__(self, counts: Mapping[str, int] | None = None, listed: Iterable[Rejected] = ()) -> None:
        self.counts = collections.Counter(counts or {})
        self.listed: list[Rejected] = list(listed)
        self._kept = collections.Counter(one.reason for one in self.listed)

    def add(self, key: str, reason: str, message: str = "") -> None:
        """Counts one. key: of the image. message: what was found."""
        self.counts[reason] += 1
        if self._kept[reason] < LISTED:
            self._kept[reason] += 1
            self.listed.append(Rejected(bounded(key), reason, bounded(message)))

    def catch(self, key: str, error: RecordRejected) -> None:
        """Counts the sample that an exception is about."""
        one = rejected(key, error)
        self.add(one.key, one.reason, one.message)

    def merge(self, other: Rejects) -> None:
        """Adds those of another, which come after these."""
        self.counts.update(other.counts)
        for one in other.listed:
            if self._kept[one.reason] < LISTED:
                self._kept[one.reason] += 1
                self.listed.append(one)

    @property
    def defects(self) -> int:
        """Those that nobody chose to leave out."""
        return sum(count for reason, count in self.counts.items() if not reason.startswith(FILTERED))

    @property
    def told(self) -> str:
        """For people: "3 box_empty, 1 box_outside", or "none"."""
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.counts.items())) or "none"

    @property
    def first(self) -> str:
        """The first defect, for messages."""
        one = next((one for one in self.listed if not one.reason.startswith(FILTERED)), None)
        return f"the first: {one.key}, {one.reason}{f', {one.message}' if one.message else ''}" if one else "none"

    def lines(self) -> bytes:
        """The first of each reason as a file, one line {"key", "message", "reason"} each."""
        return b"".join(map(line, self.listed))

    def to_json(self) -> dict[str, Any]:
        """As a report holds them."""
        listed = [[one.key, one.reason, one.message] for one in self.listed]
        return {"counts": dict(sorted(self.counts.items())), "listed": listed}
