"""Reads the shards of MDS datasets (mosaicml-streaming) strictly and as a stream: an index.json that lists them, and
for each a file of a count, offsets, the columns as JSON, then the samples.

A shard is read to its end and hashed; hashes that its index states are compared. Columns that hold pickles are never
opened. Source: the documentation of mosaicml-streaming, "Dataset format".
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from pipeline.config import LimitsConfig
from pipeline.data.format.bounds import Bytes, Samples
from pipeline.data.format.objects import read_bounded
from pipeline.errors import NotFound, ParseError, SourceError, StorageError
from pipeline.parsing.bounds import Several, Whole
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage, check_key
from preprocess.adopting.arrays import Foreign
from preprocess.source.shard import SourceShard

INDEX = "index.json"
INDEX_BYTES, COLUMN_BYTES = 1 << 28, 1 << 20
SAMPLE_MEMBERS = 4
"""A sample's bytes are bounded by this many of its largest members."""
HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "blake2b", "blake2s")
"""Hashes of an index that are compared; others (xxh64, ...) are not in Python's library and are passed over."""
CHUNK = 8 * 1024 * 1024
Size = Annotated[int, Whole(1, 2**32 - 1)]


@dataclass(frozen=True)
class _File:
    basename: str
    bytes: Bytes
    hashes: dict[str, str]


@dataclass(frozen=True)
class MdsFacts:
    """What the index says of a shard. column_sizes: bytes of a column, None where they differ between samples."""

    format: str
    version: int
    column_names: Annotated[tuple[str, ...], Several(1, 1024, different=True)]
    column_encodings: tuple[str, ...]
    column_sizes: tuple[Size | None, ...]
    raw_data: _File
    samples: Samples


@dataclass(frozen=True)
class _Index:
    version: int
    shards: tuple[MdsFacts, ...]


def read_mds_index(storage: Storage, key: str) -> list[MdsFacts]:
    """The shards that an index.json lists. Raises SourceError, which names it."""
    where = storage.locate(key)
    try:
        index = build(_Index, parse_json(read_bounded(storage, key, INDEX_BYTES), INDEX_BYTES), unknown="pass")
        for number, facts in enumerate(index.shards):
            columns = len(facts.column_names)
            if (facts.format, facts.version, index.version) != ("mds", 2, 2):
                raise ParseError(f"shards[{number}]: mds of version 2 is read, not {facts.format[:20]} {facts.version}")
            if not columns == len(facts.column_encodings) == len(facts.column_sizes):
                raise ParseError(f"shards[{number}]: {columns} columns have not as many encodings and sizes")
            check_key(facts.raw_data.basename)
    except (ParseError, StorageError) as error:
        raise SourceError(f"{where} is no index of MDS shards that can be read: {error}") from None
    if not index.shards:
        raise SourceError(f"{where} lists no shard")
    return list(index.shards)


class MdsShard(SourceShard):
    """One shard. Iterate over `records()` once; after that `sha256` and `bytes` are those of the whole shard."""

    def __init__(self, storage: Storage, key: str, facts: MdsFacts, limits: LimitsConfig) -> None:
        try:
            super().__init__(storage, key, limits)
        except NotFound:
            raise SourceError(
                f"{storage.locate(key)} is not there: fetch it, or decompress it beside its index, as in "
                f"`zstd -d {key}.zstd`; compressed shards are not read"
            ) from None
        self.facts = facts
        self._stated = {name: hashlib.new(name) for name in facts.raw_data.hashes if name in HASHES}

    def records(self) -> Iterator[Foreign]:
        """Yields the samples in order; the key of each is its number. Raises ShardCorrupt."""
        if self.bytes != self.facts.raw_data.bytes:
            raise self._corrupt(0, f"it has {self.bytes} bytes, its index says {self.facts.raw_data.bytes}")
        (count,) = struct.unpack("<I", self._read(4, "the number of samples"))
        if count != self.facts.samples or count > self._limits.members:
            raise self._corrupt(0, f"it holds {count} samples, its index says {self.facts.samples}")
        offsets = np.frombuffer(self._read(4 * (count + 1), "the offsets"), "<u4").astype(np.int64)
        sizes = np.diff(offsets)
        if (sizes < 0).any() or offsets[-1] != self.bytes or not 0 <= offsets[0] - self.position <= COLUMN_BYTES:
            raise self._corrupt(4, "its offsets do not lead through the shard to its end")
        self._check_columns(self._read(int(offsets[0]) - self.position, "the columns"))
        for row, size in enumerate(sizes.tolist()):
            key = f"{row:08d}"
            if size > SAMPLE_MEMBERS * self._limits.member_bytes:
                self._pass(size)
                detail = f"it has more than {SAMPLE_MEMBERS} x limits.member_bytes"
                yield Foreign(key, reason="record_too_large", detail=detail)
                continue
            yield self._sample(key, memoryview(self._read(size, "a sample")))
        for name, digest in self._stated.items():
            if digest.hexdigest() != self.facts.raw_data.hashes[name]:
                raise self._corrupt(0, f"its {name} is not what its index says")

    def _check_columns(self, data: bytes) -> None:
        """Raises ShardCorrupt unless the shard says of its columns what its index says."""
        facts = self.facts
        wanted: dict[str, tuple[object, ...]] = {"column_names": facts.column_names}
        wanted |= {"column_encodings": facts.column_encodings, "column_sizes": facts.column_sizes}
        try:
            value = parse_json(data, COLUMN_BYTES)
        except ParseError as error:
            raise self._corrupt(4, f"its columns cannot be read: {error}") from None
        if type(value) is not dict or any(value.get(name) != list(item) for name, item in wanted.items()):
            raise self._corrupt(4, "its columns are not those of its index")

    def _sample(self, key: str, data: memoryview) -> Foreign:
        """The columns of a sample: the sizes of those that vary, then the bytes of all."""
        facts, at = self.facts, 4 * sum(size is None for size in self.facts.column_sizes)
        varying = iter(np.frombuffer(data[:at], "<u4").tolist() if at and len(data) >= at else ())
        sizes = [next(varying, 0) if size is None else size for size in facts.column_sizes]
        if at + sum(sizes) != len(data):
            return Foreign(key, reason="member_unreadable", detail="its columns do not fill it")
        files = dict[str, memoryview]()
        for name, size in zip(facts.column_names, sizes, strict=True):
            files[name], at = data[at : at + size], at + size
        return Foreign(key, files, dict(zip(facts.column_names, facts.column_encodings, strict=True)))

    def _pass(self, size: int) -> None:
        while size:
            size -= len(self._read(min(size, CHUNK), "a sample"))

    def _next_chunk(self) -> bytes:
        chunk = super()._next_chunk()
        for digest in self._stated.values():
            digest.update(chunk)
        return chunk
