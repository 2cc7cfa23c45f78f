"""Turns finished units into a dataset: finds which units are done and which records are repeated, then writes the
manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from pipeline.config import EncodeConfig
from pipeline.data.format.manifest import UNCOND, Manifest, ShardEntry, Statistics, UnitEntry, commit_manifest
from pipeline.data.format.records import npy_bytes
from pipeline.errors import DataError, DestinationExists, NotFound, SourceError
from pipeline.storage.base import ObjectInfo, Storage
from preprocess.encoding.claims import APPENDING, CLAIMS
from preprocess.encoding.output import Destination
from preprocess.encoding.plan import REPORTS, Plan, Unit, report_key
from preprocess.encoding.rejects import REJECTS
from preprocess.encoding.writer import Moments
from preprocess.filters.excluded import Excluded, find_excluded, forget_it
from preprocess.source.sample import FILTERED
from preprocess.units.naming import SHOWN, option
from preprocess.units.ours import refuse_foreign
from preprocess.units.reports import Report, left_out_report, read_report, read_reports


def survey(
    destination: Destination, units: list[Unit], reports: Mapping[int, Report], listed: Sequence[ObjectInfo]
) -> set[int]:
    """Numbers of the units that are done in one dataset: those with a report, and with all files that the report names.

    reports, listed: what was found at the destination. Deletes the report of a unit whose tar or index is gone, so that
    the unit is encoded again. Compares the sizes of tars; `latentmill verify` compares hashes. Raises DestinationExists
    for a unit that was made under another contract, or whose tar would be written over something else.
    """
    storage = destination.storage
    listed_sizes = {info.key: info.size for info in listed}
    done = set()
    for unit in (unit for unit in units if unit.number in reports):
        facts = reports[unit.number].facts
        if facts["contract"] != destination.digest:
            raise DestinationExists(
                f"{storage.locate(unit.report_name)} was made under another contract: run this once with "
                f"{option('forget', [unit.name])}, then again without"
            )
        expected_sizes = {shard["name"]: shard["bytes"] for shard in facts["shards"]}
        expected_sizes |= {name.removesuffix(".tar") + ".index.json": None for name in expected_sizes}
        if all(_is_there(storage, listed_sizes, key, size) for key, size in expected_sizes.items()):
            done.add(unit.number)
    undone = [unit for unit in units if unit.number not in done]
    refuse_foreign(storage, listed, (unit.number for unit in undone))
    for unit in undone:
        if unit.number in reports:
            storage.delete(unit.report_name)
    return done


def leave_out(destination: Destination, plan: Plan, numbers: Iterable[int]) -> None:
    """Records that units are left out, by reports that say so. Raises DestinationExists for one that is encoded."""
    names = plan.names
    for number in sorted(numbers):
        data = left_out_report(number, names[number], destination.digest)
        storage, key = destination.storage, report_key(number)
        if not storage.put_if_absent(key, data) and not read_report(storage, number, names[number]).left_out:
            raise DestinationExists(
                f"{option('leave_out', [names[number]])}: {storage.url} has encoded it already. Run this once with "
                f"{option('forget', [names[number]])}, which takes back what was made of it, then again without"
            )


def _is_there(storage: Storage, listed: dict[str, int], key: str, size: int | None) -> bool:
    """Whether an object exists with this size (None: any size). Looks again for a key that is not listed, as the
    listing may be out of date."""
    actual_size = listed.get(key)
    if actual_size is None:
        try:
            actual_size = storage.stat(key).size
        except NotFound:
            return False
    return size is None or actual_size == size


def missing_units(storage: Storage, plan: Plan) -> list[int]:
    """Numbers of the units without a report, and perhaps of some with one: the listing may be out of date, and units
    without one in it are looked at one by one only up to the first that really has none."""
    listed_keys = {info.key for info in storage.list(REPORTS)}
    missing = [number for number in range(len(plan.names)) if report_key(number) not in listed_keys]
    while missing and storage.exists(report_key(missing[0])):
        missing.pop(0)
    return missing


# --------------------------------------------------------------------------------------------------------------------
# The manifest


def finalize(storage: Storage, plan: Plan, config: EncodeConfig) -> tuple[Manifest, list[Report], Excluded, bool]:
    """Merges all units of the plan and writes the manifest.

    Returns the manifest, the reports, the excluded records, and whether this call wrote the manifest. Raises
    SourceError when too many samples were rejected, and NotFound when a unit is not done.
    """
    names = plan.names
    found = read_reports(storage, range(len(names)), names)
    if len(found) < len(names):
        raise NotFound(f"{storage.url}: a report is gone: run this again")
    reports = [found[number] for number in range(len(names))]
    moments, units, shards = Moments(), list[UnitEntry](), list[ShardEntry]()
    for number, (report, name) in enumerate(zip(reports, names, strict=True)):
        facts = report.facts
        if facts["accepted"] and len(facts["statistics"]["mean"]) != plan.contract.latent_shape[0]:
            raise DataError(f"{storage.locate(report_key(number))} is damaged: {forget_it(name)}")
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
    refuse_rejects(units, config.max_rejects, plan.sources())
    excluded = find_excluded(storage, plan, reports)
    pairs = npy_bytes(excluded.pairs)
    manifest = Manifest(
        contract=plan.contract,
        units=tuple(units),
        shards=tuple(shards),
        uncond_sha256=hashlib.sha256(storage.get(UNCOND)).hexdigest() if plan.contract.text else "",
        statistics=Statistics(mean=tuple(moments.mean.tolist()), std=tuple(moments.std.tolist())),
        sources=tuple(part.source for part in plan.parts),
        excluded=len(excluded.pairs),
        excluded_sha256=hashlib.sha256(pairs).hexdigest() if len(excluded.pairs) else "",
        version=len(plan.parts),
        format=plan.format,
    )
    if len(excluded.pairs):
        storage.put(manifest.excluded_name, pairs)
    return manifest, reports, excluded, commit_manifest(storage, manifest)


def refuse_rejects(units: list[UnitEntry], max_rejects: float, source: str) -> None:
    """Raises SourceError when no sample was accepted, or when more are defective than max_rejects allows."""
    read, accepted = sum(unit.read for unit in units), sum(unit.accepted for unit in units)
    total: dict[str, int] = {}
    for unit in units:
        for reason, count in unit.rejected.items():
            total[reason] = total.get(reason, 0) + count
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(total.items(), key=lambda item: -item[1]))
    if not accepted:
        listed = f", listed in {REJECTS}" if reasons else ""
        raise SourceError(f"{source} holds no usable sample: {read} read, rejected: {reasons or 'none'}{listed}")
    defects = _defects(total)
    if defects > max_rejects * read:
        raise SourceError(
            f"{source}: {defects} of {read} samples were rejected ({reasons}; listed in {REJECTS}), more than "
            f"max_rejects={max_rejects:g}. Run again with a higher max_rejects to accept that; or mend the source, and "
            f"run this once with {option('forget', worst(units))}, then again without"
        )


def worst(units: Sequence[UnitEntry]) -> list[str]:
    """Names of the shards with defective samples, those with most first."""
    spoilt = [unit for unit in units if _defects(unit.rejected)]
    return [unit.source for unit in sorted(spoilt, key=lambda unit: -_defects(unit.rejected))]


def _defects(rejected: Mapping[str, int]) -> int:
    """Number of samples that were rejected and are no choice of a filter."""
    return sum(count for reason, count in rejected.items() if not reason.startswith(FILTERED))


def tidy(storage: Storage, seconds: float) -> None:
    """Removes what dead workers have left: claims on units, and temporary files that nobody has written to for
    `seconds`."""
    for info in storage.list(f"{CLAIMS}/"):
        if not info.key.startswith(f"{CLAIMS}/{APPENDING}"):
            storage.delete(info.key)
    storage.sweep(seconds)


def shown(names: Sequence[str]) -> list[str]:
    """The first few names, and how many there are of them."""
    return [*names[:SHOWN], *([f"{len(names) - SHOWN} more"] if len(names) > SHOWN else [])]


def summary(url: str, manifest: Manifest, reports: Sequence[Report], excluded: Excluded) -> str:
    """The last line that the verb prints."""
    read = sum(unit.read for unit in manifest.units)
    rejects = ", ".join(f"{count:,} {reason}" for reason, count in sorted(manifest.rejected.items())) or "none"
    rejects += f", listed in {REJECTS}" if manifest.rejected else ""
    repeated = f", {excluded.repeated:,} repeated in other shards" if excluded.repeated else ""
    repeated += f", {excluded.near:,} near-duplicates of earlier ones" if excluded.near else ""
    cut = sum(report.facts.get("cut_boxes", 0) for report in reports)
    repeated += f"; {cut:,} boxes left out" if cut else ""
    applied, unusable = (profiles(reports, outcome) for outcome in ("applied", "unusable"))
    repeated += f"; {applied:,} converted to sRGB by their colour profiles" if applied else ""
    repeated += f"; {unusable:,} with a colour profile that cannot be used, taken as sRGB" if unusable else ""
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    version = f", version {manifest.version}" if manifest.version > 1 else ""
    left_out = f"; left out: {', '.join(shown(manifest.left_out))}" if manifest.left_out else ""
    return (
        f"encode: {url} is complete: {manifest.samples:,} records of {read:,} samples read (rejected: "
        f"{rejects}{repeated}) in "
        f"{len(manifest.shards)} shards, {size:,.1f} MB, dataset {manifest.digest[:12]}{version}{left_out}"
    )


def profiles(reports: Sequence[Report], outcome: str) -> int:
    """Number of accepted samples whose colour profile had this outcome."""
    return sum(report.facts.get("profiles", {}).get(outcome, 0) for report in reports)
