"""The list of records that are never read: duplicates of records in other shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from pipeline.data.format.manifest import Manifest
from pipeline.data.format.objects import read_bounded
from pipeline.data.format.records import parse_npy
from pipeline.errors import DatasetError, NotFound, ShardCorrupt
from pipeline.parsing.npy import HEADER_BYTES
from pipeline.storage.base import Storage

AGAIN = "restore it, or delete the manifest and run `latentmill encode finalize=true` again"


def load_excluded(storage: Storage, manifest: Manifest) -> np.ndarray:
    """(N, 2) int32: shard number and row of each record that is never read, sorted. Raises DatasetError."""
    if manifest.columns:
        return union(load_excluded(storage, manifest.own), [one.excluded for one in manifest.columns])
    facts = manifest.excluded_name, manifest.excluded, manifest.excluded_sha256
    return read_excluded(storage, *facts, [entry.samples for entry in manifest.shards], AGAIN)


def read_excluded(
    storage: Storage, name: str, count: int, sha256: str, samples: Sequence[int], advice: str
) -> np.ndarray:
    """The list of `count` records under the key `name`. sha256: of its bytes. samples: records of each shard. advice:
    what to do when it is not there, or is not what it must be. Raises DatasetError."""
    if not count:
        return np.empty((0, 2), dtype=np.int32)
    url = storage.locate(name)
    try:
        data = read_bounded(storage, name, 8 * count + HEADER_BYTES + 12)
    except NotFound:
        data = b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DatasetError(f"{url} is missing or not what the manifest promises: {advice}")
    try:
        pairs = parse_npy(memoryview(data))
    except ShardCorrupt as error:
        raise DatasetError(f"{url}: {error}: {advice}") from None
    if pairs.dtype != np.int32 or pairs.shape != (count, 2):
        raise DatasetError(
            f"{url} is {pairs.dtype} {pairs.shape}, not int32 {(count, 2)} as the manifest says: {advice}"
        )
    shards, rows = pairs.astype(np.int64).T
    sizes = np.array(samples, dtype=np.int64)
    if (pairs < 0).any() or (shards >= len(sizes)).any() or (rows >= sizes[shards]).any():
        raise DatasetError(f"{url} names records that are not there: {advice}")
    if (np.diff((shards << 32) + rows) <= 0).any():
        raise DatasetError(f"{url} does not name its records in order, each once: {advice}")
    return pairs


def union(excluded: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Lists of records (N, 2) int32 as one, sorted and each once."""
    if not any(len(other) for other in others):
        return excluded
    pairs = np.concatenate([excluded, *others]).astype(np.int64)
    places = np.unique((pairs[:, 0] << 32) + pairs[:, 1])
    return np.stack([places >> 32, places & 0xFFFFFFFF], axis=1).astype(np.int32)
