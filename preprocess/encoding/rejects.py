"""The list of a unit's rejected samples, `units/NNNNNN.rejected.jsonl`: one line {"key", "message", "reason"} each, in
the order of the shard, the first of every reason."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from pipeline.data.format.contract import canonical_json
from pipeline.log import log
from preprocess.source.rejected import ALOUD, Rejected

REJECTS = "units/*.rejected.jsonl"
"""Where the lists are, for messages."""
LISTED = 50  # samples of a reason in a unit's list
REASONS = 1000  # in a unit's list
LOGGED = 5  # samples of a unit that are logged


class Rejects:
    """The rejected samples of one unit. counts: all of them, by reason."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.counts: collections.Counter[str] = collections.Counter()
        self._listed: list[Rejected] = []
        self._logged = 0

    def add(self, sample: Rejected) -> None:
        """Counts a sample, and logs it if nobody expects its reason."""
        self.counts[sample.reason] += 1
        if self.counts[sample.reason] <= LISTED and len(self.counts) <= REASONS:
            self._listed.append(sample)
        if sample.reason in ALOUD and self._logged < LOGGED:
            self._logged += 1
            log.warning(f"encode: {self.shard}: sample {sample.key} is rejected as {sample.reason}: {sample.message}")

    def lines(self) -> bytes:
        """The list as a file; b"" when nothing was rejected."""
        return b"".join(map(line, self._listed))


def line(sample: Rejected) -> bytes:
    """A sample as a line of the list."""
    return canonical_json({"key": sample.key, "reason": sample.reason, "message": sample.message})


def rejects_key(number: int) -> str:
    """Key of the list of a unit."""
    return f"units/{number:06d}.rejected.jsonl"


def hints(reasons: Iterable[str], members: list[str], caption_key: str) -> str:
    """What may be wrong with a shard of which no sample is usable. members: names of its first files. caption_key: ""
    where no captions are taken."""
    found = set(reasons)
    shown = ", ".join(members) or "none"
    text = f"its first files are {shown}. A sample is KEY.jpg (or jpeg, png, webp)"
    if caption_key:
        text += (
            " and KEY.txt (or KEY.json, with caption_key=json:NAME; neither with text_storage=none) next to each other"
        )
    else:
        text += " and the files of the conditions that are asked for, next to each other"
    if {"key_repeated", "caption_missing"} <= found or {"key_repeated", "image_missing"} <= found:
        text += "; files of one key do not stand together: pack it with tar --sort=name"
    return text
