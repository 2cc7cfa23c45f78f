"""Whether the files that a manifest names are there, of the sizes that it says."""

from __future__ import annotations

from pipeline.data.format.index import most_index_bytes
from pipeline.data.format.manifest import Manifest
from pipeline.errors import DatasetError
from pipeline.storage.base import Storage


def require_shards(storage: Storage, manifest: Manifest) -> None:
    """Raise DatasetError, which names the first one, when shards or indexes of the manifest are missing, a shard's size
    differs from the manifest, or an index is larger than its records can make it."""
    stored_sizes = {info.key: info.size for info in storage.list("")}
    missing = [name for shard in manifest.shards for name in (shard.name, shard.index_name) if name not in stored_sizes]
    advice = "restore it, or delete it and run the same `latentmill encode` again"
    for shard in manifest.shards:
        if stored_sizes.get(shard.name, shard.bytes) != shard.bytes:
            raise DatasetError(
                f"{storage.locate(shard.name)} has {stored_sizes[shard.name]} bytes, its manifest says {shard.bytes}: "
                f"{advice}"
            )
        if stored_sizes.get(shard.index_name, 0) > most_index_bytes(shard.samples):
            raise DatasetError(
                f"{storage.locate(shard.index_name)} has {stored_sizes[shard.index_name]} bytes, too many for "
                f"{shard.samples} records: {advice}"
            )
    if missing:
        raise DatasetError(
            f"{storage.url} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more files" if len(missing) > 1 else "")
            + " of its manifest: restore them, or run the same `latentmill encode` again"
        )
