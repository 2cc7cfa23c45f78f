"""Reads files of arrays (.npz, .safetensors) that lie each by itself, with their captions beside them, as sd-scripts
caches latents: IMAGE_0512x0768_sd.npz and IMAGE.txt.

Files are read in the order of their names, a few at a time. A unit of them has one SHA-256, over the name, size and
bytes of each file, those beside it included.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.config import LimitsConfig
from pipeline.errors import NotFound, SourceError
from pipeline.storage.base import Storage
from preprocess.adopting.arrays import Foreign

READERS = 8
SUFFIX = re.compile(r"_\d{2,5}x\d{2,5}(_[a-z0-9]+)?$")
"""What sd-scripts puts between the name of an image and .npz: the image's size and the model."""
TEXT_OUTPUTS = "_te_outputs.npz"
"""End of the names of its files of text states, which are passed over."""


@dataclass(frozen=True)
class LooseFile:
    """One file. name: its path below the folder that all files lie in."""

    storage: Storage
    key: str
    name: str


def stems(name: str) -> list[str]:
    """Names without their ends, under which files beside it are looked for, in this order: x/a_0512x0768_sd.npz ->
    x/a_0512x0768_sd, x/a."""
    stem = name.rpartition(".")[0]
    return list(dict.fromkeys([stem, SUFFIX.sub("", stem)]))


class LooseUnit:
    """Some files. Iterate over `records()` once; after that `sha256` and `bytes` are those of all.

    beside: the files that lie beside each under its stem, such as txt.
    """

    def __init__(self, files: Sequence[LooseFile], beside: Sequence[str], limits: LimitsConfig) -> None:
        self.bytes = 0
        self._files, self._beside, self._limits = files, beside, limits
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(READERS, "latentmill-files")

    def __enter__(self) -> LooseUnit:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def sha256(self) -> str:
        """SHA-256 over the name, size and bytes of the files read so far."""
        return self._digest.hexdigest()

    def records(self) -> Iterator[Foreign]:
        """Yields a record for each file. Raises SourceError for a file that has gone, and StorageError."""
        coming = iter(self._files)
        waiting = collections.deque(self._pool.submit(self._read, file) for file in itertools.islice(coming, READERS))
        seen = set[str]()
        while waiting:
            found, parts = waiting.popleft().result()
            waiting.extend(self._pool.submit(self._read, file) for file in itertools.islice(coming, 1))
            for name, size, data in parts:
                self._digest.update(f"{len(name.encode())} {size}\n{name}".encode() + data)
                self.bytes += size
            if found.key in seen:
                detail = "another file has this name but for the size in it"
                found = Foreign(found.key, reason="key_repeated", detail=detail)
            seen.add(found.key)
            yield found

    def _read(self, file: LooseFile) -> tuple[Foreign, list[tuple[str, int, bytes]]]:
        """The record of a file, and (name, size, bytes) of what was read for it; without bytes where they are too
        many."""
        kind, names = file.name.rpartition(".")[2].lower(), stems(file.name)
        try:
            size, data = self._content(file.storage, file.key, self._limits.member_bytes)
        except NotFound:
            raise SourceError(f"{file.storage.locate(file.key)} has gone since the files were listed") from None
        parts, files = [(file.name, size, data)], {kind: data}
        folder = file.key[: len(file.key) - len(file.name.rpartition("/")[2])]
        for end in self._beside:
            for stem in names:
                name = f"{stem}.{end}"
                try:
                    beside, content = self._content(
                        file.storage, folder + name.rpartition("/")[2], self._limits.member_bytes
                    )
                except NotFound:
                    continue
                parts.append((name, beside, content))
                if beside <= self._limits.member_bytes:
                    files[end] = content
                break
        if size > self._limits.member_bytes:
            detail = f"it has {size} bytes, limits.member_bytes={self._limits.member_bytes}"
            return Foreign(names[-1], reason="record_too_large", detail=detail), parts
        return Foreign(names[-1], files), parts

    @staticmethod
    def _content(storage: Storage, key: str, most: int) -> tuple[int, bytes]:
        """(size, bytes) of a file; no bytes where they are more than `most`. Raises NotFound, StorageError."""
        size = storage.stat(key).size
        return size, storage.get_range(key, 0, size) if size <= most else b""
