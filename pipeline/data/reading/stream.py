"""Verified shards in, batches out: the trainer's data plane.

One thread walks ahead of the loop, in the order that `Order` fixes, and asks a few others for the blocks that come
next, as far ahead as the memory bound allows. A record is used only after its SHA-256 is found to be its index's, and
the index's the manifest's. Nothing random happens here: what a batch holds depends on (order, rank, world, n) alone.
"""

from __future__ import annotations

import collections
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from pipeline.data.order.dataset import Dataset
from pipeline.data.order.mixture import AnyOrder
from pipeline.data.reading.batch import Batch, collate
from pipeline.data.reading.device import Moved, Mover
from pipeline.data.reading.disk_cache import DiskCache
from pipeline.data.reading.memory import Pool
from pipeline.data.reading.reader import Block, Reader
from pipeline.data.reading.shards import require_shards
from pipeline.errors import ConfigError, DatasetError, ShardCorrupt

PLAN_BATCHES = 64  # batches located together, or
PLAN_SAMPLES = 4096  # as many as hold this many samples of the rank, where that is more
HORIZON_BATCHES = 2048  # batches located ahead, at most: as far as it is known which blocks are wanted again
HORIZON_SAMPLES = 1 << 20  # of this rank among them, at most
POLL = 0.1  # seconds between looks at whether the stream was closed
CPU = torch.device("cpu")


@dataclass
class _Plan:
    """A batch that will be needed: where its samples are."""

    n: int
    numbers: np.ndarray
    blocks: list[int]
    places: list[int]
    needs: list[int]  # its blocks, each once


class Stream:
    """Iterator over one rank's batches from sample number start_n on, without end.

    batch: the global batch; rank r takes numbers n + r b to n + (r + 1) b - 1 of the batch that begins at n, where
    b = batch / world. members: arrays to read. memory_bytes: bound on the blocks held; workers: threads that fetch and
    verify; prefetch: batches kept ready. order: of `dataset`. cache: a disk that blocks are kept on. device: where the
    batches' tensors go, ahead of their use.
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
        device: torch.device = CPU,
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
        pool = self._pool = Pool()
        self._dataset, self._order, self._mover = dataset, order, Mover(device, pool)
        self._reader = Reader(dataset, cache, members=members, pool=pool)
        self._members, self._memory = tuple(members), memory_bytes
        self._next_n = start_n
        self._together = max(PLAN_BATCHES, PLAN_SAMPLES // self._share)
        self._horizon = max(min(HORIZON_BATCHES, HORIZON_SAMPLES // self._share), self._together)
        self._located: collections.deque[_Plan] = collections.deque()  # located, blocks not asked for yet
        self._plans: collections.deque[_Plan] = collections.deque()  # blocks asked for
        self._held: dict[int, Future[Block]] = {}
        # Numbers n of the located batches that want each block, the next one first.
        self._uses: collections.defaultdict[int, collections.deque[int]] = collections.defaultdict(collections.deque)
        self._held_bytes = 0
        self._closed = threading.Event()
        self._ready: queue.Queue[Moved | BaseException] = queue.Queue(maxsize=max(prefetch, 1))
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
            batch = self._mover.receive(item)
            batch.wait_s = time.perf_counter() - started
            return batch
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
                self._done_with(plan)
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

    def _hand_over(self, item: Moved | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=POLL)
            except queue.Full:
                continue

    def _plan_ahead(self) -> None:
        """Asks for the blocks of coming batches, in order, while they fit; of the next batch in any case."""
        while self._located or len(self._plans) < self._horizon:
            if not self._located or len(self._located) + len(self._plans) < self._horizon:
                self._locate()
            plan = self._located[0]
            new = [number for number in plan.needs if number not in self._held]
            if new and not self._make_room(int(self._dataset.bytes[new].sum()), plan) and self._plans:
                return
            for number in new:
                self._held[number] = self._fetchers.submit(self._reader.read, number)
                self._held_bytes += int(self._dataset.bytes[number])
            self._plans.append(self._located.popleft())

    def _make_room(self, size: int, plan: _Plan) -> bool:
        """Drops blocks until `size` bytes fit: those of no located batch first, then those that are needed last; never
        one that is needed before the plan's own."""
        excess = self._held_bytes + size - self._memory
        if excess <= 0:
            return True
        never = self._next_n
        next_use = {number: (self._uses.get(number) or (never,))[0] for number in self._held}
        keep = set(plan.needs)
        for number in sorted(next_use, key=next_use.__getitem__, reverse=True):
            if excess <= 0 or next_use[number] <= plan.n:
                break
            if number not in keep:
                del self._held[number]
                self._held_bytes -= int(self._dataset.bytes[number])
                excess -= int(self._dataset.bytes[number])
        return excess <= 0

    def _locate(self) -> None:
        """Finds where the samples of the next batches are."""
        starts = self._next_n + self._batch * np.arange(self._together, dtype=np.int64)
        numbers = starts[:, None] + self._offset + np.arange(self._share, dtype=np.int64)
        positions = self._order.locate(numbers.reshape(-1))
        blocks, places = positions.block.reshape(numbers.shape), positions.place.reshape(numbers.shape)
        for n, own, of, at in zip(starts.tolist(), numbers, blocks.tolist(), places.tolist(), strict=True):
            # Needs in order of first use, so that fetches start in the order in which they are needed.
            plan = _Plan(n, own, of, at, list(dict.fromkeys(of)))
            self._located.append(plan)
            for number in plan.needs:
                self._uses[number].append(n)
        self._next_n += self._batch * self._together

    def _done_with(self, plan: _Plan) -> None:
        for number in plan.needs:
            uses = self._uses[number]
            uses.popleft()
            if not uses:
                del self._uses[number]

    def _collate(self, plan: _Plan, blocks: dict[int, Block | None]) -> Moved:
        found = []
        for number, place in zip(plan.blocks, plan.places, strict=True):
            block = blocks[number]
            assert block is not None, "the stream was closed"
            found.append((block, place))
        contract = self._dataset.contract
        length = contract.text.length if contract.trimmed else 0
        try:
            batch = collate(plan.n, plan.numbers, found, self._members, length, self._mover.take)
        except ShardCorrupt as error:
            raise ShardCorrupt(f"{self._dataset.url}: {error}") from None
        return self._mover.send(batch)
