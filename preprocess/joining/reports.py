"""The report of a unit of columns, which is written last and read strictly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from pipeline.data.format.bounds import Bytes, Digest, Name, Samples, TarName
from pipeline.data.format.contract import canonical_json
from pipeline.data.format.manifest import index_name
from pipeline.data.joined.columns import ColumnShard, ColumnUnit
from pipeline.errors import DestinationExists, ParseError
from pipeline.parsing.bounds import Whole
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import ObjectInfo, Storage
from preprocess.joining.plan import Joint

REPORT_FORMAT = 1
REPORT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class TarFacts:
    """One tar. of: SHA-256 of the cache's tar. without: rows of the records that have no value, in order."""

    name: TarName
    of: Digest
    samples: Samples
    bytes: Bytes
    sha256: Digest
    index_sha256: Digest
    without: tuple[Samples, ...]


@dataclass(frozen=True, kw_only=True)
class UnitReport:
    """What is known of a unit whose columns are done. contract: digest of the columns' contract. source, source_sha256,
    source_bytes, read, unused, rejected: as ColumnUnit has them."""

    format: Annotated[int, Whole(REPORT_FORMAT, REPORT_FORMAT)] = REPORT_FORMAT
    unit: Samples
    contract: Digest
    source: Name
    source_sha256: Digest
    source_bytes: Bytes
    read: Samples
    unused: Samples
    rejected: dict[str, Samples]
    tars: tuple[TarFacts, ...]

    @property
    def entry(self) -> ColumnUnit:
        """What columns.json says of it."""
        records, without = sum(tar.samples for tar in self.tars), sum(len(tar.without) for tar in self.tars)
        return ColumnUnit(
            unit=self.unit,
            source=self.source,
            source_sha256=self.source_sha256,
            source_bytes=self.source_bytes,
            read=self.read,
            unused=self.unused,
            joined=records - without,
            rejected=dict(self.rejected),
        )

    def shards(self, sizes: Sequence[tuple[int, int]]) -> list[ColumnShard]:
        """What columns.json says of its tars. sizes: of their crops."""
        return [
            ColumnShard(
                name=tar.name,
                unit=self.unit,
                size=size,
                samples=tar.samples,
                bytes=tar.bytes,
                sha256=tar.sha256,
                index_sha256=tar.index_sha256,
                of=tar.of,
            )
            for tar, size in zip(self.tars, sizes, strict=True)
        ]

    def is_there(self, sizes: dict[str, int]) -> bool:
        """Whether all of its files are there. sizes: of the objects of a storage by key."""
        return all(sizes.get(tar.name) == tar.bytes and index_name(tar.name) in sizes for tar in self.tars)


def report_bytes(report: UnitReport) -> bytes:
    """The file of a report."""
    return canonical_json(asdict(report))


def read_report(storage: Storage, joint: Joint, of: Sequence[str], contract: str) -> UnitReport:
    """The report of a unit. of: SHA-256 of the cache's tars. contract: digest of the columns' contract. Raises
    NotFound, and DestinationExists for one that is damaged, or was made of other tars or under another contract."""
    where = storage.locate(joint.report_name)
    try:
        report = build(UnitReport, parse_json(storage.get(joint.report_name), REPORT_BYTES))
        _check(report, joint)
    except ParseError as error:
        raise DestinationExists(f"{where} cannot be read ({error}): delete it and run this again") from None
    if [tar.of for tar in report.tars] != list(of):
        raise DestinationExists(
            f"{where} was made of other tars than the cache holds of {joint.unit.source}: choose another dest; or, if "
            "the cache encoded that shard anew, delete this report and run this again"
        )
    if report.contract != contract:
        raise DestinationExists(f"{where} was made with other settings: delete it and run this again")
    return report


def _check(report: UnitReport, joint: Joint) -> None:
    """Raise ParseError unless the parts of a report agree."""
    if report.unit != joint.number:
        raise ParseError(f"it is of unit {report.unit}, not {joint.number}")
    for tar in report.tars:
        if list(tar.without) != sorted(set(tar.without)) or (tar.without and tar.without[-1] >= tar.samples):
            raise ParseError(f"tars: the rows without a value of {tar.name} cannot be right")
    if sum(report.rejected.values()) != sum(len(tar.without) for tar in report.tars):
        raise ParseError("its counts do not add up")


def sizes_of(listed: Sequence[ObjectInfo]) -> dict[str, int]:
    """Sizes of objects by key."""
    return {info.key: info.size for info in listed}


EMPTY = hashlib.sha256().hexdigest()
"""SHA-256 of no bytes: of a unit without records, for which nothing is read."""
