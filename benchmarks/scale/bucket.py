"""A bucket in memory that counts requests by kind, and the seconds that they would take one after the other in
each thread. The code of commits, leases and datasets runs on it as on S3."""

from __future__ import annotations

import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import NotFound, StorageError
from pipeline.runs.retention import TOGETHER
from pipeline.storage.base import ObjectInfo, Storage, temporary_path

PAGE = 1000
"""Keys of a page of a listing."""
POOLED = re.compile(r"_\d+$")
"""Ends the name of a thread of a pool."""
READS = ("get", "head", "list")


@dataclass
class Asked:
    """Requests of some work, each of which takes latency_s. by_kind: get, head, list, put, delete. by_thread: by
    its name. bytes: that were read or written."""

    latency_s: float
    by_kind: Counter[str] = field(default_factory=Counter)
    by_thread: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    @property
    def total(self) -> int:
        return self.by_kind.total()

    @property
    def reads(self) -> int:
        return sum(self.by_kind[kind] for kind in READS)

    @property
    def writes(self) -> int:
        return self.total - self.reads

    @property
    def seconds(self) -> float:
        """Of threads that wait for each other, which send one request after the other, and of pools, which share theirs
        among TOGETHER threads."""
        pooled = sum(count for name, count in self.by_thread.items() if POOLED.search(name))
        return self.latency_s * (self.by_thread.total() - pooled + pooled / TOGETHER)


class Bucket(Storage):
    """Objects by key. latency_s: of a request. sizes: of objects whose content nobody asks for."""

    def __init__(self, latency_s: float, url: str = "s3://scale/run") -> None:
        self.url, self.latency_s = url, latency_s
        self.objects: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self._asked: Asked | None = None
        self._lock = threading.Lock()

    @contextmanager
    def counting(self) -> Iterator[Asked]:
        """Inside, requests are counted."""
        self._asked = Asked(self.latency_s)
        try:
            yield self._asked
        finally:
            self._asked = None

    def _count(self, kind: str, size: int = 0, times: int = 1) -> None:
        asked = self._asked
        if asked is None:
            return
        with self._lock:
            asked.by_kind[kind] += times
            asked.by_thread[threading.current_thread().name] += times
            asked.bytes += size

    def get(self, key: str) -> bytes:
        data = self._content(key)
        self._count("get", len(data))
        return data

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        data = self._content(key)
        self._count("get", len(view))
        if offset + len(view) > len(data):
            raise StorageError(f"{self.locate(key)} ends before byte {offset + len(view)}")
        view[:] = data[offset : offset + len(view)]

    def put(self, key: str, data: bytes) -> None:
        self._count("put", len(data))
        self.objects[key] = bytes(data)

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())
        path.unlink()

    def staging_path(self) -> Path:
        return temporary_path(Path(tempfile.gettempdir(), "at-scale"))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._count("put", len(data))
        with self._lock:
            if key in self.objects:
                return False
            self.objects[key] = bytes(data)
        return True

    def stat(self, key: str) -> ObjectInfo:
        self._count("head")
        size = self.sizes.get(key)
        return ObjectInfo(key, len(self._content(key)) if size is None else size, "e")

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        known = {**self.sizes, **{key: len(data) for key, data in self.objects.items()}}
        found = [ObjectInfo(key, known[key], "e") for key in sorted(known) if key.startswith(prefix)]
        self._count("list", times=max(1, -(-len(found) // PAGE)))
        return found

    def delete(self, key: str) -> None:
        self._count("delete")
        self.objects.pop(key, None)
        self.sizes.pop(key, None)

    def local_path(self, key: str) -> Path | None:
        return None

    def child(self, prefix: str) -> Storage:
        raise StorageError(f"{self.url}/{prefix}: this bucket has no children")

    def sweep(self, seconds: float) -> None:
        return None

    def _content(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise NotFound(f"{self.locate(key)} does not exist") from None
