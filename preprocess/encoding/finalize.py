"""From units to a dataset: which are done, what they hold, which records are repeated, and the manifest, last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import EncodeConfig
from pipeline.data.format.manifest import MANIFEST, UNCOND, Manifest, ShardEntry, Statistics, UnitEntry, commit_manifest
from pipeline.data.format.records import npy_bytes, parse_npy
from pipeline.errors import DataError, DestinationExists, NotFound, SourceError
from pipeline.storage.base import Storage
from preprocess.encoding.claims import CLAIMS
from preprocess.encoding.output import REPORT_FORMAT, Destination
from preprocess.encoding.plan import Plan, Unit, report_key
from preprocess.encoding.writer import Moments
from preprocess.source.recipe import recipe_of_contract
from preprocess.source.sample import DIGEST_BYTES, FILTERED

READERS = 32  # small objects read at a time


@dataclass(frozen=True)
class Report:
    """A unit's report. sha256: of its bytes."""

    facts: dict[str, Any]
    sha256: str


def read_reports(storage: Storage, numbers: Iterable[int]) -> list[Report]:
    """Reports of units that are done. Raises NotFound, and DestinationExists for one that this version did not
    write."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda number: read_report(storage, number), numbers))


def read_report(storage: Storage, number: int) -> Report:
    """One unit's report. Raises as read_reports."""
    data = storage.get(report_key(number))
    try:
        facts = json.loads(data)
        if facts["format"] == REPORT_FORMAT and facts["unit"] == number:
            return Report(facts, hashlib.sha256(data).hexdigest())
    except (ValueError, KeyError, TypeError):
        pass
    raise DestinationExists(
        f"{storage.locate(report_key(number))} is not a report of this version: delete it and run again"
    )


def survey(destination: Destination, units: list[Unit]) -> set[int]:
    """Numbers of the units that are done in one dataset: reported, with all that the report names there.

    The report of a unit whose tar or index is gone is removed, so that the unit is made again. Shards are compared by
    size here; `latentmill verify` compares hashes. Raises DestinationExists for a unit made from another shard or under
    another contract.
    """
    storage = destination.storage
    there = {info.key: info.size for info in storage.list("")}
    reported = [unit for unit in units if unit.report_name in there]
    done = set()
    for unit, report in zip(reported, read_reports(storage, (unit.number for unit in reported)), strict=True):
        facts = report.facts
        if facts["contract"] != destination.digest or facts["source"]["bytes"] != unit.bytes:
            raise DestinationExists(
                f"{storage.locate(unit.report_name)} was made from another {unit.name} (of {facts['source']['bytes']} "
                f"bytes, now {unit.bytes}) or another contract: choose another dest, or delete it and {MANIFEST}"
            )
        wanted = {shard["name"]: shard["bytes"] for shard in facts["shards"]}
        wanted |= {name.removesuffix(".tar") + ".index.json": None for name in wanted}
        if all(_is_there(storage, there, key, size) for key, size in wanted.items()):
            done.add(unit.number)
        else:
            storage.delete(unit.report_name)
    return done


def _is_there(storage: Storage, listed: dict[str, int], key: str, size: int | None) -> bool:
    """Whether an object is there, with this size; a listing that lacks it may be behind the times."""
    found = listed.get(key)
    if found is None:
        try:
            found = storage.stat(key).size
        except NotFound:
            return False
    return size is None or found == size


def missing_units(storage: Storage, plan: Plan) -> list[int]:
    """Numbers of the units without a report."""
    there = {info.key for info in storage.list("units/")}
    return [
        number
        for number in range(len(plan.names))
        if report_key(number) not in there and not storage.exists(report_key(number))
    ]


# --------------------------------------------------------------------------------------------------------------------
# The manifest


def finalize(storage: Storage, plan: Plan, config: EncodeConfig) -> tuple[Manifest, list[Report], bool]:
    """Reconciles all units of the plan and writes the manifest.

    Returns it, the reports, and whether this call wrote it. Raises SourceError when too much was rejected, and NotFound
    when a unit is not done.
    """
    reports = read_reports(storage, range(len(plan.names)))
    moments, units, shards = Moments(), list[UnitEntry](), list[ShardEntry]()
    for number, (report, name) in enumerate(zip(reports, plan.names, strict=True)):
        facts = report.facts
        if facts["source"]["name"] != name or facts["accepted"] + sum(facts["rejected"].values()) != facts["read"]:
            raise DataError(
                f"{storage.locate(report_key(number))} does not add up, or is not of {name}: delete it and run again"
            )
        moments.merge(Moments(**facts["statistics"]))
        units.append(
            UnitEntry(
                source=name,
                source_sha256=facts["source"]["sha256"],
                source_bytes=facts["source"]["bytes"],
                read=facts["read"],
                accepted=facts["accepted"],
                rejected=facts["rejected"],
            )
        )
        shards += [ShardEntry(**{**shard, "size": tuple(shard["size"])}, unit=number) for shard in facts["shards"]]
    refuse_rejects(units, config.max_rejects, ", ".join(part.source for part in plan.parts))
    excluded = find_repeated(storage, plan, reports)
    manifest = Manifest(
        contract=plan.contract,
        units=tuple(units),
        shards=tuple(shards),
        uncond_sha256=hashlib.sha256(storage.get(UNCOND)).hexdigest(),
        statistics=Statistics(mean=tuple(moments.mean.tolist()), std=tuple(moments.std.tolist())),
        sources=tuple(part.source for part in plan.parts),
        excluded=len(excluded),
        excluded_sha256=hashlib.sha256(npy_bytes(excluded)).hexdigest() if len(excluded) else "",
        version=len(plan.parts),
    )
    if len(excluded):
        storage.put(manifest.excluded_name, npy_bytes(excluded))
    return manifest, reports, commit_manifest(storage, manifest)


def refuse_rejects(units: list[UnitEntry], max_rejects: float, source: str) -> None:
    """Raises SourceError when nothing is left, or more samples are defective than max_rejects allows."""
    read, accepted = sum(unit.read for unit in units), sum(unit.accepted for unit in units)
    total: dict[str, int] = {}
    for unit in units:
        for reason, count in unit.rejected.items():
            total[reason] = total.get(reason, 0) + count
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(total.items(), key=lambda item: -item[1]))
    if not accepted:
        raise SourceError(f"{source} holds no usable sample: {read} read, rejected: {reasons or 'none'}")
    defects = sum(count for reason, count in total.items() if not reason.startswith(FILTERED))
    if defects > max_rejects * read:
        raise SourceError(
            f"{source}: {defects} of {read} samples were rejected ({reasons}), more than max_rejects={max_rejects:g}. "
            "Mend the source, or run again with a higher max_rejects to accept that"
        )


def find_repeated(storage: Storage, plan: Plan, reports: list[Report]) -> np.ndarray:
    """(N, 2) int32, sorted: shard number and row of each record whose sample stands in an earlier unit already.

    Of equal samples the one in the unit of the lowest number stays, whatever the order in which units were encoded.
    Takes about 50 bytes of memory a sample.
    """
    variants = recipe_of_contract(plan.contract).variants
    digests, places, shard = list[np.ndarray](), list[np.ndarray](), 0
    for report in reports:
        facts = report.facts
        if facts["hashes_sha256"]:
            data = storage.get(report_key(facts["unit"]).replace(".json", ".hashes.npy"))
            if hashlib.sha256(data).hexdigest() != facts["hashes_sha256"]:
                raise DataError(f"{storage.url}: the hashes of unit {facts['unit']} are damaged: delete its report")
            table = parse_npy(memoryview(data))
            digests.append(table[:, :DIGEST_BYTES])
            places.append(_places(table, facts["shards"], plan, shard))
        shard += len(facts["shards"])
    if not digests:
        return np.empty((0, 2), dtype=np.int32)
    keys = np.ascontiguousarray(np.concatenate(digests)).view(f"V{DIGEST_BYTES}").reshape(-1)
    _, first = np.unique(keys, return_index=True)
    repeated = np.ones(len(keys), dtype=bool)
    repeated[first] = False
    found = np.concatenate(places)[repeated]
    rows = found[:, None, 1] * variants + np.arange(variants)
    pairs = np.stack([np.broadcast_to(found[:, :1], rows.shape), rows], axis=-1).reshape(-1, 2)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].astype(np.int32)


def _places(table: np.ndarray, shards: list[dict[str, Any]], plan: Plan, first_shard: int) -> np.ndarray:
    """(N, 2): shard number of each sample of a unit, and how many samples stand before it there."""
    buckets = np.ascontiguousarray(table[:, DIGEST_BYTES:]).view("<u2").reshape(-1)
    numbers = {plan.contract.buckets.index(tuple(shard["size"])): i for i, shard in enumerate(shards)}
    places = np.empty((len(buckets), 2), dtype=np.int64)
    for bucket, i in numbers.items():
        here = buckets == bucket
        places[here, 0], places[here, 1] = first_shard + i, np.arange(here.sum())
    return places


def tidy(storage: Storage, seconds: float) -> None:
    """Removes what workers that died have left: claims, and files that nobody has written to for `seconds`."""
    for info in storage.list(f"{CLAIMS}/"):
        storage.delete(info.key)
    storage.sweep(seconds)


def summary(url: str, manifest: Manifest) -> str:
    """What the verb ends with."""
    read = sum(unit.read for unit in manifest.units)
    rejects = ", ".join(f"{count:,} {reason}" for reason, count in sorted(manifest.rejected.items())) or "none"
    repeated = f", {manifest.excluded:,} repeated in other shards" if manifest.excluded else ""
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    later = f", version {manifest.version}" if manifest.version > 1 else ""
    return (
        f"encode: {url} is complete: {manifest.samples:,} records of {read:,} samples read (rejected: "
        f"{rejects}{repeated}) in "
        f"{len(manifest.shards)} shards, {size:,.1f} MB, dataset {manifest.digest[:12]}{later}"
    )
