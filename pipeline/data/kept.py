"""Which records of a cache are read: all but those that its manifest excludes (duplicates across shards)."""

from __future__ import annotations

import numpy as np

from pipeline.data.manifest import Manifest


class Kept:
    """Ordinals among a shard's kept records <-> rows in its tar.

    excluded: (N, 2) int32 shard number and row, sorted (manifest.load_excluded). sizes: kept records of each shard.
    """

    def __init__(self, manifest: Manifest, excluded: np.ndarray) -> None:
        counts = np.bincount(excluded[:, 0], minlength=len(manifest.shards))
        self.sizes = [entry.samples - int(count) for entry, count in zip(manifest.shards, counts, strict=True)]
        starts = np.searchsorted(excluded[:, 0], np.arange(len(manifest.shards) + 1))
        self._gaps = {
            # Rows that are kept before each excluded one: an ordinal at or beyond it is shifted by one more.
            shard: excluded[starts[shard] : starts[shard + 1], 1] - np.arange(counts[shard])
            for shard in np.flatnonzero(counts).tolist()
        }

    def rows(self, shards: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """Shard numbers and ordinals in them, of one shape -> rows, int64."""
        rows = ordinals.astype(np.int64)
        if not self._gaps:
            return rows
        for shard in np.unique(shards).tolist():
            if shard in self._gaps:
                here = shards == shard
                rows[here] += np.searchsorted(self._gaps[shard], ordinals[here], side="right")
        return rows
