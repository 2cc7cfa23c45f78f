"""The reports of units: read strictly, and the one that says that a unit is left out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

from pipeline.config.values.bounds import Ge
from pipeline.data.format.contract import canonical_json
from pipeline.errors import DestinationExists, NotFound, ParseError, StorageError
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
HEAD_BYTES = 8 * 1024
"""Bytes of a report that are read where its thumbnails are not wanted. Before them lie some two thousand, and more with
many classes or buckets."""
THUMBNAILS = b',"thumbnails":['
"""Begins them. No text in JSON can hold it: quotes in texts are escaped."""
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


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What a report says before its thumbnails: its keys are sorted."""

    format: int
    contract: str
    source: _Source
    read: Count
    accepted: Count
    rejected: dict[str, Count]
    passed_over: Count
    retried: Count
    shards: tuple[_Shard, ...]
    hashes_sha256: str
    statistics: _Moments
    census: _Census
    member_bytes: dict[str, Count]
    cut_boxes: Count = 0
    profiles: dict[str, Count] = field(default_factory=dict)
    cut_captions: Count = 0
    left_out: bool = False


@dataclass(frozen=True, kw_only=True)
class _Report(_Head):
    """What a report holds."""

    thumbnails: tuple[dict[str, Any], ...]
    truncated: Count
    unit: Count


@dataclass(frozen=True)
class Report:
    """The report of a unit, or what it says before its thumbnails. sha256: of its bytes; "" where not all were read."""

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
    return _read_all(numbers, lambda number: read_report(storage, number, names[number]))


def read_heads(storage: Storage, sizes: Mapping[int, int], names: Sequence[str]) -> dict[int, Report]:
    """Like read_reports, but of large reports only what lies before their thumbnails, which are most of their bytes.
    sizes: of the reports in bytes, by number."""
    return _read_all(sizes, lambda number: _read_head(storage, number, names[number], sizes[number]))


def _read_all(numbers: Iterable[int], read: Callable[[int], Report]) -> dict[int, Report]:
    """What `read` gives for each number, but for those for which it raises NotFound."""

    def found(number: int) -> Report | None:
        try:
            return read(number)
        except NotFound:
            return None

    numbers = list(numbers)
    with ThreadPoolExecutor(READERS) as pool:
        reports = zip(numbers, pool.map(found, numbers), strict=True)
        return {number: report for number, report in reports if report is not None}


def _read_head(storage: Storage, number: int, name: str, size: int) -> Report:
    """Reads a report up to its thumbnails, or all of it where it is small, or where they are not found so. Raises what
    read_report raises."""
    if size > HEAD_BYTES:
        with suppress(StorageError, ParseError):  # replaced by a smaller one meanwhile, or damaged: read_report says so
            before, found, _ = storage.get_range(report_key(number), 0, HEAD_BYTES).partition(THUMBNAILS)
            facts = parse_json(before + b"}", HEAD_BYTES)
            if found and isinstance(facts, dict) and list(facts) == sorted(facts):
                _check_head(build(_Head, facts, unknown="pass"), number, name)
                return Report(facts, "")
    report = read_report(storage, number, name)
    return Report({key: value for key, value in report.facts.items() if key != "thumbnails"}, report.sha256)


def read_report(storage: Storage, number: int, name: str) -> Report:
    """Reads the report of one unit. Raises NotFound, and DestinationExists like read_reports."""
    data = storage.get(report_key(number))
    try:
        facts = parse_json(data, REPORT_BYTES)
        report = build(_Report, facts, unknown="pass")
        if report.unit != number:
            raise ParseError(f"unit={report.unit}: {number} is wanted")
        _check_head(report, number, name)
        return Report(facts, hashlib.sha256(data).hexdigest())
    except ParseError as error:
        raise DestinationExists(
            f"{storage.locate(report_key(number))} is damaged, or not a report of this version ({error}): run this "
            f"once with {option('forget', [name])}, which takes the shard back, then again without"
        ) from None


def _check_head(report: _Head, number: int, name: str) -> None:
    """Raises ParseError unless the parts of a report agree."""
    if report.format != REPORT_FORMAT:
        raise ParseError(f"format={report.format}: {REPORT_FORMAT} is wanted")
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
