"""Rows of a table as a unit: each row is a sample of an image and a .json member that holds its other columns.

Row 12 of train.parquet is the sample "train/00000012". The name of its image ends in what its first bytes say that it
is; columns `labels`, `lr` and `mask` that hold images are the files of those conditions.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.config import LimitsConfig
from pipeline.data.format.contract import canonical_json
from pipeline.errors import NotFound, ParseError, ShardCorrupt, SourceError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from preprocess.gathering.arrow import BYTES, PATH, UNREADABLE, ArrowTable
from preprocess.gathering.unit import GatheredUnit, SourceUnit
from preprocess.source.shard import Sample

SUFFIXES = (".parquet", ".arrow")
STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
"""Files that `save_to_disk` of Hugging Face's datasets writes."""
STARTS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}
STATE_BYTES = 16 << 20
DEEPEST = 32  # nesting of a value that is taken


@dataclass(frozen=True)
class Table:
    """A file of rows. url, real: as for Input. bytes: its size. image_column: as for ArrowTable."""

    storage: Storage
    key: str
    url: str
    real: str
    bytes: int
    image_column: str = ""

    @cached_property
    def opened(self) -> ArrowTable:
        """The table. Raises SourceError."""
        return ArrowTable(self.storage, self.key, self.bytes, self.image_column)

    @property
    def stem(self) -> str:
        """Its name without folders and suffix."""
        return self.key.rpartition("/")[2].rpartition(".")[0]

    def bytes_of(self, start: int, count: int) -> int:
        """The share of the file's bytes of some rows, so that all rows have all bytes; 1 at the least."""
        rows = max(1, self.opened.rows)
        return max(1, self.bytes * (start + count) // rows - self.bytes * start // rows)


@dataclass(frozen=True)
class TableContents:
    """The rows of one unit. url: of the unit."""

    table: Table
    start: int
    count: int
    url: str = field(compare=False, default="")

    def open(self, limits: LimitsConfig, name: str, stopped: threading.Event | None) -> SourceUnit:
        return TableUnit(self, limits, name, stopped)


class TableUnit(GatheredUnit):
    """Some rows of a table."""

    def __init__(
        self, contents: TableContents, limits: LimitsConfig, name: str = "", stopped: threading.Event | None = None
    ) -> None:
        table, self._start, self._count = contents.table, contents.start, contents.count
        super().__init__(contents.url, name, table.bytes_of(self._start, self._count), limits, stopped)
        self._table = table

    def samples(self) -> Iterator[Sample]:
        """Yields the samples in order; a row with a value that cannot be read is one with a problem. Raises
        ShardCorrupt."""
        try:
            for done, row in enumerate(self._table.opened.read(self._start, self._count)):
                self.refuse_stopped()
                self._position = max(1, self.bytes * (done + 1) // self._count)
                yield self._sample(self._start + done, row)
        except ShardCorrupt as error:
            raise self.corrupt(str(error), "Fetch it again") from None

    def _sample(self, number: int, row: Any) -> Sample:
        key = f"{self._table.stem}/{number:08d}"
        if row is UNREADABLE:
            self.identity.add(key, b"")
            return Sample(key, problem="row_unreadable")
        columns, members, elsewhere = self._table.opened.columns, list[tuple[str, bytes | None]](), False
        for name in (columns.image, *columns.maps):
            data, is_elsewhere = image_bytes(row[name])
            elsewhere |= is_elsewhere
            if data is not None:
                suffix = suffix_of(data) if name == columns.image else f"{name}.png"
                self.identity.add(f"{key}.{suffix}", data)
                members.append((f"{key}.{suffix}", data if len(data) <= self.limits.member_bytes else None))
        others = canonical_json({name: plain(row[name]) for name in columns.others if name in row})
        self.identity.add(f"{key}.json", others)
        members.append((f"{key}.json", others))
        sample = self.sample(key, members)
        if elsewhere and not sample.problem:
            sample.problem = "image_elsewhere"
        return sample


def image_bytes(value: Any) -> tuple[bytes | None, bool]:
    """The bytes of an image, None without one, and whether the table only says where it is."""
    if isinstance(value, dict):
        data = value.get(BYTES)
        return data, data is None and bool(value.get(PATH))
    return value, False


def suffix_of(data: bytes) -> str:
    """What an image's first bytes say that it is. What is none of the three is called jpg, and rejected as what it is
    when it is decoded."""
    return next((suffix for start, suffix in STARTS.items() if data.startswith(start)), "jpg")


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it: what JSON lacks (bytes, NaN, infinity, deeper nesting than DEEPEST) is None."""
    if depth > DEEPEST:
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {str(name): plain(item, depth + 1) for name, item in value.items()}
    return value if value is None or isinstance(value, bool | int) else None


# --------------------------------------------------------------------------------------------------------------------
# Datasets on disk


@dataclass(frozen=True)
class _DataFile:
    filename: str


@dataclass(frozen=True)
class _State:
    _data_files: tuple[_DataFile, ...]
    _indices_files: tuple[Any, ...] | None = None
    _indices_data_files: tuple[Any, ...] | None = None


def dataset_files(storage: Storage, url: str) -> list[str] | None:
    """Keys of the Arrow files of a dataset that `save_to_disk` wrote, in its order; None of a folder that is none.
    Raises SourceError for one that cannot be read."""
    if storage.exists(SPLITS):
        try:
            splits = parse_json(storage.get(SPLITS), STATE_BYTES)["splits"]
            shown = ", ".join(str(name)[:40] for name in splits)
        except (ParseError, KeyError, TypeError):
            shown = "several splits"
        raise SourceError(f"{url} holds a dataset with splits ({shown}): give one of them, as source={url}/train")
    if not storage.exists(STATE) or not storage.exists(INFO):
        return None
    try:
        state = build(_State, parse_json(storage.get(STATE), STATE_BYTES), unknown="pass")
    except (NotFound, ParseError) as error:
        raise SourceError(f"{url}/{STATE} cannot be read ({error}): save the dataset again") from None
    if state._indices_files or state._indices_data_files:
        raise SourceError(f"{url} was saved with a list of rows: save it again after dataset.flatten_indices()")
    names = [file.filename for file in state._data_files]
    for name in names:
        if "/" in name or name in ("", ".", "..") or not name.endswith(".arrow") or names.count(name) > 1:
            raise SourceError(f"{url}/{STATE} names {name[:60]!r}, which is no Arrow file of its own: save it again")
        if not storage.exists(name):
            raise SourceError(f"{url}/{name} is not there, and {STATE} names it: fetch it again")
    if not names:
        raise SourceError(f"{url} is a dataset without rows")
    return names
