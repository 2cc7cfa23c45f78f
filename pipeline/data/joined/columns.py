"""What a dataset of columns is: arrays for each record of a cache, made later than the cache and bound to it.

Beside each tar of the cache there is one of the same key that holds a record for each of the cache's, in the same order
and under the same key: `KEY.json` and `KEY.NAME.npy` for each column. `columns.json` is written last. It names the
cache by the digest of its manifest, and each tar by its SHA-256, so that columns fit one version of one cache and no
other. A record whose column has no value keeps its place, holds its json alone, and is in the list of excluded records.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pipeline.data.format.bounds import (
    MOST_BYTES,
    MOST_ELEMENTS,
    MOST_SAMPLES,
    MOST_UNITS,
    Bytes,
    Digest,
    MaybeDigest,
    Name,
    Samples,
)
from pipeline.data.format.contract import Member, TextFacts, canonical_json
from pipeline.data.format.manifest import LARGEST, SHARDS, SMALLEST_RECORD, ShardEntry
from pipeline.data.format.members import VARIES, text_member
from pipeline.data.format.objects import read_bounded
from pipeline.data.format.rows import Check, build_rows, counts, digests, require_dense, texts, whole
from pipeline.errors import DatasetError, NotFound, ParseError
from pipeline.parsing.bounds import Several, Text, Whole
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage

COLUMNS = "columns.json"
BOUND = "bound"
"""Folder of the copies of columns.json, one for each version of the cache: they stay when the cache grows."""
FORMAT: Literal[1] = 1
PREFIX = "column."
"""Begins the names of arrays that are no text."""
NAME = re.compile(r"[a-z0-9_]{1,57}")
"""Names of features and scores."""
MEMBER = re.compile(rf"text|tokens|{re.escape(PREFIX)}{NAME.pattern}")
TEXT_FACTS = ("storage", "layer", "length", "width", "pad", "eot", "quick_gelu", "vocabulary", "start", "captions")
"""Facts of a text that are always written."""
MOST = 32
"""Arrays of a record of columns."""


@dataclass(frozen=True, kw_only=True)
class ColumnsContract:
    """What the bytes of columns depend on, besides the cache and their source."""

    encoders: dict[str, Any]
    """The configuration of the encoders, of which the text tower was used; {} without a text."""
    text_sha256: MaybeDigest
    """Hash of the text tower's weights; "" without a text."""
    caption_key: str
    """Where captions were read: txt or json:KEY; "" without a text."""
    text: TextFacts | None
    """Facts of the text states or token ids; None without a text."""
    members: Annotated[tuple[Member, ...], Several(1, MOST)]
    """The arrays of each record: text or tokens, then column.NAME."""
    scores: Annotated[tuple[Annotated[str, Text(NAME, "the name of a score")], ...], Several(0, MOST, different=True)]
    """Names of the columns that are numbers of a sample's json; the others are arrays of its own."""
    limits: dict[str, Any]
    """Limits on untrusted input; a sample beyond them was rejected."""
    batch: Annotated[int, Whole(0, 2**31 - 1)]
    """Captions per batch of the text tower; 0 where none ran."""
    device: str
    """Kind of device on which the text tower ran, "" where none did."""
    threads: Annotated[int, Whole(0, 2**31 - 1)]
    """CPU threads of the process; 0 where a GPU or nothing computed."""
    versions: dict[str, str]
    """Versions of the packages whose arithmetic the bytes depend on."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 that identifies it."""
        return hashlib.sha256(canonical_json(plain_contract(self))).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(member.name for member in self.members)

    def differences(self, other: ColumnsContract) -> list[str]:
        """One line for each field that differs."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return [f"{name}: {str(one)[:200]}, not {str(two)[:200]}" for name, one, two in pairs if one != two]


@dataclass(frozen=True, kw_only=True)
class ColumnUnit:
    """What was read for one unit of the cache, and what became of its records."""

    unit: Annotated[int, Whole(0, MOST_UNITS)]
    """Number of the unit in the cache's manifest."""
    source: Name
    """Name of the input shard that the values were read from."""
    source_sha256: Digest
    """SHA-256 of its bytes."""
    source_bytes: Bytes
    """Its size in bytes."""
    read: Samples
    """Number of samples in it."""
    unused: Samples
    """Samples whose key no record of the unit has."""
    joined: Samples
    """Records that have their values."""
    rejected: dict[str, Samples]
    """Number of records without, by reason."""


@dataclass(frozen=True, kw_only=True)
class ColumnShard(ShardEntry):
    """One tar of columns; name, unit, size and samples are those of the cache's tar."""

    VERB: ClassVar[str] = "columns"

    of: Digest
    """SHA-256 of the cache's tar, whose records it has."""


UNITS: dict[str, Check] = {
    "unit": whole(0, MOST_UNITS),
    "source": texts,
    "source_sha256": digests,
    "source_bytes": whole(0, MOST_BYTES),
    "read": whole(0, MOST_SAMPLES),
    "unused": whole(0, MOST_SAMPLES),
    "joined": whole(0, MOST_SAMPLES),
    "rejected": counts,
}


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What columns.json holds besides its lists."""

    dataset: Digest
    """Digest of the cache's manifest."""
    version: Annotated[int, Whole(1, 999_999)]
    """Version of the cache."""
    contract: ColumnsContract
    uncond_sha256: MaybeDigest
    """SHA-256 of uncond.npy, the encoded empty caption; "" without a text."""
    excluded: Samples = 0
    """Number of records without a value (listed in excluded_name)."""
    excluded_sha256: MaybeDigest = ""
    """SHA-256 of that list; "" without such records."""
    format: Literal[1] = FORMAT
    """Version of the stored layout."""


@dataclass(frozen=True, kw_only=True)
class Columns(_Facts):
    """The manifest of finished columns."""

    units: tuple[ColumnUnit, ...]
    shards: tuple[ColumnShard, ...]

    @property
    def name(self) -> str:
        """Key of the copy that stays when the cache grows."""
        return f"{BOUND}/{self.dataset}.json"

    @property
    def excluded_name(self) -> str:
        """Key of the list of records without a value: int32 (N, 2) .npy of shard number and row, sorted."""
        return f"{BOUND}/{self.dataset}.excluded.npy"

    @property
    def rejected(self) -> dict[str, int]:
        """Number of records without a value, by reason."""
        total: dict[str, int] = {}
        for unit in self.units:
            for reason, count in unit.rejected.items():
                total[reason] = total.get(reason, 0) + count
        return total

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, which identifies these columns and, by what they hold, their cache."""
        return hashlib.sha256(columns_bytes(self)).hexdigest()


def columns_bytes(columns: Columns) -> bytes:
    """The canonical bytes of columns.json."""
    return canonical_json(dataclasses.asdict(columns) | {"contract": plain_contract(columns.contract)})


def plain_contract(contract: ColumnsContract) -> dict[str, Any]:
    """The plain values of a contract. Facts of a text that came later than TEXT_FACTS are there only where they say
    something, so that columns keep their bytes and digest."""
    value = dataclasses.asdict(contract)
    if contract.text is not None:
        defaults = {fact.name: fact.default for fact in dataclasses.fields(contract.text)}
        facts = value["text"].items()
        value["text"] = {name: item for name, item in facts if name in TEXT_FACTS or item != defaults[name]}
    return value


def parse_columns(data: bytes) -> Columns:
    """Parse columns.json. Raises ParseError when it is damaged or of a format that this version cannot read."""
    require_dense(data)
    value = parse_json(data, LARGEST)
    if type(value) is not dict or type(value.get("format")) is not int:
        raise ParseError("it is no list of columns")
    if value["format"] != FORMAT:
        raise ParseError(f"its format is {value['format']}, this version reads {FORMAT}: use a newer latentmill")
    names = {field.name for field in dataclasses.fields(Columns)}
    if wrong := sorted(names ^ set(value)):
        raise ParseError(f"it has missing or unknown fields: {', '.join(wrong[:5])}")
    units = build_rows(ColumnUnit, value["units"], UNITS, "units")
    shards = build_rows(ColumnShard, value["shards"], {**SHARDS, "of": digests}, "shards")
    facts = build(_Facts, {name: item for name, item in value.items() if name not in ("units", "shards")})
    parts = {field.name: getattr(facts, field.name) for field in dataclasses.fields(_Facts)}
    columns = Columns(units=units, shards=shards, **parts)
    check_contract(columns.contract)
    _check(columns)
    if columns_bytes(columns) != data:
        raise ParseError("it is not written as latentmill writes it")
    return columns


def check_contract(contract: ColumnsContract) -> None:
    """Raise ParseError where facts of columns contradict each other."""
    if len(set(contract.names)) != len(contract.names):
        raise ParseError("members has an array twice")
    if contract.text is not None and contract.text != contract.text.of_one:
        raise ParseError("text: columns hold one caption of a record")
    wanted = () if contract.text is None else (text_member(contract.text),)
    found = tuple(member for member in contract.members if member.name in ("text", "tokens"))
    if found != wanted or bool(contract.text_sha256) != bool(wanted) or bool(contract.caption_key) != bool(wanted):
        raise ParseError("members, text, text_sha256 and caption_key do not say the same of a text")
    for name in contract.scores:
        if Member(name=PREFIX + name, shape=(), dtype="float32") not in contract.members:
            raise ParseError(f"scores: {name} is none of its members, or no float32 without axes")
    for member in contract.members:
        if not MEMBER.fullmatch(member.name):
            raise ParseError(f"members: {member.name} is no name of a column")
        varies = VARIES in member.shape and member.name != "text"
        size = 1
        for side in member.shape:
            size *= max(side, 1)
        if varies or size > MOST_ELEMENTS:
            raise ParseError(f"members: {member.name} has the shape {member.shape}, which no column can have")


def _check(columns: Columns) -> None:
    """Raise ParseError where parts of columns.json contradict each other."""
    numbers = [unit.unit for unit in columns.units]
    if numbers != sorted(set(numbers)):
        raise ParseError("units: they do not stand in the order of their numbers, each once")
    if len({shard.name for shard in columns.shards}) != len(columns.shards):
        raise ParseError("shards: two have one name")
    known, records = set(numbers), dict.fromkeys(numbers, 0)
    for number, shard in enumerate(columns.shards):
        if shard.unit not in known:
            raise ParseError(f"shards[{number}].unit={shard.unit}: there is no such unit")
        if shard.samples * SMALLEST_RECORD > shard.bytes:
            raise ParseError(f"shards[{number}]: {shard.samples} records do not fit into {shard.bytes} bytes")
        records[shard.unit] += shard.samples
    for unit in columns.units:
        if unit.joined + sum(unit.rejected.values()) != records[unit.unit]:
            raise ParseError(f"units: the counts of unit {unit.unit} do not add up")
    if columns.excluded != sum(columns.rejected.values()) or bool(columns.excluded) != bool(columns.excluded_sha256):
        raise ParseError(f"excluded={columns.excluded}: it fits neither the records nor excluded_sha256")
    if bool(columns.uncond_sha256) != (columns.contract.text is not None):
        raise ParseError("uncond_sha256: it is of the empty caption, which columns with a text have")


def is_columns(storage: Storage) -> bool:
    """Whether finished columns lie there."""
    return storage.exists(COLUMNS)


def load_columns(storage: Storage, dataset: str = "") -> Columns:
    """The columns at `storage` that are bound to the cache with this digest, or where there are none, the newest.
    Raises DatasetError, which says what to do, where they are missing or damaged."""
    try:
        newest = _read(storage, COLUMNS)
    except NotFound:
        raise DatasetError(
            f"{storage.url} holds no {COLUMNS}, so it holds no finished columns: run the same `latentmill columns` "
            "again, or correct the path"
        ) from None
    if not dataset or newest.dataset == dataset:
        return newest
    try:
        former = _read(storage, f"{BOUND}/{dataset}.json")
    except NotFound:
        return newest
    return former if former.dataset == dataset else newest


def _read(storage: Storage, key: str) -> Columns:
    """The columns of an object. Raises NotFound, DatasetError."""
    try:
        return parse_columns(read_bounded(storage, key, LARGEST))
    except ParseError as error:
        raise DatasetError(
            f"{storage.locate(key)} cannot be read: {error}. Restore it, or delete it and run the same `latentmill "
            "columns` again"
        ) from None
