"""Which records of a cache are read: all except those that its manifest excludes (duplicates across shards)."""

from __future__ import annotations

import numpy as np

from pipeline.data.format.manifest import Manifest


class KeptRecords:
    """Converts ordinals among a shard's kept records to rows of its tar.

    excluded: (N, 2) int32 shard number and row, sorted (manifest.load_excluded). sizes: kept records of each shard.
    """

    def __init__(self, manifest: Manifest, excluded: np.ndarray) -> None:
        counts = np.bincount(excluded[:, 0], minlength=len(manifest.shards))
        self.sizes = [entry.samples - int(count) for entry, count in zip(manifest.shards, counts, strict=True)]
        self._starts = np.searchsorted(excluded[:, 0], np.arange(len(manifest.shards) + 1))
        # For each excluded record: its shard, and the number of the shard's kept rows before it. Ordinals from that
        # number on are shifted by one more row.
        shards = excluded[:, 0].astype(np.int64)
        kept_before = excluded[:, 1] - (np.arange(len(excluded)) - self._starts[shards])
        self._gaps = (shards << 32) + kept_before

    def rows(self, shards: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """Shard numbers and ordinals of kept records in them, of one shape -> rows of the shards' tars, int64."""
        ordinals = ordinals.astype(np.int64)
        if not len(self._gaps):
            return ordinals
        gaps = np.searchsorted(self._gaps, (shards.astype(np.int64) << 32) + ordinals, side="right")
        return ordinals + gaps - self._starts[shards]
