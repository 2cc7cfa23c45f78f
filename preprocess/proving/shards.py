"""Checks every shard, count and hash of a cache."""

from __future__ import annotations

import collections
import hashlib
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.format.contract import Contract
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.manifest import UNCOND, Manifest, ShardEntry
from pipeline.data.format.records import find_records
from pipeline.data.format.uncond import read_uncond
from pipeline.data.reading.shards import fetch_shard, image_of
from pipeline.distributed.place import cores
from pipeline.errors import LatentmillError, ShardCorrupt
from pipeline.storage.base import Storage
from pipeline.tracking.progress import Progress
from preprocess.encoding.plan import report_key
from preprocess.encoding.rejects import REJECTS, rejects_key
from preprocess.encoding.writer import Moments, scaled_mean
from preprocess.proving.findings import Findings
from preprocess.proving.records import check_record
from preprocess.units.naming import option

ROW = re.compile(r"[0-9]{6,10}")
"""The row in a record's key."""


@dataclass
class ShardFindings:
    """The content of one shard. rows: the numbers in the keys of its records."""

    moments: Moments = field(default_factory=Moments)
    rows: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_shards(storage: Storage, manifest: Manifest, findings: Findings) -> None:
    """Checks hashes, counts, contents and statistics of every shard."""
    moments, problems, damaged = Moments(), list[str](), list[str]()
    rows: dict[int, list[int]] = collections.defaultdict(list)
    with (
        ThreadPoolExecutor(cores()) as pool,
        Progress(len(manifest.shards), "verify", "shards") as progress,
    ):
        pending: collections.deque[Future[ShardFindings]] = collections.deque()
        for number, entry in enumerate(manifest.shards):
            pending.append(pool.submit(check_shard, storage, manifest.contract, entry, manifest.adopted))
            while len(pending) > cores() or (pending and number == len(manifest.shards) - 1):
                content = pending.popleft().result()
                moments.merge(content.moments)
                problems += content.problems
                if content.problems:
                    damaged.append(manifest.units[manifest.shards[number - len(pending)].unit].source)
                rows[manifest.shards[number - len(pending)].unit] += content.rows
                progress.update(1)
    size = sum(entry.bytes for entry in manifest.shards)
    findings.add("shards", f"{len(manifest.shards)} tars and indexes, {size:,} bytes: every hash right", *problems)
    if damaged and manifest.adopted:
        findings.remedy("Restore the tars, or index them anew")
    elif damaged and manifest.contract.converted:
        names = [report_key(shard.unit) for shard in manifest.shards if manifest.units[shard.unit].source in damaged]
        findings.remedy(f"Delete {', '.join(dict.fromkeys(names))} and run its `latentmill index` again")
    elif damaged:
        names = list(dict.fromkeys(damaged))
        findings.remedy(f"Run its `latentmill encode` once with {option('forget', names)}, then again without")
    if not problems:
        problems = check_counts(manifest, rows)
    read = sum(unit.read for unit in manifest.units)
    counted = f"{sum(map(len, rows.values())):,} records = {read:,} read - "
    counted += f"{sum(manifest.rejected.values()):,} rejected"
    first = next((number for number, unit in enumerate(manifest.units) if unit.rejected), None)
    if first is not None and storage.exists(rejects_key(first)):
        counted += f" (listed in {REJECTS})"
    counted += ", each also flipped" if manifest.contract.flip else ""
    if manifest.left_out:
        counted += f"; {len(manifest.left_out)} input shard{'s'[: len(manifest.left_out) - 1]} left out"
    findings.add("counts", counted, *problems)
    if problems:
        return
    if not moments.count:
        findings.add("latents", "none", f"{storage.url} holds no record")
        return
    mean, std = np.array(manifest.statistics.mean), np.array(manifest.statistics.std)
    differ = not (np.allclose(moments.mean, mean, atol=1e-6) and np.allclose(moments.std, std, atol=1e-6))
    measured = ", ".join(f"{m:+.3f} ± {s:.3f}" for m, s in zip(moments.mean, moments.std, strict=True))
    problem = f"latents have mean ± std {measured} by channel, the manifest says {mean.round(3)} ± {std.round(3)}"
    findings.add("latents", f"mean ± std by channel {measured}", *([problem] if differ else []))


def check_counts(manifest: Manifest, rows: dict[int, list[int]]) -> list[str]:
    """The problems with the counts of each unit: accepted + rejected must be read, and each accepted sample must have
    its records.

    rows: the numbers in the keys of each unit's records.
    """
    problems = []
    variants = 2 if manifest.contract.flip and not manifest.adopted else 1
    for number, unit in enumerate(manifest.units):
        if unit.accepted + sum(unit.rejected.values()) != unit.read:
            rejected = sum(unit.rejected.values())
            problems.append(f"{unit.source}: {unit.read} read is not {unit.accepted} accepted + {rejected} rejected")
        if sorted(rows[number]) != list(range(unit.accepted * variants)):
            problems.append(f"{unit.source}: its {unit.accepted} samples accepted have {len(rows[number])} records")
    return problems


def check_shard(storage: Storage, contract: Contract, entry: ShardEntry, adopted: bool) -> ShardFindings:
    """Reads one shard completely. adopted: whether another program wrote it, so that keys are arbitrary and not every
    file need belong to a record."""
    findings = ShardFindings()
    members = [member.name for member in contract.members] if adopted else None
    try:
        shard = fetch_shard(storage, entry, contract)
        record_places = [("", *place) for place in shard.index.places] if adopted else list(find_records(shard.view))
        if [(offset, size) for _, offset, size in record_places] != shard.index.places:
            raise ShardCorrupt("its index places records elsewhere than they are")
        if len(record_places) != entry.samples:
            raise ShardCorrupt(f"it holds {len(record_places)} records, the manifest says {entry.samples}")
        for row, (key, offset, size) in enumerate(record_places):
            data = shard.view[offset : offset + size]
            unit, _, number = (key or f"{entry.unit:06d}_{row:06d}").partition("_")
            digest = hashlib.sha256(data).digest()
            if digest != shard.index.digests[row].tobytes() or unit != f"{entry.unit:06d}" or not ROW.fullmatch(number):
                raise ShardCorrupt(f"record {key} in row {row} is not what its index says")
            findings.rows.append(int(number))
            record = shard.record(row, members)
            check_record(record, contract, entry.size)
            findings.moments.add(scaled_mean(image_of(record, contract, entry.size), contract))
    except LatentmillError as error:
        findings.problems.append(f"{storage.url}/{entry.name}: {error}")
    return findings


def check_uncond(storage: Storage, manifest: Manifest, findings: Findings) -> None:
    """Checks the encoded empty caption of a dataset with captions."""
    if manifest.contract.text is None:
        return
    problems = []
    try:
        read_uncond(storage, manifest)
    except LatentmillError as error:
        problems.append(str(error))
        if not manifest.adopted:
            findings.remedy(f"Delete {UNCOND} there, if it is there, and run the same `latentmill encode` again")
    findings.add("empty caption", "hash right", *problems)


def check_excluded(storage: Storage, manifest: Manifest, findings: Findings) -> None:
    """Checks the list of excluded records, which are never read."""
    if not manifest.excluded:
        return
    problems = []
    try:
        load_excluded(storage, manifest)
    except LatentmillError as error:
        problems.append(str(error))
        findings.remedy("Run the same `latentmill encode` with finalize=true, which writes the list anew")
    how = "repeated in other shards"
    if manifest.contract.filters.get("near_duplicates"):
        how += ", or near-duplicates of earlier ones"
    findings.add("excluded", f"{manifest.excluded:,} records {how}", *problems)
