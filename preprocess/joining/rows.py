"""The records of a unit of the cache, as far as columns must know them: their keys, and those of their samples."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.data.format.manifest import Manifest, ShardEntry
from pipeline.data.format.records import Record, record_key
from pipeline.data.reading.shards import fetch_shard
from pipeline.storage.base import Storage


@dataclass(frozen=True)
class Rows:
    """One tar of the cache. keys: of each record, the key of its sample in the source, and its own. number: of the tar
    in the cache's manifest."""

    number: int
    entry: ShardEntry
    keys: list[tuple[str, str]]


def rows_of(storage: Storage, manifest: Manifest, number: int, *, numbered: bool) -> Rows:
    """Reads and verifies a whole tar of a cache. numbered: whether records of columns are named by the numbers of tar
    and row (Bound.numbered). Raises ShardCorrupt."""
    entry = manifest.shards[number]
    shard = fetch_shard(storage, entry, manifest.contract)
    records = (shard.record(row, ()) for row in range(entry.samples))
    keys = [
        (sample_key(record), record_key(number, row) if numbered else record.key) for row, record in enumerate(records)
    ]
    return Rows(number, entry, keys)


def sample_key(record: Record) -> str:
    """The key of the sample that a record was made of: what its json says, or, of one that other software wrote, its
    own."""
    key = record.meta.get("key")
    return key if type(key) is str else record.key
