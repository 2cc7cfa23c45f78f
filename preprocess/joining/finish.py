"""Turns the finished units of columns into columns.json, which makes them readable."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.data.format.manifest import UNCOND, Manifest
from pipeline.data.format.records import npy_bytes
from pipeline.data.joined.columns import COLUMNS, Columns, ColumnsContract, ColumnShard, columns_bytes, parse_columns
from pipeline.errors import DestinationExists, NotFound, ParseError, SourceError
from pipeline.storage.base import Storage
from preprocess.encoding.rejects import REJECTS
from preprocess.joining.plan import Joint
from preprocess.joining.reports import UnitReport, read_report, sizes_of
from preprocess.units.reports import READERS


def reports_of(
    dest: Storage, manifest: Manifest, contract: ColumnsContract, joints: Sequence[Joint]
) -> dict[int, UnitReport]:
    """The reports of the units that are done, by number: those with a report, and with all files that it names. A
    report whose files are gone is deleted, so that the unit is made again. Raises DestinationExists."""
    sizes = sizes_of(dest.list(""))
    reported = [joint for joint in joints if joint.report_name in sizes]

    def read(joint: Joint) -> UnitReport:
        of = [manifest.shards[number].sha256 for number in joint.shards]
        return read_report(dest, joint, of, contract.digest)

    with ThreadPoolExecutor(READERS) as pool:
        reports = list(pool.map(read, reported))
    found = {}
    for joint, report in zip(reported, reports, strict=True):
        if report.is_there(sizes):
            found[joint.number] = report
        else:
            dest.delete(joint.report_name)
    return found


def finalize(
    dest: Storage,
    manifest: Manifest,
    contract: ColumnsContract,
    joints: Sequence[Joint],
    max_rejects: float,
) -> tuple[Columns, int, bool]:
    """Merges all units and writes columns.json. Returns them, the number of samples that no record has, and whether
    this call wrote it. Raises SourceError when too many records have no value, NotFound when a unit is not done."""
    reports = reports_of(dest, manifest, contract, joints)
    if len(reports) < len(joints):
        raise NotFound(f"{dest.url}: a report is gone: run this again")
    shards: dict[int, ColumnShard] = {}
    places: list[tuple[int, int]] = []
    for joint in joints:
        report = reports[joint.number]
        entries = report.shards([manifest.shards[number].size for number in joint.shards])
        shards |= dict(zip(joint.shards, entries, strict=True))
        places += [(n, row) for n, tar in zip(joint.shards, report.tars, strict=True) for row in tar.without]
    units = [reports[joint.number].entry for joint in joints]
    excluded = np.array(sorted(places), dtype=np.int32).reshape(-1, 2)
    data = npy_bytes(excluded)
    columns = Columns(
        dataset=manifest.digest,
        version=manifest.version,
        contract=contract,
        uncond_sha256=hashlib.sha256(dest.get(UNCOND)).hexdigest() if contract.text is not None else "",
        excluded=len(excluded),
        excluded_sha256=hashlib.sha256(data).hexdigest() if len(excluded) else "",
        units=tuple(units),
        shards=tuple(shards[number] for number in sorted(shards)),
    )
    refuse_rejects(dest, columns, max_rejects)
    if len(excluded):
        dest.put(columns.excluded_name, data)
    is_first = commit(dest, columns)
    return columns, sum(unit.unused for unit in units), is_first


def refuse_rejects(dest: Storage, columns: Columns, max_rejects: float) -> None:
    """Raise SourceError when no record has a value, or more lack one than max_rejects allows."""
    records = sum(shard.samples for shard in columns.shards)
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(columns.rejected.items(), key=lambda one: -one[1]))
    if columns.excluded == records:
        raise SourceError(
            f"{dest.url}: none of the cache's {records:,} records has a value ({reasons or 'it is empty'})"
        )
    if columns.excluded > max_rejects * records:
        raise SourceError(
            f"{dest.url}: {columns.excluded:,} of the cache's {records:,} records have no value ({reasons}; listed in "
            f"{REJECTS}), more than max_rejects={max_rejects:g}. Run again with a higher max_rejects, which leaves "
            "them out of what is read; or mend the source, delete dest, and run this again"
        )


def commit(dest: Storage, columns: Columns) -> bool:
    """Publish columns: the copy for this version of the cache first, then columns.json, which may replace that of an
    earlier version. False if they were published already. Raises DestinationExists where others lie."""
    data = columns_bytes(columns)
    if not dest.put_if_absent(columns.name, data) and dest.get(columns.name) != data:
        raise DestinationExists(
            f"{dest.locate(columns.name)} holds other columns than this run makes: if it is damaged, delete it and run "
            "this again; else choose another dest"
        )
    if dest.put_if_absent(COLUMNS, data):
        return True
    try:
        published = parse_columns(dest.get(COLUMNS))
    except ParseError as error:
        raise DestinationExists(f"{dest.locate(COLUMNS)} cannot be read ({error}): delete it, and run again") from None
    if published.version > columns.version or published.digest == columns.digest:
        return False
    dest.put(COLUMNS, data)
    return True


def summary(url: str, columns: Columns, unused: int) -> str:
    """The last line that the verb prints."""
    records = sum(shard.samples for shard in columns.shards)
    rejects = ", ".join(f"{count:,} {reason}" for reason, count in sorted(columns.rejected.items())) or "none"
    rejects += f", listed in {REJECTS}" if columns.rejected else ""
    size = sum(shard.bytes for shard in columns.shards) / 1e6
    more = f"; {unused:,} samples of the source have the key of no record" if unused else ""
    return (
        f"columns: {url} is complete: {', '.join(columns.contract.names)} of {records - columns.excluded:,} of "
        f"{records:,} records (without a value: {rejects}) in {len(columns.shards)} tars, {size:,.1f} MB, columns "
        f"{columns.digest[:12]} of dataset {columns.dataset[:12]}{more}"
    )
