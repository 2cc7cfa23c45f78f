"""What a unit of input is to those who read it, whether it is a tar, some files of a folder or some rows of a table.

A gathered unit is a list of (name, bytes) in a fixed order. Its identity is the SHA-256 of these: for each, the length
of the name (8 bytes, little-endian), the name in UTF-8, the length of the content, and the content. So it says which
files were read, in which order, and what they held, but not where they lay.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Protocol, Self

from pipeline.config import LimitsConfig
from pipeline.errors import Interrupted, ShardCorrupt
from preprocess.source.advice import advice
from preprocess.source.shard import FIRST, FIRST_LENGTH, KEY_LENGTH, Sample, split_name

LENGTH_BYTES = 8


class SourceUnit(Protocol):
    """A unit that is read once, as `SourceShard` is: iterate over `samples()`; after that `sha256` is that of the whole
    unit. bytes: its size, known before it is read. where: path or URL, for messages."""

    name: str
    where: str
    bytes: int
    passed_over: int
    first: list[str]

    @property
    def sha256(self) -> str: ...

    @property
    def position(self) -> int: ...

    def samples(self) -> Iterator[Sample]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Contents(Protocol):
    """What a gathered unit consists of, before it is read."""

    def open(self, limits: LimitsConfig, name: str, stopped: threading.Event | None) -> SourceUnit:
        """The unit, to be read. name: in its plan, "" without one."""


class Identity:
    """The SHA-256 of names and contents in order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin(self, name: str, size: int) -> None:
        """A member follows, whose content has `size` bytes."""
        data = name.encode()
        self._digest.update(len(data).to_bytes(LENGTH_BYTES, "little") + data + size.to_bytes(LENGTH_BYTES, "little"))

    def content(self, data: bytes) -> None:
        """The next bytes of the member's content."""
        self._digest.update(data)

    def add(self, name: str, data: bytes) -> None:
        """A member that is at hand."""
        self.begin(name, len(data))
        self._digest.update(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class GatheredUnit(ABC):
    """A unit that is no tar. Iterate over `samples()` once; `bytes` is what `unit_bytes` of its members gives, or of
    rows their share of the file.

    passed_over: 0, for files that belong to no sample belong to no unit either.
    """

    def __init__(
        self, where: str, name: str, size: int, limits: LimitsConfig, stopped: threading.Event | None = None
    ) -> None:
        self.where, self.name, self.bytes = where, name, size
        self.passed_over = 0
        self.first: list[str] = []
        self.limits, self._stopped = limits, stopped
        self.identity = Identity()
        self._position = 0

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Yields the samples in order. Raises ShardCorrupt and Interrupted."""

    @property
    def sha256(self) -> str:
        """The identity of what was read so far; of the whole unit once its samples have been read."""
        return self.identity.hexdigest()

    @property
    def position(self) -> int:
        """How many of `bytes` were read so far."""
        return self._position

    def close(self) -> None:  # noqa: B027  (what holds nothing open has nothing to close)
        """Lets go of what was opened."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def sample(self, key: str, members: Iterable[tuple[str, bytes | None]]) -> Sample:
        """A sample of members (name, content), in order; the content of one beyond limits.member_bytes is None."""
        sample = Sample(key)
        for name, data in members:
            if len(self.first) < FIRST:
                self.first.append(name if len(name) <= FIRST_LENGTH else f"{name[:FIRST_LENGTH]}...")
            suffix = split_name(name)[1]
            if suffix in sample.members:
                sample.problem = "member_repeated"
            if data is None:
                sample.problem = "file_too_large"
            sample.members[suffix] = data or b""
        if len(key) > KEY_LENGTH:
            sample.problem = "key_too_long"
        return sample

    def refuse_stopped(self) -> None:
        """Raises Interrupted once it is asked to stop."""
        if self._stopped is not None and self._stopped.is_set():
            raise Interrupted("stopped while it read a unit")

    def corrupt(self, what: str, first: str = "") -> ShardCorrupt:
        """The error for a unit that cannot be read. what: with the name of the file. first: what helps."""
        return ShardCorrupt(f"{self.where}: {what}. {advice(first, self.name)}")


def unit_bytes(members: Iterable[tuple[str, int]]) -> int:
    """The size of a unit of members (name, size in bytes): of their names and contents. It is never 0, which stands for
    a unit that was left out."""
    return sum(len(name.encode()) + size for name, size in members)


def unit_name(source: str, number: int) -> str:
    """The name or URL of unit `number` of a folder or a table."""
    return f"{source}@{number:06d}"


def split_unit(name: str) -> tuple[str, int]:
    """What a unit's name is of, and its number; -1 of a name that is none."""
    source, separator, number = name.rpartition("@")
    return (source, int(number)) if separator and number.isascii() and number.isdecimal() else (name, -1)
