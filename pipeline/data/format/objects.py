"""Reads the small files of a dataset with a bound on their size that follows from what they describe."""

from __future__ import annotations

from pipeline.errors import DatasetError
from pipeline.storage.base import Storage


def read_bounded(storage: Storage, key: str, most: int) -> bytes:
    """A whole object of at most `most` bytes; its size is looked at before it is read. Raises DatasetError for a larger
    one, NotFound, StorageError."""
    size = storage.stat(key).size
    if size > most:
        raise DatasetError(f"{storage.locate(key)} has {size} bytes, and {most} at most can be right: restore it")
    return storage.get(key)
