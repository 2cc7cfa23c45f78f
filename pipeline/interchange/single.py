"""Whether one file of weights is an export of ours, told by its first or last kilobytes, wherever it lies."""

from __future__ import annotations

import io
import zipfile
from typing import Any

from pipeline.errors import ParseError
from pipeline.models.weights import FACTS
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage

HEADER_BYTES = 64 << 20
"""Longest header of a safetensors file that is read."""
PICKLE_BYTES = 64 << 20


def is_export(storage: Storage, key: str) -> bool:
    """Whether an export wrote the file: its metadata (safetensors) or its pickle, which is not opened, name FACTS."""
    size = storage.stat(key).size
    if key.endswith(".safetensors"):
        return FACTS in _metadata(storage, key, size)
    try:
        with zipfile.ZipFile(io.BufferedReader(_Ranges(storage, key, size))) as file:
            entry = next(one for one in file.infolist() if one.filename.endswith("/data.pkl"))
            return entry.file_size <= PICKLE_BYTES and FACTS.encode() in file.read(entry)
    except Exception:  # whatever zipfile makes of bytes that are no zip file
        return False


def _metadata(storage: Storage, key: str, size: int) -> dict[str, object]:
    """The metadata in a safetensors file's header; {} where it is no such file."""
    if size < 8:
        return {}
    length = int.from_bytes(storage.get_range(key, 0, 8), "little")
    if not 2 <= length <= min(size - 8, HEADER_BYTES):
        return {}
    try:
        header = parse_json(storage.get_range(key, 8, length), HEADER_BYTES)
    except ParseError:
        return {}
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}


class _Ranges(io.RawIOBase):
    """An object of a store as a file that can be read anywhere."""

    def __init__(self, storage: Storage, key: str, size: int) -> None:
        self.storage, self.key, self.size, self.position = storage, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(start + offset, 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self.size - self.position, 0)]
        self.storage.read_into(self.key, self.position, view)
        self.position += len(view)
        return len(view)
