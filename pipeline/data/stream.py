"""Verified shards in, batches out: the trainer's data plane.

One thread walks ahead of the loop, in the order that `Order` fixes, and asks a few others for the blocks that come
next, as far ahead as the memory bound allows. A record is used only after its SHA-256 is found to be its index's, and
the index's the manifest's. Nothing random happens here: what a batch holds depends on (order, rank, world, n) alone.
"""

from __future__ import annotations

import collections
import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from pipeline.data.blocks import Block, Reader, read_verified
from pipeline.data.dataset import Dataset
from pipeline.data.diskcache import DiskCache
from pipeline.data.kept import Kept
from pipeline.data.manifest import Manifest, ShardEntry, load_excluded
from pipeline.data.mixture import AnyOrder
from pipeline.data.records import Record, unpack
from pipeline.errors import ConfigError, DatasetError, LatentmillError, ShardCorrupt
from pipeline.storage import Storage

PLAN_BATCHES = 64  # batches located together
HORIZON_BATCHES = 1024  # batches planned ahead, at most
POLL = 0.1  # seconds between looks at whether the stream was closed


@dataclass
class Batch:
    """One rank's part of one global batch, on the CPU.

    n: number of the global batch's first sample. numbers: (b,) int64, this rank's sample numbers. tensors: (b, ...) in
    the cache's own dtypes, by member name ("moments" float16 (b, 2C, h, w), "text" float16 (b, L, D), "cond.NAME").
    keys: record keys. shards, rows: (b,) int64, number of each record's shard and row in its tar. wait_s: seconds that
    the loop waited for this batch.
    """

    n: int
    numbers: Tensor
    tensors: dict[str, Tensor]
    keys: list[str]
    captions: list[str]
    shards: Tensor
    rows: Tensor
    wait_s: float = 0.0


class Shard:
    """A verified shard in memory."""

    def __init__(self, tar: bytes, index: dict[str, object]) -> None:
        self.view = memoryview(tar)
        self.records: list[list[int]] = index["records"]  # type: ignore[assignment]  # [offset, size, sha256]
        self._layout: dict[str, str] | None = index.get("layout")  # type: ignore[assignment]

    def record(self, row: int, members: Sequence[str] | None = None) -> Record:
        """Row `row`; its arrays are views of the shard's bytes."""
        offset, size = self.records[row][:2]
        return unpack(self.view[offset : offset + size], members, layout=self._layout)


def fetch_shard(storage: Storage, entry: ShardEntry) -> Shard:
    """Reads a shard and its index and compares both with the manifest; once more if they differ (a read can go wrong).

    Raises ShardCorrupt when they still differ, and StorageError or NotFound when they cannot be read.
    """
    index = read_verified(storage, entry.index_name, entry.index_sha256)
    return Shard(read_verified(storage, entry.name, entry.sha256), json.loads(index))


def require_shards(storage: Storage, manifest: Manifest) -> None:
    """Raises DatasetError, naming the first, when shards or indexes of the manifest are not there, or shards not as
    long as it says."""
    there = {info.key: info.size for info in storage.list("")}
    missing = [name for shard in manifest.shards for name in (shard.name, shard.index_name) if name not in there]
    for shard in manifest.shards:
        if there.get(shard.name, shard.bytes) != shard.bytes:
            raise DatasetError(
                f"{storage.locate(shard.name)} has {there[shard.name]} bytes, its manifest says {shard.bytes}: restore "
                "it, or delete it and run the same `latentmill encode` again"
            )
    if missing:
        raise DatasetError(
            f"{storage.url} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more files" if len(missing) > 1 else "")
            + " of its manifest: restore them, or run the same `latentmill encode` again"
        )


def read(
    storage: Storage, manifest: Manifest, shard: int, rows: Sequence[int], members: Sequence[str] | None = None
) -> list[Record]:
    """Some rows of shard number `shard`, by way of the whole verified shard."""
    held = fetch_shard(storage, manifest.shards[shard])
    return [held.record(row, members) for row in rows]


def first_records(
    storage: Storage, manifest: Manifest, count: int, members: Sequence[str] | None = None
) -> Iterator[Record]:
    """The first `count` records that are read, in the manifest's own order, or all when there are fewer."""
    kept = Kept(manifest, load_excluded(storage, manifest))
    for number, size in enumerate(kept.sizes):
        if count <= 0:
            return
        ordinals = np.arange(min(size, count))
        if len(ordinals):
            rows = kept.rows(np.full_like(ordinals, number), ordinals)
            yield from read(storage, manifest, number, rows.tolist(), members)
        count -= len(ordinals)


def pad_states(states_nD: np.ndarray, length: int) -> np.ndarray:
    """(n, D) -> (length, D) with zeros after the n."""
    padded = np.zeros((length, *states_nD.shape[1:]), dtype=states_nD.dtype)
    padded[: len(states_nD)] = states_nD
    return padded


@dataclass
class _Plan:
    """A batch that will be needed: where its samples are."""

    n: int
    numbers: np.ndarray
    blocks: np.ndarray
    places: np.ndarray
    needs: dict[int, int] = field(default_factory=dict)  # samples wanted of each block


class Stream:
    """Iterator over one rank's batches from sample number start_n on, without end.

    batch: the global batch; rank r takes numbers n + r b to n + (r + 1) b - 1 of the batch that begins at n, where
    b = batch / world. members: arrays to read. memory_bytes: bound on the blocks held; workers: threads that fetch and
    verify; prefetch: batches kept ready. order: of `dataset`. cache: a disk that blocks are kept on.
    Errors in any thread are raised by `next`. Use it as a context manager, or close().

    Raises DatasetError for missing shards, members or records, and ConfigError for sizes that do not fit.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: AnyOrder,
        *,
        rank: int = 0,
        world: int = 1,
        batch: int,
        start_n: int = 0,
        members: Sequence[str] = ("moments", "text"),
        memory_bytes: int = 2 << 30,
        workers: int = 1,
        prefetch: int = 4,
        cache: DiskCache | None = None,
    ) -> None:
        if batch % world or start_n % batch:
            raise ConfigError(f"a global batch of {batch} must divide by {world} ranks and start at its own multiples")
        for part in dataset.parts:
            missing = sorted(set(members) - {member.name for member in part.manifest.contract.members})
            if missing:
                raise DatasetError(f"{part.storage.url} holds no {', '.join(missing)}: encode it with those conditions")
            require_shards(part.storage, part.manifest)
        self._share, self._offset, self._batch = batch // world, rank * (batch // world), batch
        needed = order.window_bytes(dataset.bytes, self._offset, self._share)
        if needed > memory_bytes:
            raise ConfigError(
                f"data.memory_gb={memory_bytes / 1e9:.3g} is too small: this rank shuffles {needed / 1e9:.3g} GB of "
                f"{dataset.url} at a time; give each rank at least that"
            )
        self._dataset, self._order, self._reader = dataset, order, Reader(dataset, cache)
        self._members, self._memory = tuple(members), memory_bytes
        self._next_n = start_n
        self._located: collections.deque[_Plan] = collections.deque()  # located, blocks not asked for yet
        self._plans: collections.deque[_Plan] = collections.deque()  # blocks asked for
        self._held: collections.OrderedDict[int, Future[Block]] = collections.OrderedDict()
        self._wanted: collections.Counter[int] = collections.Counter()  # planned samples of each block held
        self._held_bytes = 0
        self._closed = threading.Event()
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=max(prefetch, 1))
        self._fetchers = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="latentmill-fetch")
        self._producer = threading.Thread(target=self._produce, name="latentmill-stream", daemon=True)
        self._producer.start()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises what a worker raised, StopIteration once closed."""
        started = time.perf_counter()
        while not self._closed.is_set():
            try:
                item = self._ready.get(timeout=POLL)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self.close()
                raise item
            item.wait_s = time.perf_counter() - started
            return item
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads and frees the blocks. Batches handed out before stay valid."""
        self._closed.set()
        self._producer.join()
        self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._held.clear()

    # The producer's thread -------------------------------------------------------------------------------------------

    def _produce(self) -> None:
        try:
            while not self._closed.is_set():
                self._plan_ahead()
                plan = self._plans.popleft()
                blocks = {number: self._await(self._held[number]) for number in plan.needs}
                if self._closed.is_set():
                    return
                self._hand_over(self._collate(plan, blocks))
                self._wanted.subtract(plan.needs)
        except BaseException as error:  # whatever it is, the loop must hear of it
            self._hand_over(error)

    def _await(self, block: Future[Block]) -> Block | None:
        """The block, or None when the stream is closed first."""
        while not self._closed.is_set():
            try:
                return block.result(timeout=POLL)
            except TimeoutError:
                if block.done():
                    raise  # the fetch's own
        return None

    def _hand_over(self, item: Batch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=POLL)
            except queue.Full:
                continue

    def _plan_ahead(self) -> None:
        """Asks for the blocks of coming batches, in order, while they fit; of the next batch in any case."""
        while len(self._plans) < HORIZON_BATCHES:
            if not self._located:
                self._locate()
            plan = self._located[0]
            new = [number for number in plan.needs if number not in self._held]
            size = int(self._dataset.bytes[new].sum())
            if not self._make_room(size, keep=plan.needs) and self._plans:
                return
            for number in plan.needs:
                if number not in self._held:
                    self._held[number] = self._fetchers.submit(self._reader.read, number)
                    self._held_bytes += int(self._dataset.bytes[number])
                self._held.move_to_end(number)
            self._wanted.update(plan.needs)
            self._plans.append(self._located.popleft())

    def _make_room(self, size: int, keep: dict[int, int]) -> bool:
        """Drops blocks that no planned batch wants, least recently planned first, until `size` bytes fit."""
        for number in list(self._held):
            if self._held_bytes + size <= self._memory:
                return True
            if self._wanted[number] == 0 and number not in keep:
                del self._held[number]
                del self._wanted[number]
                self._held_bytes -= int(self._dataset.bytes[number])
        return self._held_bytes + size <= self._memory

    def _locate(self) -> None:
        """Plans the next PLAN_BATCHES batches."""
        starts = self._next_n + self._batch * np.arange(PLAN_BATCHES, dtype=np.int64)
        numbers = starts[:, None] + self._offset + np.arange(self._share, dtype=np.int64)
        positions = self._order.locate(numbers.reshape(-1))
        blocks, places = positions.block.reshape(numbers.shape), positions.place.reshape(numbers.shape)
        for i, n in enumerate(starts):
            # In order of first use, so that fetches start in the order in which they are needed.
            needs = dict(collections.Counter(blocks[i].tolist()))
            self._located.append(_Plan(int(n), numbers[i], blocks[i], places[i], needs))
        self._next_n += self._batch * PLAN_BATCHES

    def _collate(self, plan: _Plan, blocks: dict[int, Block | None]) -> Batch:
        records = []
        for number, block, place in zip(plan.numbers.tolist(), plan.blocks.tolist(), plan.places.tolist(), strict=True):
            held = blocks[block]
            assert held is not None, "the stream was closed"
            try:
                records.append(held.record(place, self._members))
            except LatentmillError as error:
                storage, entry = self._dataset.shard(self._dataset[block].shard)
                raise ShardCorrupt(f"{storage.url}/{entry.name} (sample {number}): {error}") from error
        tensors = {}
        for name in self._members:
            arrays = [record.members[name] for record in records]
            if name == "text" and self._dataset.contract.trimmed:
                arrays = [pad_states(array, self._dataset.contract.text.length) for array in arrays]
            if len({array.shape for array in arrays}) > 1:
                raise ShardCorrupt(f"{self._dataset.url}: {name} differs in shape within the batch at sample {plan.n}")
            tensors[name] = torch.from_numpy(np.stack(arrays))
        rows = {block: self._dataset.rows(block) for block in plan.needs}
        places = zip(plan.blocks.tolist(), plan.places.tolist(), strict=True)
        return Batch(
            n=plan.n,
            numbers=torch.from_numpy(plan.numbers.copy()),
            tensors=tensors,
            keys=[record.key for record in records],
            captions=[record.meta["caption"] for record in records],
            shards=torch.from_numpy(self._dataset.shards[plan.blocks]),
            rows=torch.tensor([rows[block][place] for block, place in places], dtype=torch.int64),
        )
