"""The bytes and objects of a whole cache: before it is made, from its contract and what its samples are like, and of
one that is there, from its manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.records import END_OF_TAR
from pipeline.planning.cached import beside
from pipeline.planning.cached.records import ASSUMED, RecordSize, Sampled, record_bytes

FIXED_OBJECTS = 4
"""contract.json, manifest.json, its copy in manifests/, and card.html."""


@dataclass(frozen=True)
class CacheSize:
    """What a cache takes.

    images: of the source that are stored; with flip each is two records. bytes_by_member: in the tars, by member
    ("json", "moments", "text", "cond.mask", ...), with headers and padding; of a cache that is there, whose manifest
    does not tell members apart, "records" alone. bytes_beside: of all else: "ends" of tars, "indexes", "reports",
    "manifest" with its copy, "plan", "uncond", "card", "hashes". tars: their number. objects: in the store, all of
    them. record_bytes: of a record in the mean.
    """

    images: int
    records: int
    bytes_by_member: dict[str, int]
    bytes_beside: dict[str, int] = field(default_factory=dict)
    tars: int = 0
    objects: int = 0

    @property
    def records_total(self) -> int:
        """Bytes of all records: what one epoch reads."""
        return sum(self.bytes_by_member.values())

    @property
    def tar_bytes(self) -> int:
        """Bytes of all tars."""
        return self.records_total + self.bytes_beside.get("ends", 0)

    @property
    def total(self) -> int:
        """Bytes of all objects."""
        return self.records_total + sum(self.bytes_beside.values())

    @property
    def record_bytes(self) -> float:
        """Bytes of a record in the mean."""
        return self.records_total / self.records if self.records else 0.0


def cache_bytes(
    images: int,
    contract: Contract,
    unit_rows: int | Sequence[int] = 10_000,
    *,
    samples: Sequence[Sampled] = (),
    target: int = 0,
    name: str = "00000.tar",
    source_bytes: int = 0,
) -> CacheSize:
    """What a cache of `images` images takes.

    unit_rows: images of an input shard (the last may have fewer), or those of each shard. samples: what the images are
    like, each of which stands for as many; () = all like ASSUMED. target: number of the contract's resolution among
    those of the encode. name, source_bytes: of an input shard. Duplicates and rejected samples are not foreseen: give
    the images that are accepted.
    """
    samples = samples or (ASSUMED,)
    rows = split(images, unit_rows) if isinstance(unit_rows, int) else [count for count in unit_rows if count]
    variants = 2 if contract.flip else 1
    sizes = [
        record_bytes(contract, one, target=target, flipped=bool(flipped))
        for one in samples
        for flipped in range(variants)
    ]
    by_member = {
        member: round(sum(size.members[member] for size in sizes) * images / len(samples))
        for member in sizes[0].members
    }
    tars, indexes = _tars(rows, sizes, variants)
    units, mean_rows = len(rows), round(sum(rows) / len(rows)) if rows else 0
    report = beside.report_bytes(contract, mean_rows, samples, round(tars / units) if units else 0, target)
    manifest = beside.manifest_bytes(contract, units, tars, mean_rows, name, source_bytes)
    hashes = sum(beside.hashes_bytes(count, contract.filters) for count in rows)
    sizes_beside = {
        "ends": len(END_OF_TAR) * tars,
        "indexes": indexes,
        "reports": report * units,
        "manifest": 2 * manifest,
        "plan": beside.plan_bytes(contract, units, name),
        "uncond": beside.uncond_bytes(contract),
        "card": beside.card_bytes(contract, samples, units, target),
        "hashes": hashes,
    }
    objects = 2 * tars + units + FIXED_OBJECTS + (contract.text is not None) + (units if hashes else 0)
    return CacheSize(images, images * variants, by_member, sizes_beside, tars, objects)


def split(images: int, unit_rows: int) -> list[int]:
    """Images of each unit, where each has `unit_rows` but the last."""
    whole, rest = divmod(images, unit_rows)
    return [unit_rows] * whole + ([rest] if rest else [])


def of_manifest(manifest: Manifest) -> CacheSize:
    """What the cache of a manifest takes, as it says: tars, and by the same arithmetic what lies beside them."""
    contract = manifest.contract
    rows = [unit.accepted for unit in manifest.units]
    indexes = sum(
        beside.index_bytes(shard.samples, (shard.bytes - len(END_OF_TAR)) / max(shard.samples, 1))
        for shard in manifest.shards
    )
    units, tars = len(manifest.units), len(manifest.shards)
    records = sum(shard.samples for shard in manifest.shards)
    ends = len(END_OF_TAR) * tars
    stored = sum(shard.bytes for shard in manifest.shards)
    mean_rows = round(sum(rows) / units) if units else 0
    name = manifest.units[0].source if units else ""
    read = sum(unit.source_bytes for unit in manifest.units) // max(units, 1)
    hashes = sum(beside.hashes_bytes(count, contract.filters) for count in rows)
    sizes_beside = {
        "ends": ends,
        "indexes": indexes,
        "reports": units * beside.report_bytes(contract, mean_rows, (ASSUMED,), round(tars / max(units, 1))),
        "manifest": 2 * beside.manifest_bytes(contract, units, tars, mean_rows, name, read),
        "plan": beside.plan_bytes(contract, units, name),
        "uncond": beside.uncond_bytes(contract),
        "card": beside.card_bytes(contract, (ASSUMED,), units),
        "hashes": hashes,
    }
    objects = 2 * tars + units + FIXED_OBJECTS + (contract.text is not None) + (units if hashes else 0)
    return CacheSize(sum(rows), records, {"records": stored - ends}, sizes_beside, tars, objects)


def _tars(rows: Sequence[int], sizes: Sequence[RecordSize], variants: int) -> tuple[int, int]:
    """Number of tars, and bytes of their indexes: with buckets a unit has a tar of each bucket that one of its images
    falls into. rows: images of each unit. sizes: of the records of the samples."""
    by_bucket = Counter(size.size for size in sizes)
    means = {bucket: _mean([one.total for one in sizes if one.size == bucket]) for bucket in by_bucket}
    tars, indexes = 0.0, 0.0
    for count, units in sorted(Counter(rows).items()):
        for bucket, of_bucket in by_bucket.items():
            share = of_bucket / len(sizes)
            some = 1.0 if share == 1.0 else 1.0 - (1.0 - share) ** count  # the chance that one of the unit's is of it
            records = count * variants * share / some
            tars += units * some
            indexes += units * some * beside.index_bytes(max(1, round(records)), means[bucket])
    return round(tars), round(indexes)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
