"""Reads what holds the values of columns, as strictly as the input shards of a cache: a tar, or a file of JSON lines.

A tar has a sample's files next to each other, named by its key: KEY.txt, KEY.json, KEY.NAME.npy. A line is an object
with the sample's key under "key". Anything in either that belongs to no sample is counted and passed over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from pipeline.config import LimitsConfig
from pipeline.errors import ConfigError, RecordRejected, ShardCorrupt
from pipeline.parsing.samples import split_name
from pipeline.storage.base import Storage
from preprocess.source.columns import MOST_BYTES, read_columns
from preprocess.source.shard import CHUNK, KEY_LENGTH, Sample, SourceShard

ENDS = (".tar", ".jsonl")
"""Ends of the names of what is read."""
KEY = "key"
"""Of a line, what names its sample."""


class TarOfValues(SourceShard):
    """A tar of values. suffixes: ends of the names of the files that are read, such as json and dino.npy."""

    def __init__(self, storage: Storage, key: str, limits: LimitsConfig, suffixes: Sequence[str]) -> None:
        super().__init__(storage, key, limits)
        self._suffixes = tuple(sorted(suffixes, key=len, reverse=True))

    def _split(self, name: str) -> tuple[str, str]:
        """A file's name -> key and suffix; the suffix is "" where it is none of those that are read."""
        return split_name(name, self._suffixes)


class LinesOfValues:
    """A file of JSON lines, with the interface of TarOfValues."""

    def __init__(self, storage: Storage, key: str) -> None:
        self.where = storage.locate(key)
        self.bytes = storage.stat(key).size
        self.passed_over = 0
        """Number of lines that are no object with a key."""
        self._storage, self._key = storage, key
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """SHA-256 of all bytes read so far."""
        return self._digest.hexdigest()

    def samples(self) -> Iterator[Sample]:
        """Yields the lines' samples in order; one whose key stood in the file before has a problem. Raises
        ShardCorrupt."""
        seen: set[str] = set()
        for line in self._lines():
            if not line.strip():
                continue
            try:
                key = read_columns(line).get(KEY)
            except RecordRejected:
                key = None
            if type(key) is not str or not key or len(key) > KEY_LENGTH:
                self.passed_over += 1
                continue
            yield Sample(key, {"json": line}, "key_repeated" if key in seen else "")
            seen.add(key)

    def _lines(self) -> Iterator[bytes]:
        """The lines without their ends. Raises ShardCorrupt for one that is too long."""
        rest = b""
        for start in range(0, self.bytes, CHUNK):
            chunk = self._storage.get_range(self._key, start, min(CHUNK, self.bytes - start))
            self._digest.update(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
            if len(rest) > MOST_BYTES:
                raise ShardCorrupt(
                    f"{self.where}, byte {start + len(chunk) - len(rest)}: a line has more than {MOST_BYTES} bytes, so "
                    "it is no file of JSON lines. Write one object a line"
                )
        if rest:
            yield rest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


Source = TarOfValues | LinesOfValues


def open_source(storage: Storage, key: str, limits: LimitsConfig, suffixes: Sequence[str]) -> Source:
    """What an object holds, by its name. Raises ConfigError for other names than *.tar and *.jsonl, and for files of
    samples that lines do not have."""
    if key.endswith(".tar"):
        return TarOfValues(storage, key, limits, suffixes)
    if other := next((suffix for suffix in suffixes if suffix != "json"), ""):
        raise ConfigError(f"{storage.locate(key)} holds JSON lines, and KEY.{other} is asked for, which tars hold")
    return LinesOfValues(storage, key)
