"""Converts one unit: its tars, one for each size of crop, their indexes, and last the report that says that the unit
is done.

The bytes of all of them depend on the unit and the contract alone, so that any process may convert any unit any number
of times.
"""

from __future__ import annotations

import collections
import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pipeline.config import LimitsConfig
from pipeline.data.format.bounds import Bytes, Digest, Name, Samples, Side
from pipeline.data.format.contract import Contract, canonical_json
from pipeline.data.format.manifest import ShardEntry, index_name
from pipeline.data.format.records import Record, record_key
from pipeline.errors import DestinationExists, NotFound, ParseError, RecordRejected, SourceError
from pipeline.models.encoders.text import TextTower
from pipeline.parsing.bounds import Real, Several, Whole
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from preprocess.adopting.convert import draw, fit
from preprocess.adopting.inputs import Input
from preprocess.encoding.output import disk_errors
from preprocess.encoding.plan import report_key
from preprocess.encoding.rejects import Rejects, rejects_key
from preprocess.encoding.writer import Moments, ShardWriter, scaled_mean
from preprocess.source.rejected import bounded, rejected

REPORT_FORMAT = 1
REPORT_BYTES = 1 << 24
MOST_SIZES = 256
"""Sizes of latents in a unit, each of which is a file that is open at the same time."""


@dataclass(frozen=True)
class Tar:
    """One tar of a unit. size: (width, height) of its crops in pixels."""

    name: Name
    size: tuple[Side, Side]
    samples: Samples
    bytes: Bytes
    sha256: Digest
    index_sha256: Digest

    def entry(self, unit: int) -> ShardEntry:
        """Its entry in the manifest."""
        return ShardEntry(unit=unit, **asdict(self))


@dataclass(frozen=True)
class Spread:
    """Moments as plain values."""

    count: Annotated[int, Whole(0, 2**62)]
    mean: tuple[float, ...]
    m2: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """What was found in a unit. settings: SHA-256 of what it was converted with. problem: the first reject in words.
    lowest: the smallest log-variance; None without any."""

    unit: Annotated[int, Whole(0, 10**8)]
    settings: Digest
    source: Name
    source_sha256: Digest
    source_bytes: Bytes
    read: Samples
    accepted: Samples
    rejected: dict[str, Samples]
    shards: Annotated[tuple[Tar, ...], Several(0, MOST_SIZES)]
    statistics: Spread
    problem: str = ""
    lowest: Annotated[float, Real(-1e9, 1e9)] | None = None
    format: Annotated[int, Whole(REPORT_FORMAT, REPORT_FORMAT)] = REPORT_FORMAT

    @property
    def moments(self) -> Moments:
        """The statistics of its latents."""
        return Moments(**asdict(self.statistics))


def read_unit(storage: Storage, number: int, name: str, settings: str) -> Report | None:
    """The report of a unit whose files are all there; None where it is still to be converted. Raises DestinationExists
    for one that is damaged, or of other settings."""
    key = report_key(number)
    try:
        report = build(Report, parse_json(storage.get(key), REPORT_BYTES))
        counted = report.accepted + sum(report.rejected.values())
        if (report.unit, report.source) != (number, name) or counted != report.read:
            raise ParseError(f"it is of {report.source[:60]!r}, or its counts do not add up")
        if any(tar.name != tar_name(number, tar.size) for tar in report.shards):
            raise ParseError("it names a tar that is not of this unit")
    except NotFound:
        return None
    except ParseError as error:
        raise DestinationExists(f"{storage.locate(key)} is damaged ({error}): delete it, and run this again") from None
    if report.settings != settings:
        raise DestinationExists(f"{storage.locate(key)} was made with other settings: choose another dest")
    for tar in report.shards:
        try:
            if storage.stat(tar.name).size != tar.bytes or not storage.exists(index_name(tar.name)):
                return None
        except NotFound:
            return None
    return report


def tar_name(number: int, size: tuple[int, int]) -> str:
    """Key of the tar of crops of one size of a unit."""
    return f"{number:06d}-{size[0]}x{size[1]}.tar"


@dataclass
class _Growing:
    """A tar that grows in a temporary file."""

    path: Path
    file: BinaryIO
    writer: ShardWriter


@dataclass
class UnitWriter:
    """The tars of one unit. `convert`, then `publish`; leave it by `discard`, which removes temporary files."""

    storage: Storage
    number: int
    contract: Contract
    tars: dict[tuple[int, int], _Growing] = field(default_factory=dict)
    indexes: dict[str, bytes] = field(default_factory=dict)
    rejects: bytes = b""

    def convert(
        self, unit: Input, limits: LimitsConfig, tower: TextTower | None, settings: str, strict: Callable[[str], None]
    ) -> Report:
        """Reads the unit to its end and writes its tars. strict: called with the first reject in words. Raises
        ShardCorrupt for a damaged unit, StorageError."""
        facts, contract = self.contract.converted, self.contract
        assert facts is not None, "a contract of `index dest=`"
        rejects, moments, rows, lowest, problem = Rejects(unit.name), Moments(), 0, math.inf, ""
        with unit.open(limits) as reader:
            for found in reader.records():
                try:
                    drawn = draw(found, facts, contract.stored, contract.caption_key, limits)
                    record = fit(drawn, contract, tower)
                except RecordRejected as error:
                    sample = rejected(found.key, error)
                    rejects.add(sample)
                    if not problem:
                        problem = bounded(f"{unit.name}, record {sample.key}: {sample.message}")
                        strict(problem)
                    continue
                key = record_key(self.number, rows)
                self._add(Record(key, record.arrays, record.meta), record.size)
                moments.add(scaled_mean(record.arrays[contract.stored], contract))
                rows, lowest = rows + 1, min(lowest, record.lowest)
            sha256, size = reader.sha256, reader.bytes
        self.rejects = rejects.lines()
        return Report(
            unit=self.number,
            settings=settings,
            source=unit.name,
            source_sha256=sha256,
            source_bytes=size,
            read=rows + rejects.counts.total(),
            accepted=rows,
            rejected=dict(rejects.counts),
            shards=self._finish(),
            statistics=build(Spread, moments.to_json()),
            problem=problem,
            lowest=None if lowest == math.inf else lowest,
        )

    def _add(self, record: Record, size: tuple[int, int]) -> None:
        with disk_errors(self.storage):
            if size not in self.tars:
                if len(self.tars) == MOST_SIZES:
                    raise SourceError(f"unit {self.number} has latents of more than {MOST_SIZES} sizes: convert fewer")
                path = self.storage.staging_path()
                file = path.open("xb")
                self.tars[size] = _Growing(path, file, ShardWriter(file))
            self.tars[size].writer.add(record)

    def _finish(self) -> tuple[Tar, ...]:
        found = []
        for size, tar in sorted(self.tars.items()):
            with disk_errors(self.storage):
                facts = tar.writer.finish()
                tar.file.close()
            name = tar_name(self.number, size)
            self.indexes[name] = canonical_json(facts)
            digest = hashlib.sha256(self.indexes[name]).hexdigest()
            rest: dict[str, Any] = {key: facts[key] for key in ("samples", "bytes", "sha256")}
            found.append(Tar(name, size, index_sha256=digest, **rest))
        return tuple(found)

    def publish(self, report: Report) -> None:
        """Publishes tars, indexes and the list of rejects, then the report."""
        for size, tar in sorted(self.tars.items()):
            name = tar_name(self.number, size)
            self.storage.put_file(name, tar.path)
            self.storage.put(index_name(name), self.indexes[name])
        if self.rejects:
            self.storage.put(rejects_key(self.number), self.rejects)
        self.storage.put(report_key(self.number), canonical_json(asdict(report)))

    def discard(self) -> None:
        """Removes what was not published."""
        for tar in self.tars.values():
            with suppress(OSError):
                tar.file.close()
            with suppress(OSError):
                tar.path.unlink(missing_ok=True)


def total(reports: list[Report]) -> collections.Counter[str]:
    """Rejects of all units by reason."""
    return sum((collections.Counter(report.rejected) for report in reports), collections.Counter[str]())
