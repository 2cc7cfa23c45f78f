"""The list of records that are never read: duplicates of records in other shards."""

from __future__ import annotations

import hashlib

import numpy as np

from pipeline.data.format.manifest import Manifest
from pipeline.data.format.objects import read_bounded
from pipeline.data.format.records import parse_npy
from pipeline.errors import DatasetError, NotFound, ShardCorrupt
from pipeline.parsing.npy import HEADER_BYTES
from pipeline.storage.base import Storage


def load_excluded(storage: Storage, manifest: Manifest) -> np.ndarray:
    """(N, 2) int32: shard number and row of each record that is never read, sorted. Raises DatasetError."""
    if not manifest.excluded:
        return np.empty((0, 2), dtype=np.int32)
    url = storage.locate(manifest.excluded_name)
    advice = "restore it, or delete the manifest and run `latentmill encode finalize=true` again"
    try:
        data = read_bounded(storage, manifest.excluded_name, 8 * manifest.excluded + HEADER_BYTES + 12)
    except NotFound:
        data = b""
    if hashlib.sha256(data).hexdigest() != manifest.excluded_sha256:
        raise DatasetError(f"{url} is missing or not what the manifest promises: {advice}")
    try:
        pairs = parse_npy(memoryview(data))
    except ShardCorrupt as error:
        raise DatasetError(f"{url}: {error}: {advice}") from None
    if pairs.dtype != np.int32 or pairs.shape != (manifest.excluded, 2):
        raise DatasetError(
            f"{url} is {pairs.dtype} {pairs.shape}, not int32 {(manifest.excluded, 2)} as the manifest says: {advice}"
        )
    shards, rows = pairs.astype(np.int64).T
    sizes = np.array([entry.samples for entry in manifest.shards], dtype=np.int64)
    if (pairs < 0).any() or (shards >= len(sizes)).any() or (rows >= sizes[shards]).any():
        raise DatasetError(f"{url} names records that are not there: {advice}")
    if (np.diff((shards << 32) + rows) <= 0).any():
        raise DatasetError(f"{url} does not name its records in order, each once: {advice}")
    return pairs
