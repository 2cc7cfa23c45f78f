"""What making a cache takes: hours by number of GPUs or processes, bytes of the source, and requests to the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.planning.cached.size import CacheSize
from pipeline.planning.plan.figures import Figure, Rate

CHUNK = 8 * 1024 * 1024
"""Bytes of a source that encode reads at a time (preprocess/source/shard.py)."""
MULTIPART_BYTES, PART_BYTES = 64 * 1024 * 1024, 16 * 1024 * 1024
"""A larger object is sent in parts of that size (storage/s3.py)."""
PAGE = 1000
"""Keys of a page of a listing."""
RENEWALS = 4
"""Of a claim in the time after which it counts as dead (preprocess/encoding/claims.py)."""
LISTINGS = 4
"""Listings of the destination by each process: when it looks for what is there, and before it writes the manifest."""


@dataclass(frozen=True)
class Requests:
    """Requests of an encode to S3, by kind, as its code makes them where nothing is repeated."""

    get: int
    put: int
    head: int
    list: int
    delete: int

    @property
    def total(self) -> int:
        return self.get + self.put + self.head + self.list + self.delete


def encode_requests(
    size: CacheSize,
    shard_bytes: Sequence[int],
    processes: int = 1,
    hours: float = 0.0,
    claim_seconds: float = 120.0,
) -> Requests:
    """Requests of encoding shards of these sizes by `processes` for `hours`, both of the source and of the cache.

    For each shard: a look at its size, and ranges of 8 MiB; a claim with its renewals and its end; three looks whether
    it is done; its tars, indexes and report. Then every report once, and the manifest.
    """
    units = len(shard_bytes)
    tar_bytes = size.tar_bytes // max(size.tars, 1)
    tar_puts = 1 if tar_bytes <= MULTIPART_BYTES else 2 + -(-tar_bytes // PART_BYTES)
    renewals = round(processes * hours * 3600 / (claim_seconds / RENEWALS))
    hashes = units if size.bytes_beside.get("hashes") else 0
    return Requests(
        get=sum(-(-one // CHUNK) for one in shard_bytes) + units + 4 * processes,
        put=units + renewals + size.tars * (tar_puts + 1) + units + hashes + 4,
        head=units + 3 * units,
        list=processes * (2 * pages(units) + LISTINGS * pages(size.objects)),
        delete=units,
    )


def pages(objects: int) -> int:
    """Requests of a listing."""
    return max(1, -(-objects // PAGE))


def encode_figures(
    images: int, rate: Rate, processes: Sequence[int], source_bytes: int = 0, what: str = "processes"
) -> tuple[Figure, ...]:
    """Hours of encoding for each number of processes (GPUs), each at `rate` images/s, and what the source must deliver.
    Claims share shards out among them, so the hours are those of an even share. Raises AssertionError for a rate in
    another unit."""
    assert rate.unit == "images/s", f"a rate of encoding is in images/s, not {rate.unit}"
    figures = []
    for count in processes:
        hours = images / rate.per_s / count / 3600
        figures.append(Figure(f"hours with {count} {what}", hours, "hours", rate.basis, rate.where))
        if source_bytes and hours:
            figures.append(
                Figure(
                    f"read of the source with {count} {what}",
                    source_bytes / (hours * 3600),
                    "bytes/s",
                    rate.basis,
                    f"{rate.where}; bytes of the source over the hours",
                )
            )
    return tuple(figures)
