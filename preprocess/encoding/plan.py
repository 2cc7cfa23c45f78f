"""The plan of a destination: its contract, the input shards that it was begun with, and those appended later.

`contract.json` holds the first shards and never changes; `plans/000002.json` and so on hold each group of shards that
was appended to the finished dataset, and stay once a manifest holds them. A unit is one input shard; its number is its
position in the whole plan, and its name is the end of its path. preprocess/units finds which shard is which unit.
"""

from __future__ import annotations

import collections
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pipeline.config import LimitsConfig
from pipeline.config.values.bounds import Ge
from pipeline.data.format.contract import Contract, canonical_json
from pipeline.data.format.contract_json import contract_from_json, contract_to_json, format_of
from pipeline.data.format.manifest import FORMAT
from pipeline.errors import DestinationExists, NotFound, ParseError, SourceError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from preprocess.gathering.unit import Contents, SourceUnit
from preprocess.source.shard import SourceShard

PLAN = "contract.json"
PARTS = "plans"
REPORTS = "units/"
"""Begins the keys of all reports, and of what else is kept of units."""
PART_KEY = re.compile(rf"{PARTS}/(\d{{6}})\.json")


@dataclass(frozen=True)
class Unit:
    """One input shard and the place it is read from. name: its name in the plan. bytes: its current size. contents: of
    files of a folder or rows of a table, what they are."""

    number: int
    storage: Storage
    key: str
    name: str
    bytes: int
    contents: Contents | None = field(default=None, repr=False, compare=False)

    def open(self, limits: LimitsConfig, stopped: threading.Event | None = None) -> SourceUnit:
        """The shard, to be read. stopped: once it is set, reading raises Interrupted. Raises NotFound, StorageError."""
        if self.contents is None:
            return SourceShard(self.storage, self.key, limits, self.name, stopped)
        return self.contents.open(limits, self.name, stopped)

    @property
    def report_name(self) -> str:
        """Key of its report, which is written last."""
        return report_key(self.number)

    @property
    def hashes_name(self) -> str:
        """Key of what duplicates and near-duplicates of its samples are found by, when these are filtered."""
        return hashes_key(self.number)

    def tar_name(self, size: tuple[int, int], buckets: int) -> str:
        """Key of its cached tar of crops of `size` (width, height)."""
        return f"{self.number:06d}.tar" if buckets == 1 else f"{self.number:06d}-{size[0]}x{size[1]}.tar"


def report_key(number: int) -> str:
    """Key of the report of a unit."""
    return f"{REPORTS}{number:06d}.json"


def hashes_key(number: int) -> str:
    """Key of the hashes of a unit."""
    return f"{REPORTS}{number:06d}.hashes.npy"


@dataclass(frozen=True)
class Part:
    """Input shards that were planned together. source: their pattern, without the folders of a machine.

    Of units that were gathered from files of a folder or rows of a table: unit_size: samples in each; 0 where all are
    tars. image_column: of the images of tables, as it was asked for. listing: SHA-256 of the list of the files of each
    unit (preprocess/gathering/listing.py), "" without a folder.
    """

    source: str
    names: tuple[str, ...]
    unit_size: int = 0
    image_column: str = ""
    listing: str = ""

    def facts(self) -> dict[str, Any]:
        """What its file holds. What is so of tars is not said, so that their plans have the bytes that they had."""
        gathered = {"unit_size": self.unit_size, "image_column": self.image_column, "listing": self.listing}
        return {"source": self.source, "units": self.names} | {name: fact for name, fact in gathered.items() if fact}


@dataclass(frozen=True)
class Plan:
    """The contract and all input shards of a destination. format: of its manifests, which stays that of the first."""

    contract: Contract
    parts: tuple[Part, ...]
    format: Literal[2, 3] = FORMAT

    @property
    def names(self) -> list[str]:
        """Names of all units, in the order of their numbers."""
        return [name for part in self.parts for name in part.names]

    def until(self, parts: int) -> Plan:
        """The plan of the first parts alone."""
        return replace(self, parts=self.parts[:parts])

    def with_part(self, part: Part) -> Plan:
        """The plan with another part at its end."""
        return replace(self, parts=(*self.parts, part))

    def sources(self) -> str:
        """The patterns of all parts, for messages."""
        return ", ".join(part.source for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class _StoredPart:
    """The file of a part."""

    source: str
    units: tuple[str, ...]
    unit_size: Annotated[int, Ge(0)] = 0
    image_column: str = ""
    listing: str = ""

    def part(self) -> Part:
        return Part(self.source, self.units, self.unit_size, self.image_column, self.listing)


@dataclass(frozen=True, kw_only=True)
class _StoredPlan(_StoredPart):
    """contract.json."""

    contract: dict[str, Any]


def read_plan(storage: Storage) -> Plan | None:
    """The plan of a destination, or None when it has none yet. Raises DestinationExists when it cannot be read."""
    key = PLAN
    try:
        first = build(_StoredPlan, parse_json(storage.get(PLAN)))
        contract = contract_from_json(first.contract)
        parts = [first.part()]
        for key in sorted(info.key for info in storage.list(f"{PARTS}/") if PART_KEY.fullmatch(info.key)):
            if key != part_key(len(parts) + 1):
                raise ParseError(f"{part_key(len(parts) + 1)} is missing")
            try:
                later = build(_StoredPart, parse_json(storage.get(key)))
            except NotFound:
                break  # a worker has just taken it back
            parts.append(later.part())
        plan = Plan(contract, tuple(parts), format_of(first.contract))
        _check_names(plan.names)
        return plan
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DestinationExists(f"{storage.url}/{key} cannot be read ({error}): choose another dest") from None


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ParseError("it names an input shard twice")
    for name in names:
        if not name or "\0" in name or ".." in name.split("/"):
            raise ParseError(f"it names an input shard {name[:60]!r}")


def part_key(number: int) -> str:
    """Key of a part, counted from 1."""
    return PLAN if number == 1 else f"{PARTS}/{number:06d}.json"


def part_bytes(part: Part) -> bytes:
    """The file of an appended part."""
    return canonical_json(part.facts())


def plan_bytes(contract: Contract, part: Part, format: Literal[2, 3] = FORMAT) -> bytes:
    """The file of the first part."""
    value = contract_to_json(contract, format)
    return canonical_json(part.facts() | {"contract": value})


def name_units(urls: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Names for input shards: file names, preceded by as many folders as make all of them different, and different from
    `taken`.

    Raises SourceError when one is given twice, or no name is left for it.
    """
    paths, known = [url.split("/") for url in urls], set(taken)
    repeated: list[str] = []
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        repeated = [name for name, count in collections.Counter(names).items() if count > 1 or name in known]
        if not repeated:
            return names
    if not repeated:
        return []
    if repeated[0] in known:
        raise SourceError(f"{repeated[0]} is the name of another shard of this dataset already: rename the file")
    raise SourceError(f"{repeated[0]} is given twice")
