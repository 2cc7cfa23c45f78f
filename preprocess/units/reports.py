"""The reports of units: read strictly, and the one that says that a unit is left out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

from pipeline.config.values.bounds import Ge
from pipeline.data.format.contract import canonical_json
from pipeline.errors import DestinationExists, NotFound, ParseError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from preprocess.encoding.census import Census
from preprocess.encoding.plan import report_key
from preprocess.encoding.writer import Moments
from preprocess.units.matching import Known
from preprocess.units.naming import option

REPORT_FORMAT = 1
REPORT_BYTES = 64 * 1024 * 1024
READERS = 32  # small objects that are read at a time
UNIT_FILE = re.compile(r"(?:units/(?P<report>\d{6,})\..+|(?P<tar>\d{6,})(?:-\d+x\d+)?\.(?:tar|index\.json))", re.DOTALL)
"""Keys of the files of a unit."""
HASH = re.compile("[0-9a-f]{64}")
BIN = re.compile(r"-?\d{1,9}", re.ASCII)

Count = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class _Source:
    name: str
    sha256: str
    bytes: Count


@dataclass(frozen=True)
class _Shard:
    name: str
    size: tuple[Count, Count]
    index_sha256: str
    samples: Count
    bytes: Count
    sha256: str


@dataclass(frozen=True)
class _Moments:
    count: Count
    mean: tuple[float, ...]
    m2: tuple[float, ...]


@dataclass(frozen=True)
class _Census:
    aspects: dict[str, Count]
    sides: dict[str, Count]
    tokens: dict[str, Count]
    sizes: dict[str, Count]
    classes: dict[str, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class _Report:
    """What a report holds."""

    format: int
    unit: Count
    contract: str
    source: _Source
    read: Count
    accepted: Count
    rejected: dict[str, Count]
    passed_over: Count
    truncated: Count
    retried: Count
    shards: tuple[_Shard, ...]
    hashes_sha256: str
    statistics: _Moments
    census: _Census
    member_bytes: dict[str, Count]
    thumbnails: tuple[dict[str, Any], ...]
    cut_boxes: Count = 0
    profiles: dict[str, Count] = field(default_factory=dict)
    cut_captions: Count = 0
    left_out: bool = False


@dataclass(frozen=True)
class Report:
    """The report of a unit. sha256: of its bytes."""

    facts: dict[str, Any]
    sha256: str

    @property
    def left_out(self) -> bool:
        """Whether the unit is not encoded, since it was asked for so."""
        return bool(self.facts.get("left_out"))

    @property
    def known(self) -> Known | None:
        """What it says of the input shard; None where that was left out."""
        source = self.facts["source"]
        return None if self.left_out else Known(source["bytes"], source["sha256"])


def read_reports(storage: Storage, numbers: Iterable[int], names: Sequence[str]) -> dict[int, Report]:
    """Reads the reports of those units that have one, by number. names: of all units.

    Raises DestinationExists for one that is damaged or of another version.
    """

    def read(number: int) -> Report | None:
        try:
            return read_report(storage, number, names[number])
        except NotFound:
            return None

    numbers = list(numbers)
    with ThreadPoolExecutor(READERS) as pool:
        found = zip(numbers, pool.map(read, numbers), strict=True)
        return {number: report for number, report in found if report is not None}


def read_report(storage: Storage, number: int, name: str) -> Report:
    """Reads the report of one unit. Raises NotFound, and DestinationExists like read_reports."""
    data = storage.get(report_key(number))
    try:
        facts = parse_json(data, REPORT_BYTES)
        report = build(_Report, facts, unknown="pass")
        _check(report, number, name)
        return Report(facts, hashlib.sha256(data).hexdigest())
    except ParseError as error:
        raise DestinationExists(
            f"{storage.locate(report_key(number))} is damaged, or not a report of this version ({error}): run this "
            f"once with {option('forget', [name])}, which takes the shard back, then again without"
        ) from None


def _check(report: _Report, number: int, name: str) -> None:
    """Raises ParseError unless the parts of a report agree."""
    if report.format != REPORT_FORMAT or report.unit != number:
        raise ParseError(f"format={report.format}, unit={report.unit}: {REPORT_FORMAT} and {number} are wanted")
    if report.source.name != name:
        raise ParseError(f"source.name={report.source.name[:60]}: {name} is wanted")
    if report.accepted + sum(report.rejected.values()) != report.read:
        raise ParseError("its counts do not add up")
    for shard in report.shards:
        match = UNIT_FILE.fullmatch(shard.name)
        if match is None or not shard.name.endswith(".tar") or int(match["tar"] or -1) != number:
            raise ParseError(f"shards: {shard.name[:60]!r} is no tar of this unit")
        if not HASH.fullmatch(shard.sha256) or not HASH.fullmatch(shard.index_sha256):
            raise ParseError(f"shards: {shard.name} has no SHA-256")
    if len({shard.name for shard in report.shards}) != len(report.shards):
        raise ParseError("shards: one is named twice")
    if not HASH.fullmatch(report.source.sha256):
        raise ParseError("source.sha256 is no SHA-256")
    if len(report.statistics.mean) != len(report.statistics.m2) or not report.statistics.mean:
        raise ParseError("statistics: as many mean as m2 are wanted")
    for bin_ in (*report.census.aspects, *report.census.sides, *report.census.tokens, *report.census.classes):
        if not BIN.fullmatch(bin_):
            raise ParseError(f"census: {bin_[:20]!r} is no number of a bin")


def left_out_report(number: int, name: str, contract: str) -> bytes:
    """The report of a unit that is left out. contract: digest of the dataset's."""
    return canonical_json(
        {
            "format": REPORT_FORMAT,
            "unit": number,
            "contract": contract,
            "source": {"name": name, "sha256": hashlib.sha256().hexdigest(), "bytes": 0},
            "read": 0,
            "accepted": 0,
            "rejected": {},
            "passed_over": 0,
            "truncated": 0,
            "retried": 0,
            "shards": [],
            "hashes_sha256": "",
            "statistics": Moments().to_json(),
            "census": Census().to_json(),
            "member_bytes": {},
            "thumbnails": [],
            "left_out": True,
        }
    )


def unit_of(key: str) -> int | None:
    """Number of the unit that an object's key is of; None for other objects."""
    match = UNIT_FILE.fullmatch(key)
    return None if match is None else int(match["report"] or match["tar"])


def files_of(storage: Storage, numbers: Iterable[int]) -> list[str]:
    """Keys of all objects of these units: reports first, then what else lies in units/, tars and indexes."""
    wanted = set(numbers)
    if not wanted:
        return []
    keys = [info.key for info in storage.list() if unit_of(info.key) in wanted]
    reports = {report_key(number) for number in wanted}
    return sorted(keys, key=lambda key: (key not in reports, not key.startswith("units/"), key))
