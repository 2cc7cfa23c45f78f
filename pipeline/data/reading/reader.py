"""Reads blocks and verifies each by the hashes of its records.

A shard's index is read once, compared with the manifest, and kept in a compact form; a block is then one ranged read
into memory of a pool. Columns that are read with a dataset cost one more ranged read each, into the same memory.
"""

from __future__ import annotations

import collections
import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from pipeline.data.format.contract import Contract, TextFacts
from pipeline.data.format.index import DIGEST, Index, parse_index
from pipeline.data.format.manifest import ShardEntry
from pipeline.data.format.members import has_several, held, require_array
from pipeline.data.format.records import Record, unpack
from pipeline.data.joined.records import merged, require_keys, split
from pipeline.data.order.dataset import Dataset
from pipeline.data.reading.captions import array_of
from pipeline.data.reading.columns import Column, find_columns
from pipeline.data.reading.disk_cache import DiskCache
from pipeline.data.reading.memory import Pool
from pipeline.errors import ParseError, ShardCorrupt, StorageError
from pipeline.storage.base import Storage

INDEX_BYTES = 256_000_000  # of indexes that are kept in memory
LARGEST_SPAN = 1 << 30
"""Bytes from the first to the last record of a block, at most."""


@dataclass(frozen=True)
class Beside:
    """The part of a block that holds the records of columns. offsets, sizes: (n,) of the records in the block's bytes.
    names: their arrays, of those that the reader was made for. text: whether they have the captions."""

    offsets: np.ndarray
    sizes: np.ndarray
    names: tuple[str, ...]
    text: bool

    def record(self, view: memoryview, place: int, members: Sequence[str]) -> Record:
        """Record number `place`, with these of its arrays. view: of the block's bytes. Raises ShardCorrupt."""
        offset = int(self.offsets[place])
        return unpack(view[offset : offset + int(self.sizes[place])], members, captions=self.text)


class Block:
    """A verified block in memory.

    data: (m,) uint8, its bytes. shard, rows: shard number and rows of its records. columns: the positions in `data` of
    the arrays that the reader was made for. captions: whether its records have one. text: facts of the captions where
    records hold several of them, else None. png: (width, height) of its crops where their pixels are stored as PNGs,
    else None. beside: where its bytes hold the records of columns.
    """

    def __init__(
        self,
        data: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        *,
        shard: int,
        rows: np.ndarray,
        columns: dict[str, Column],
        layout: dict[str, str] | None = None,
        captions: bool = True,
        text: TextFacts | None = None,
        png: tuple[int, int] | None = None,
        beside: Sequence[Beside] = (),
    ) -> None:
        self.data, self.shard, self.rows, self.columns = data, shard, rows, columns
        self.text, self.png = text, png
        self._offsets, self._sizes, self._layout, self._captions = offsets, sizes, layout, captions
        self._beside = tuple(beside)

    def record(self, place: int, members: Sequence[str] | None = None) -> Record:
        """Record number `place` of the block; its arrays are views of the block's bytes."""
        offset = int(self._offsets[place])
        view = self.data.data[offset : offset + int(self._sizes[place])]
        theirs = {name for beside in self._beside for name in beside.names}
        own = None if members is None else [name for name in members if name not in theirs]
        record = unpack(view, own, layout=self._layout, captions=self._captions)
        for beside in self._beside:
            wanted = [name for name in beside.names if members is None or name in members]
            record = merged(record, beside.record(self.data.data, place, wanted), text=beside.text)
        return record

    def array(self, name: str, place: int) -> np.ndarray:
        """The array `name` of record `place`, one of `columns`, as a view of the block's bytes."""
        column = self.columns[name]
        shape, start = column.shape(place), column.starts[place]
        size = math.prod(shape) * column.dtype.itemsize
        return self.data[start : start + size].view(column.dtype).reshape(shape)

    def of_caption(self, name: str, place: int, row: int) -> np.ndarray:
        """What readers call `name`, text or tokens, of caption `row` of record `place`. Raises ShardCorrupt."""
        if self.text is None:
            return self.array(name, place)
        parts: tuple[str, ...] = ("captions", "text")
        arrays = {part: self.array(part, place) for part in parts if part in self.columns}
        return array_of(name, arrays, row, self.text)


@dataclass(frozen=True)
class _Stretch:
    """Where some records lie in a tar: from byte `start` on, `length` bytes; offsets from there, sizes and SHA-256 of
    each record."""

    storage: Storage
    entry: ShardEntry
    index: Index
    rows: np.ndarray
    start: int
    length: int
    offsets: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray

    @classmethod
    def of(cls, storage: Storage, entry: ShardEntry, index: Index, rows: np.ndarray) -> _Stretch:
        """Of the records of `rows`. Raises ShardCorrupt where they lie too far apart."""
        offsets, sizes = index.offsets[rows], index.sizes[rows]
        start, end = int(offsets[0]), int(offsets[-1] + sizes[-1])
        if end - start > LARGEST_SPAN:
            raise ShardCorrupt(
                f"{storage.locate(entry.name)}: records {rows[0]} to {rows[-1]} lie within {end - start} bytes, and "
                f"{LARGEST_SPAN} at most are read at once: pack it into smaller tars"
            )
        return cls(storage, entry, index, rows, start, end - start, offsets - start, sizes, index.digests[rows])


class Reader:
    """Reads blocks of one dataset. Indexes up to INDEX_BYTES are kept in memory, and blocks in `cache`. Thread-safe.

    members: arrays whose columns a block has, as readers call them; where records hold several captions, it has those
    that hold the captions' arrays instead. pool: provides the memory of blocks.
    """

    def __init__(
        self,
        dataset: Dataset,
        cache: DiskCache | None = None,
        *,
        members: Sequence[str] = (),
        pool: Pool | None = None,
    ) -> None:
        self._dataset, self._cache = dataset, cache
        self._members, self._pool = tuple(members), pool or Pool()
        self._indexes: collections.OrderedDict[tuple[int, str], Future[Index]] = collections.OrderedDict()
        self._index_bytes = 0
        self._lock = threading.Lock()

    def read(self, number: int) -> Block:
        """A block all of whose records match the index; it is read once more if they do not (a read can go wrong).

        Raises ShardCorrupt when they still do not, and StorageError or NotFound when the block cannot be read.
        """
        stretch, rows = self._dataset[number], self._dataset.rows(number)
        (storage, entry), index = self._dataset.shard(stretch.shard), self._index(stretch.shard)
        manifest, shard = self._dataset.manifest_of(stretch.shard)
        own, theirs = split(self._members, manifest.columns)
        parts = [_Stretch.of(storage, entry, index, rows)]
        read = [(bound, names) for bound, names in zip(manifest.columns, theirs, strict=True) if names]
        for bound, _ in read:
            of_columns = bound.columns.shards[shard]
            parts.append(
                _Stretch.of(bound.storage, of_columns, self._index(stretch.shard, bound.storage, of_columns), rows)
            )
        data = self._pool.take(sum(part.length for part in parts))
        columns: dict[str, Column] = {}
        beside: list[Beside] = []
        begin, text = 0, manifest.contract.text
        for part, names in zip(parts, [held(own, text), *(names for _, names in read)], strict=True):
            view = data[begin : begin + part.length]
            self._fill(view, part, f"{part.entry.sha256[:24]}-{stretch.first}-{stretch.count}")
            try:
                if begin:
                    bound = read[len(beside)][0]
                    require_keys(bound, shard, rows, (data[: parts[0].length], parts[0].offsets), (view, part.offsets))
                    beside.append(Beside(begin + part.offsets, part.sizes, tuple(names), bound.has_text))
                found = find_columns(view, part.offsets, part.sizes, names, part.index.layout)
                require_arrays(found, manifest.contract, entry.size)
            except ShardCorrupt as error:
                raise ShardCorrupt(f"{part.storage.locate(part.entry.name)}: {error}") from None
            columns |= {name: column.moved(begin) for name, column in found.items()} if begin else found
            begin += part.length
        return Block(
            data,
            parts[0].offsets,
            parts[0].sizes,
            shard=stretch.shard,
            rows=rows,
            columns=columns,
            layout=index.layout,
            captions=manifest.own.contract.text is not None,
            text=text if has_several(text) else None,
            png=entry.size if manifest.contract.pixels == "png" else None,
            beside=beside,
        )

    def _fill(self, view: np.ndarray, part: _Stretch, name: str) -> None:
        """Fill `view` with verified bytes, from the disk cache where it has them. name: under which it has them."""
        facts = part.offsets, part.sizes, part.digests
        cached = self._cache is not None and self._cache.read_into(name, view.data)
        if not cached or _first_mismatch(view, *facts) is not None:
            _fetch(part.storage, part.entry, part.start, view, part.rows, facts)
            if self._cache is not None:
                self._cache.put(name, view.data)

    def _index(self, shard: int, storage: Storage | None = None, entry: ShardEntry | None = None) -> Index:
        """A shard's index, read and verified once as long as it is kept. storage, entry: of columns' tar of that
        number, instead of the shard itself."""
        place = (shard, "" if storage is None else storage.url)
        with self._lock:
            future = self._indexes.get(place)
            reads_index = future is None
            if future is None:
                future = self._indexes[place] = Future()
            self._indexes.move_to_end(place)
        if reads_index:
            try:
                if storage is None or entry is None:
                    storage, entry = self._dataset.shard(shard)
                index = read_index(storage, entry)
            except BaseException as error:
                with self._lock:
                    del self._indexes[place]
                future.set_exception(error)
                raise
            future.set_result(index)
            with self._lock:
                self._index_bytes += index.nbytes
                while self._index_bytes > INDEX_BYTES and len(self._indexes) > 1:
                    oldest = next(iter(self._indexes))
                    if not self._indexes[oldest].done():
                        break
                    self._index_bytes -= self._indexes.pop(oldest).result().nbytes
        return future.result()


def require_arrays(columns: Mapping[str, Column], contract: Contract, size: tuple[int, int]) -> None:
    """Raise ShardCorrupt unless columns are arrays of the contract, in records whose crops are `size`."""
    for name, column in columns.items():
        shapes = {column.shapes} if isinstance(column.shapes, tuple) else set(column.shapes)
        for shape in shapes:
            require_array(name, column.dtype.name, shape, contract, size)


def _fetch(
    storage: Storage,
    entry: ShardEntry,
    start: int,
    data: np.ndarray,
    rows: np.ndarray,
    facts: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Fill `data` with the shard's bytes from `start` on, and verify them. facts: offsets in them, sizes and digests of
    `rows`. Raises ShardCorrupt, StorageError or NotFound."""
    problem = ""
    for _ in range(2):
        try:
            storage.read_into(entry.name, start, data.data)
        except StorageError as error:
            if storage.stat(entry.name).size >= start + len(data):
                raise
            problem = str(error)
            continue
        mismatch = _first_mismatch(data, *facts)
        if mismatch is None:
            return
        problem = f"row {rows[mismatch]} has another SHA-256"
    raise ShardCorrupt(
        f"{storage.locate(entry.name)} was read twice and is not what the manifest promises ({problem}): "
        f"restore it, or delete it and run the same `latentmill {entry.VERB}` again"
    )


def _first_mismatch(data: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, digests: np.ndarray) -> int | None:
    """The first of the records at `offsets` whose SHA-256 differs from `digests` (n, 32) uint8; None if all are
    equal."""
    view, sha256 = data.data, hashlib.sha256
    actual_digests = b"".join(
        [
            sha256(view[begin:end]).digest()
            for begin, end in zip(offsets.tolist(), (offsets + sizes).tolist(), strict=True)
        ]
    )
    if actual_digests == digests.tobytes():
        return None
    differ = (np.frombuffer(actual_digests, dtype=np.uint8).reshape(-1, DIGEST) != digests).any(axis=1)
    return int(np.flatnonzero(differ)[0])


def read_index(storage: Storage, entry: ShardEntry) -> Index:
    """A shard's index, compared with the manifest. Raises ShardCorrupt, which names it."""
    data = read_verified(storage, entry.index_name, entry.index_sha256, entry.VERB)
    try:
        return parse_index(data, entry)
    except ParseError as error:
        raise ShardCorrupt(
            f"{storage.locate(entry.index_name)} is no index of its tar ({error}): restore it, or delete it and run "
            f"the same `latentmill {entry.VERB}` again"
        ) from None


def read_verified(storage: Storage, key: str, sha256: str, verb: str = "encode") -> bytes:
    """A whole object whose SHA-256 is `sha256`; it is read once more if it differs. verb: that made it. Raises
    ShardCorrupt."""
    for _ in range(2):
        data = storage.get(key)
        actual_sha256 = hashlib.sha256(data).hexdigest()
        if actual_sha256 == sha256:
            return data
    raise ShardCorrupt(
        f"{storage.url}/{key} was read twice and is not what the manifest promises (SHA-256 {actual_sha256[:12]}, not "
        f"{sha256[:12]}): restore it, or delete it and run the same `latentmill {verb}` again"
    )
