"""Which records of a cache are read: all but those that its manifest excludes (duplicates across shards)."""

from __future__ import annotations

import numpy as np

from pipeline.data.format.manifest import Manifest


class Kept:
    """Ordinals among a shard's kept records <-> rows in its tar.

    excluded: (N, 2) int32 shard number and row, sorted (manifest.load_excluded). sizes: kept records of each shard.
    """

    def __init__(self, manifest: Manifest, excluded: np.ndarray) -> None:
        counts = np.bincount(excluded[:, 0], minlength=len(manifest.shards))
        self.sizes = [entry.samples - int(count) for entry, count in zip(manifest.shards, counts, strict=True)]
        self._starts = np.searchsorted(excluded[:, 0], np.arange(len(manifest.shards) + 1))
        # For each excluded record, its shard and how many of the shard's kept rows come before it: an ordinal at or
        # beyond that is shifted by one more.
        shards = excluded[:, 0].astype(np.int64)
        before = excluded[:, 1] - (np.arange(len(excluded)) - self._starts[shards])
        self._gaps = (shards << 32) + before

    def rows(self, shards: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """Shard numbers and ordinals in them, of one shape -> rows, int64."""
        ordinals = ordinals.astype(np.int64)
        if not len(self._gaps):
            return ordinals
        gaps = np.searchsorted(self._gaps, (shards.astype(np.int64) << 32) + ordinals, side="right")
        return ordinals + gaps - self._starts[shards]
