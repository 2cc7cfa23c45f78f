"""Writes cached shards, whose bytes depend on their records alone, and indexes for random access and verification."""

from __future__ import annotations

import collections
import hashlib
from typing import Any, BinaryIO

import numpy as np

from pipeline.data.format.contract import Contract
from pipeline.data.format.records import END_OF_TAR, Record, pack, tar_member

INDEX_FORMAT = 2


class Moments:
    """Count, mean and sum of squared deviations per channel, in float64. Merging in a fixed order gives the same result
    on every machine."""

    def __init__(self, count: int = 0, mean: Any = 0.0, m2: Any = 0.0) -> None:
        self.count = count
        self.mean = np.asarray(mean, dtype=np.float64)
        self.m2 = np.asarray(m2, dtype=np.float64)

    def add(self, x_CHW: np.ndarray) -> None:
        """Adds one latent (C, h, w)."""
        x = x_CHW.reshape(len(x_CHW), -1).astype(np.float64)
        mean = x.mean(axis=1)
        self.merge(Moments(x.shape[1], mean, ((x - mean[:, None]) ** 2).sum(axis=1)))

    def merge(self, other: Moments) -> None:
        """Adds the figures of another (Chan et al. 1979)."""
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / total)
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """(C,) population standard deviations."""
        return np.sqrt(self.m2 / max(self.count, 1))

    def to_json(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"count": self.count, "mean": np.atleast_1d(self.mean).tolist(), "m2": np.atleast_1d(self.m2).tolist()}


def scaled_mean(array: np.ndarray, contract: Contract) -> np.ndarray:
    """What the statistics are of: the scaled latent (C, h, w) of a record's array, of a posterior its mean; of pixels
    those from -1 to 1. float64."""
    values = array[: contract.latent_shape[0]].astype(np.float64)
    if contract.stored == "pixels":
        values = values / 127.5 - 1
    return (values - contract.shift) * contract.scale


class ShardWriter:
    """Writes one cached tar to a file. `add` records in order, then `finish`.

    samples: records so far. member_bytes: payload bytes so far by member name ("json", "moments", ...).
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._records: list[tuple[int, int, str]] = []
        self._digest = hashlib.sha256()
        self._size = 0
        self.member_bytes: collections.Counter[str] = collections.Counter()

    @property
    def samples(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> None:
        """Appends one record."""
        members = pack(record)
        data = b"".join(tar_member(name, payload) for name, payload in members)
        for name, payload in members:
            self.member_bytes[name.partition(".")[2].removesuffix(".npy")] += len(payload)
        self._records.append((self._size, len(data), hashlib.sha256(data).hexdigest()))
        self._write(data)

    def finish(self) -> dict[str, Any]:
        """Ends the tar. Returns its index: samples, bytes, sha256 and records [[offset, size, sha256], ...]."""
        self._write(END_OF_TAR)
        return {
            "format": INDEX_FORMAT,
            "samples": self.samples,
            "bytes": self._size,
            "sha256": self._digest.hexdigest(),
            "records": [list(entry) for entry in self._records],
        }

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._size += len(data)
