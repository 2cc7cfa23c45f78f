"""Files of annotations, read once from beginning to end, without ever being in memory as a whole."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from pipeline.errors import ParseError, SourceError
from pipeline.storage.base import Storage
from pipeline.storage.patterns import expand

PIECE = 1 << 22
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class Input:
    """What is kept of a file that was read, to know it again. name: without its folders."""

    name: str
    bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256}


class ObjectStream(io.RawIOBase):
    """An object of a store as a file that is read forwards, and the SHA-256 of what was read."""

    def __init__(self, storage: Storage, key: str) -> None:
        super().__init__()
        self._storage, self._key = storage, key
        self.bytes, self._offset = storage.stat(key).size, 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the bytes that were read so far."""
        return self._digest.hexdigest()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = min(len(view), self.bytes - self._offset)
        if length:
            self._storage.read_into(self._key, self._offset, view[:length])
            self._digest.update(view[:length])
            self._offset += length
        return length


class Annotations:
    """One file of annotations. `text()` gives it as text, once; after that `input` says what it was."""

    def __init__(self, storage: Storage, key: str) -> None:
        self.where = storage.locate(key)
        self._storage, self._key = storage, key
        self._input: Input | None = None

    @property
    def input(self) -> Input:
        """What the file was, once it has been read."""
        assert self._input is not None, "the file has been read"
        return self._input

    @contextmanager
    def text(self) -> Iterator[TextIO]:
        """The file as UTF-8 text, line ends as they are. What is not read inside is read at the end, for its hash.
        Raises SourceError, which names the file, for a ParseError inside and for what is no UTF-8."""
        raw = ObjectStream(self._storage, self._key)
        try:
            with io.TextIOWrapper(io.BufferedReader(raw, PIECE), encoding="utf-8-sig", newline="") as text:
                yield text
                while text.read(PIECE):
                    pass
                self._input = Input(self._key.rpartition("/")[2], raw.bytes, raw.sha256)
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{self.where}: it is not UTF-8 ({error.reason}); convert it, or fetch it again"
            ) from None
        except ParseError as error:
            raise SourceError(f"{self.where}: {error}; fetch it again, or name another file") from None


def opened(patterns: tuple[str, ...]) -> list[Annotations]:
    """The files that paths, URLs or patterns name, in the order given. Raises SourceError for one that is not there,
    or that is given twice."""
    files: list[Annotations] = []
    for pattern in patterns:
        files += [Annotations(storage, key) for storage, key in expand(pattern)]
    places = [file.where for file in files]
    twice = next((place for place in places if places.count(place) > 1), "") if len(set(places)) < len(places) else ""
    if twice:
        raise SourceError(
            f"annotations: {twice} is given twice, so each of its boxes and captions would be; give it once"
        )
    return files
